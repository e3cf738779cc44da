"""Files that are written completely or not at all, and CSV and JSON that every reader accepts.

A file or directory appears under its name when it is complete, and a full disk leaves the earlier file.
"""

import csv
import errno
import glob
import hashlib
import json
import math
import os
import shutil
import socket
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from self_supervised.fields import as_path

UNFINISHED = ".unfinished"  # extension of temporary files
HOST = socket.gethostname().replace(".", "_")
DAY = 86400  # seconds after which a temporary file of another machine counts as abandoned
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


# ---- Writing ----


def local_path(name: str, given: str | Path) -> Path:
    """Return a path to write to, with `~` replaced.

    Raises:
        ValueError: it is a URL, also one in which Path has collapsed the slashes to `s3:/bucket`.
    """
    if str(given).split("/")[0].endswith(":"):
        raise ValueError(f"{name}={given}: files are not written to URLs. Pass a path that is local or mounted.")
    return as_path(given)


def check_folder(name: str, folder: str | Path) -> None:
    """Raise ValueError unless files can be written to the directory, which need not exist yet. `name` is its option."""
    folder = local_path(name, folder)
    existing = next(part for part in (folder, *folder.absolute().parents) if part.exists())
    if not existing.is_dir():
        raise ValueError(f"{name}={folder}: {existing} is a file. Choose another directory.")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ValueError(f"{name}={folder}: {existing} is not writable. Choose another directory.")


def check_file(name: str, path: str | Path, *extensions: str, read: Iterable[str | Path] = ()) -> None:
    """Raise ValueError unless a file can be written at the path, which must end in one of the extensions, if any, and
    be none of those that the program reads. `name` is its option."""
    path = local_path(name, path)
    if path.exists() and any(os.path.exists(file) and path.samefile(file) for file in map(os.path.expanduser, read)):
        raise ValueError(f"{name}={path}: this file is read, and would be overwritten. Pass another path.")
    if path.is_dir():
        raise ValueError(f"{name}={path}: is a directory. Pass the path of a file.")
    if extensions and path.suffix.lower() not in extensions:
        raise ValueError(f"{name}={path}: must end in {' or '.join(', '.join(extensions).rsplit(', ', 1))}")
    check_folder(name, path.parent)


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path next to `path`. The file written there becomes `path` at the end of the block, or is
    deleted if the block fails.

    Raises:
        OSError: the disk is full.
    """
    with temporary_path(path) as unfinished:
        yield unfinished
        sync(unfinished)
        os.replace(unfinished, path)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary directory next to `path`, which becomes `path` at the end of the block. If another process was
    faster, its directory stays.

    Raises:
        OSError: the disk is full.
    """
    with temporary_path(path) as unfinished:
        unfinished.mkdir()
        yield unfinished
        for file in unfinished.iterdir():
            sync(file)
        try:
            unfinished.rename(path)
        except OSError:
            if not path.is_dir():
                raise


def atomic_write(path: Path, text: str) -> None:
    """Write text to a file, completely or not at all."""
    with atomic_file(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


@contextmanager
def temporary_path(path: Path) -> Iterator[Path]:
    """Yield a path next to `path` that no other process uses, and delete what is left there at the end."""
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path)
    unfinished = path.with_name(f"{start_of(path)}{HOST}.{os.getpid()}.{os.urandom(4).hex()}{UNFINISHED}")
    try:
        with disk_errors_named(path):
            yield unfinished
            sync(path.parent)  # the new name is on the disk before an older file is deleted
    finally:
        remove(unfinished)


def start_of(path: Path) -> str:
    return f".{os.fsencode(path.name)[:80].decode(errors='ignore')}."  # a file name has at most 255 bytes


def remove_leftovers(path: Path) -> None:
    """Delete the temporary files and directories of `path` that killed processes left."""
    for leftover in path.parent.glob(f"{glob.escape(start_of(path))}*{UNFINISHED[1:]}"):
        host, _, process = leftover.name.removesuffix(UNFINISHED).rpartition(".")[0].rpartition(".")
        if host.endswith(f".{HOST}") and process.isdecimal():
            is_abandoned = not is_alive(int(process))
        else:
            is_abandoned = time.time() - newest_change(leftover) > DAY
        if is_abandoned:
            remove(leftover)


def is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # the process of another user
        pass
    return True


def newest_change(path: Path) -> float:
    with suppress(OSError):  # it was completed in the meantime
        return max(file.stat().st_mtime for file in (path, *(path.iterdir() if path.is_dir() else ())))
    return time.time()


def file_hash(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Flush the content of a file, or the names in a directory, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def disk_errors_named(path: Path, in_place: bool = False) -> Iterator[None]:
    """Name `path` in the errors of a full disk.

    Args:
        in_place: whether the file is written where it is, so that a part of it may be left.

    Raises:
        OSError: the disk is full, or a limit on space or file size is reached.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:  # torch's writer reports a failed write as RuntimeError
        cause = full_disk(error)
        if cause is None:
            raise
        left = "" if in_place else " Earlier files are unchanged, and no incomplete file is left."
        raise OSError(f"{path} cannot be written ({cause.strerror or cause}): is the disk full?{left}") from error


def full_disk(error: BaseException | None) -> OSError | None:
    """Return the error of a full disk among the causes of an error."""
    while error is not None:
        by_numpy = "requested and" in str(error)  # tofile() reports how much was written, but not the cause
        if isinstance(error, OSError) and (error.errno in DISK_FULL or by_numpy):
            return error
        error = error.__cause__ or error.__context__
    return None


# ---- CSV and JSON ----


def rows_of(file: Path) -> tuple[list[str], list[dict[str, Any]]]:
    """Return (columns, rows) of a CSV file of numbers with a column `step`, or ([], []) if there is no file.

    Incomplete rows are skipped: a full disk or a power failure leaves half a row, or zeros, at the end.
    """
    if not file.is_file():
        return [], []
    lines = file.read_bytes().decode(errors="replace").splitlines(keepends=True)
    reader = csv.DictReader(line for line in lines if line.endswith("\n") and "\0" not in line)
    columns = list(reader.fieldnames or [])
    return columns, [row for row in reader if is_complete(row)]


def write_rows(file: Path, columns: Sequence[str], rows: Iterable[dict[str, Any]]) -> None:
    """Write a CSV file, completely or not at all."""
    with atomic_file(file) as unfinished, unfinished.open("w", newline="") as opened:
        writer = csv.DictWriter(opened, columns)
        writer.writeheader()
        writer.writerows(rows)


def is_complete(row: dict[str | None, Any]) -> bool:
    if None in row or None in row.values():  # more fields than columns, or fewer
        return False
    try:
        int(row["step"])
        for value in filter(None, row.values()):
            float(value)
    except (KeyError, ValueError):
        return False
    return True


def to_json(content: Any, **options: Any) -> str:
    """Return JSON that every reader accepts, with null in place of NaN and infinity, which JSON does not have."""
    return json.dumps(without_nan(content), allow_nan=False, **options)


def without_nan(content: Any) -> Any:
    if isinstance(content, dict):
        return {name: without_nan(value) for name, value in content.items()}
    if isinstance(content, list | tuple):
        return [without_nan(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content
