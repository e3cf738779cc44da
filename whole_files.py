"""Files and folders that appear under their names only when all of them is on the disk."""

import csv
import errno
import glob
import json
import math
import os
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

ENDING = ".unfinished"
HOST = socket.gethostname().replace(".", "_")
DAY = 86400  # seconds after which an unfinished file of another machine is left behind
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def check_folder(name: str, folder: str | Path) -> None:
    """Raise ValueError, naming the option, unless files can be written into the folder, which need not exist yet."""
    folder = Path(folder).expanduser()
    there = next(part for part in (folder, *folder.absolute().parents) if part.exists())
    if not there.is_dir():
        raise ValueError(f"{name}={folder}: {there} is a file. Choose another directory.")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"{name}={folder}: {there} cannot be written. Choose another directory.")


def check_file(name: str, path: str | Path) -> None:
    """Raise ValueError, naming the option, unless a file can be written there."""
    path = Path(path).expanduser()
    if path.is_dir():
        raise ValueError(f"{name}={path} is a directory. Name a file.")
    check_folder(name, path.parent)


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A name beside `path` to write to, which becomes `path` once the block is done, and is removed if it fails.

    Raises:
        OSError: the disk is full.
    """
    with unfinished_beside(path) as unfinished:
        yield unfinished
        sync(unfinished)
        os.replace(unfinished, path)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A folder beside `path` to write files into, which becomes `path` once the block is done. If another process
    was faster, its folder stays.

    Raises:
        OSError: the disk is full.
    """
    with unfinished_beside(path) as unfinished:
        unfinished.mkdir()
        yield unfinished
        for file in unfinished.iterdir():
            sync(file)
        try:
            unfinished.rename(path)
        except OSError:
            if not path.is_dir():
                raise


def write_whole(path: Path, text: str) -> None:
    with whole(path) as unfinished:
        unfinished.write_text(text)


@contextmanager
def unfinished_beside(path: Path) -> Iterator[Path]:
    """A name that no other process uses."""
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path)
    unfinished = path.with_name(f"{start_of(path)}{HOST}.{os.getpid()}.{os.urandom(4).hex()}{ENDING}")
    try:
        with disk_errors_named(path):
            yield unfinished
            sync(path.parent)  # the new name is on the disk before an older file is deleted
    finally:
        remove(unfinished)


def start_of(path: Path) -> str:
    return f".{path.name[:80]}."  # a name has at most 255 bytes


def remove_leftovers(path: Path) -> None:
    """Remove what killed processes left of earlier tries to write `path`."""
    for found in path.parent.glob(f"{glob.escape(start_of(path))}*{ENDING[1:]}"):
        host, _, process = found.name.removesuffix(ENDING).rpartition(".")[0].rpartition(".")
        if host.endswith(f".{HOST}") and process.isdecimal():
            is_left = not is_alive(int(process))
        else:
            is_left = time.time() - newest_change(found) > DAY
        if is_left:
            remove(found)


def is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        pass
    return True


def newest_change(path: Path) -> float:
    with suppress(OSError):  # finished meanwhile
        return max(file.stat().st_mtime for file in (path, *(path.iterdir() if path.is_dir() else ())))
    return time.time()


def remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Have a file's content, or a folder's names, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def disk_errors_named(path: Path) -> Iterator[None]:
    """
    Raises:
        OSError: the disk was full, or a limit on space or file size was reached, while `path` was written.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:  # torch's writer reports a failed write as RuntimeError
        cause = full_disk(error)
        if cause is None:
            raise
        raise OSError(
            f"{path} could not be written ({cause.strerror or cause}): is the disk full? Nothing half-written is "
            "left, and earlier files are as they were"
        ) from error


def full_disk(error: BaseException | None) -> OSError | None:
    """The error of a full disk among those that led to this one."""
    while error is not None:
        by_numpy = "requested and" in str(error)  # tofile() says how much was written, and not why
        if isinstance(error, OSError) and (error.errno in FULL or by_numpy):
            return error
        error = error.__cause__ or error.__context__
    return None


# ---- tables that grow row by row ----


def rows_of(file: Path) -> tuple[list[str], list[dict[str, Any]]]:
    """(columns, rows) of a CSV file of numbers with a column `step`; ([], []) if there is none.

    Rows that are not complete are passed over: a full disk or a power failure leaves half a row, or zeros, at the end.
    """
    if not file.is_file():
        return [], []
    lines = file.read_bytes().decode(errors="replace").splitlines(keepends=True)
    reader = csv.DictReader(line for line in lines if line.endswith("\n") and "\0" not in line)
    columns = list(reader.fieldnames or [])
    return columns, [row for row in reader if is_complete(row)]


def is_complete(row: dict[str | None, Any]) -> bool:
    if None in row or None in row.values():  # more fields than columns, or fewer
        return False
    try:
        int(row["step"])
        return all(float(value) is not None for value in row.values() if value)
    except (KeyError, ValueError):
        return False


def to_json(content: Any, **options: Any) -> str:
    """JSON that every reader takes: null in place of NaN and infinity, which JSON does not have."""
    return json.dumps(without_nan(content), allow_nan=False, **options)


def without_nan(content: Any) -> Any:
    if isinstance(content, dict):
        return {name: without_nan(value) for name, value in content.items()}
    if isinstance(content, list | tuple):
        return [without_nan(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content
