"""Safe files: written atomically, and read as data only.

A file or directory appears under its name when it is complete, and a full disk leaves the earlier file. PyTorch and
safetensors files are read without running code from them, and corrupt files raise an error.
"""

import csv
import errno
import glob
import hashlib
import importlib.util
import json
import math
import os
import pickle
import re
import shutil
import socket
import time
import warnings
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

import torch

UNFINISHED = ".unfinished"  # extension of temporary files
HOST = socket.gethostname().replace(".", "_")
DAY = 86400  # seconds after which a temporary file of another machine counts as abandoned
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

EXPORTED = "self_supervised"  # key under which our exported weights store their settings
# What other systems store next to the tensors, for their own programs. Nothing of these names is imported or called.
STAND_INS = (
    "argparse.Namespace",
    "pathlib.PosixPath",
    "pathlib._local.PosixPath",  # Python 3.13
    "__main__.exclude_bias_and_norm",  # LARS of vicreg and barlowtwins
    "mmengine.logging.history_buffer.HistoryBuffer",
    "builtins.getattr",  # mmengine's files name a method of HistoryBuffer with it
    *(f"numpy{core}.multiarray.{name}" for core in (".core", "._core") for name in ("scalar", "_reconstruct")),
    "numpy.dtype",
    "numpy.ndarray",
)
UNSUPPORTED = re.compile(r"unsupported (?:global: )?(?:GLOBAL|class) ([\w.]+)", re.I)  # in torch's errors
MOST_CLASS_NAMES = 30  # in one file
DATA_ONLY = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"  # environment variables of torch
WITH_CODE = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"


# ---- Writing ----


def local_path(name: str, given: str | Path) -> Path:
    """Return a path to write to, with `~` replaced.

    Raises:
        ValueError: it is a URL, also one in which Path has collapsed the slashes to `s3:/bucket`.
    """
    if str(given).split("/")[0].endswith(":"):
        raise ValueError(f"{name}={given}: files are not written to URLs. Pass a path that is local or mounted.")
    return Path(given).expanduser()


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


# ---- Reading PyTorch and safetensors files ----


class StandIn:
    """Object in place of one that is not read: it accepts any arguments and state, and does nothing."""

    def __new__(cls, *_: Any) -> "StandIn":
        return super().__new__(cls)

    def __setstate__(self, _: Any) -> None:
        pass


def safe_load(path: str | Path, of_others: bool = False) -> Any:
    """Return the content of a PyTorch file on the CPU, or {"state_dict": tensors, EXPORTED: our settings} of a
    .safetensors file.

    Args:
        path: the file.
        of_others: whether to accept files that name some harmless objects of other systems (STAND_INS). These objects
            are not read.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is corrupt, is of another kind, or would run code when loaded; or the path is a URL.
        OSError, MemoryError: the machine could not read it.
    """
    if str(path).split("/")[0].endswith(":"):
        raise ValueError(f"{path} is a URL, and only local files are read. Copy it to a local path first.")
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is corrupt: it is empty")
    if path.suffix == ".safetensors":
        return load_safetensors(path)
    members: list[str] = []
    try:
        if zipfile.is_zipfile(path):  # files of torch before 1.6 are not, and have no checksums
            with zipfile.ZipFile(path) as archive:
                corrupt, members = archive.testzip(), archive.namelist()  # torch itself does not compare the checksums
            if corrupt is not None:
                raise OSError(f"the checksum of {corrupt} is wrong")
        with data_only_variables():
            return load_with_class_names(path, [(StandIn, name) for name in STAND_INS] if of_others else [])
    except Exception as error:  # torch and zipfile raise exceptions of many types for corrupt files
        if isinstance(error, MemoryError) or getattr(error, "errno", None) not in (None, errno.EINVAL):
            raise  # the machine's; EINVAL is that of a seek to where a corrupt header points
        raise refusal(path, error, members) from error


def load_with_class_names(path: Path, known: list[tuple[type, str]]) -> Any:
    """Return the content of a file that may name classes but may not create objects of them. Lightning before 1.5
    stored the state of callbacks under their classes."""
    for _ in range(MOST_CLASS_NAMES):
        try:
            with torch.serialization.safe_globals(known):
                return torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            match = UNSUPPORTED.search(str(error))
            if match is None or match[1] in (name for _, name in known):
                raise
            known = [*known, (class_without_objects(match[1]), match[1])]
    raise ValueError("it names too many classes")


def class_without_objects(name: str) -> type:
    """Return a class in place of the one of that name. Creating an object of it raises torch's error."""

    def refuse(*_: Any) -> NoReturn:
        raise pickle.UnpicklingError(f"Unsupported class {name}")

    return type(name, (), {"__new__": refuse})


@contextmanager
def class_names_allowed(content: dict[str, Any]) -> Iterator[None]:
    """Let Lightning read the file with this content again. Lightning ignores states of callbacks under classes."""
    names = [key for key in content.get("callbacks", {}) if isinstance(key, type)]
    with torch.serialization.safe_globals([(key, key.__name__) for key in names]), warnings.catch_warnings():
        if names:
            warnings.filterwarnings("ignore", "You have multiple `ModelCheckpoint` callback states")
        yield


def refusal(path: str | Path, error: Exception, members: Iterable[str] = ()) -> ValueError:
    """Return an error in our words, because those of torch explain how to run the file's code."""
    if any(name.endswith(("/constants.pkl", "/archive_format")) for name in members):
        what = "is a program (TorchScript or torch.export), not weights"
        return ValueError(f"{path} {what}. Pass the checkpoint from which it was exported.")
    if match := UNSUPPORTED.search(str(error)):
        return ValueError(f"{path} holds more than data and would run code on loading, which is refused: {match[1]}")
    is_torchs = isinstance(error, pickle.UnpicklingError)
    reason = "" if is_torchs else f": {next(iter(str(error).splitlines()), type(error).__name__)}"
    return ValueError(f"{path} is corrupt, or not a PyTorch file{reason}")


@contextmanager
def data_only(what: str) -> Iterator[None]:
    """Make other libraries load `what` as data only. By default, torch.hub runs code in a file of its cache."""
    try:
        with data_only_variables():
            yield
    except pickle.UnpicklingError as error:
        raise refusal(what, error) from error


@contextmanager
def data_only_variables() -> Iterator[None]:
    """Set torch's environment variables so that torch.load reads data only. Setting both at once is an error."""
    before = {name: os.environ.pop(name, None) for name in (DATA_ONLY, WITH_CODE)}
    os.environ[DATA_ONLY] = "1"
    try:
        yield
    finally:
        os.environ.pop(DATA_ONLY)
        os.environ.update({name: value for name, value in before.items() if value is not None})


def load_safetensors(path: Path) -> dict[str, Any]:
    if importlib.util.find_spec("safetensors") is None:
        raise ValueError(f"{path}: needs the package safetensors, which is not installed. Run pip install safetensors.")
    from safetensors import SafetensorError, safe_open  # optional

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            content = {"state_dict": {key: file.get_tensor(key) for key in file.keys()}}  # noqa: SIM118, not a dict
        return content | ({EXPORTED: json.loads(metadata[EXPORTED])} if EXPORTED in metadata else {})
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{path} is corrupt, or not a safetensors file: {error}") from error
