"""Files of torch are read as data only: nothing in them can run, and damage is noticed."""

import csv
import errno
import glob
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
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

import torch

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
def atomic_file(path: Path) -> Iterator[Path]:
    """A name beside `path` to write to, which becomes `path` once the block is done, and is removed if it fails.

    Raises:
        OSError: the disk is full.
    """
    with unfinished_beside(path) as unfinished:
        yield unfinished
        sync(unfinished)
        os.replace(unfinished, path)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
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


def atomic_write(path: Path, text: str) -> None:
    with atomic_file(path) as unfinished:
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


# ---- Files of torch are read as data only: nothing in them can run, and damage is noticed ----


EXPORTED = "self_supervised"  # the key under which our exported weights keep their settings

# What other systems keep beside the tensors, for their own programs. Nothing of these names is imported or called.
STAND_INS = (
    "argparse.Namespace",
    "pathlib.PosixPath",
    "pathlib._local.PosixPath",  # of Python 3.13
    "__main__.exclude_bias_and_norm",  # vicreg's and barlowtwins' LARS
    "mmengine.logging.history_buffer.HistoryBuffer",
    "builtins.getattr",  # as mmengine's files name a method of it
    *(f"numpy{core}.multiarray.{name}" for core in (".core", "._core") for name in ("scalar", "_reconstruct")),
    "numpy.dtype",
    "numpy.ndarray",
)
UNSUPPORTED = re.compile(r"unsupported (?:global: )?(?:GLOBAL|class) ([\w.]+)", re.I)  # in torch's errors
MOST_CLASS_NAMES = 30


DATA_ONLY = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"  # variables of torch
WITH_CODE = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"


class StandIn:
    """In place of an object that is not read: takes whatever the file says of it, and does nothing."""

    def __new__(cls, *_: Any) -> "StandIn":
        return super().__new__(cls)

    def __init__(self, *_: Any):
        pass

    def __setstate__(self, _: Any) -> None:
        pass


def safe_load(path: str | Path, of_others: bool = False) -> Any:
    """What `torch.save` wrote, on the CPU; of a .safetensors file, {"state_dict": tensors, EXPORTED: our settings}.

    Args:
        path: the file.
        of_others: read files that name some harmless objects of other systems (STAND_INS), without those objects.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged or another kind of file, or would run code when loaded; says which.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is damaged: it is empty")
    if path.suffix == ".safetensors":
        return load_safetensors(path)
    try:
        if zipfile.is_zipfile(path):  # files of torch before 1.6 are none, and have no checksums
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()  # torch itself does not compare the checksums
            if damaged is not None:
                raise OSError(f"the checksum of {damaged} is wrong")
        with variables_of_torch():
            return load_with_class_names(path, [(StandIn, name) for name in STAND_INS] if of_others else [])
    except pickle.UnpicklingError as error:
        raise refusal_message(path, error) from error
    except Exception as error:  # torch and zipfile raise many kinds of them on damaged files
        first_line = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(f"{path} is damaged, or no file of torch: {first_line}") from error


def load_with_class_names(path: Path, known: list[tuple[type, str]]) -> Any:
    """torch.load of a file that may name classes, as long as no object of them is made: Lightning before 1.5 kept the
    state of callbacks under their classes."""
    for _ in range(MOST_CLASS_NAMES):
        try:
            with torch.serialization.safe_globals(known):
                return torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            found = UNSUPPORTED.search(str(error))
            if found is None or found[1] in (name for _, name in known):
                raise
            known = [*known, (class_name(found[1]), found[1])]
    raise ValueError("it names too many classes")


def class_name(name: str) -> type:
    """A class in place of the one of that name. To make an object of it is refused in torch's words."""

    def refuse(*_: Any) -> NoReturn:
        raise pickle.UnpicklingError(f"Unsupported class {name}")

    return type(name, (), {"__new__": refuse})


@contextmanager
def class_names_allowed(content: dict[str, Any]) -> Iterator[None]:
    """While Lightning reads the file with this content once more. It leaves callbacks under their classes out."""
    names = [key for key in content.get("callbacks", {}) if isinstance(key, type)]
    with torch.serialization.safe_globals([(key, key.__name__) for key in names]), warnings.catch_warnings():
        if names:
            warnings.filterwarnings("ignore", "You have multiple `ModelCheckpoint` callback states")
        yield


def refusal_message(path: str | Path, error: pickle.UnpicklingError) -> ValueError:
    """In our words: torch's go on to advise how to run the file all the same."""
    if (found := UNSUPPORTED.search(str(error))) is None:
        return ValueError(f"{path} is damaged, or no file of torch")
    return ValueError(f"{path} holds more than data and would run code on loading, which is refused: {found[1]}")


@contextmanager
def data_only(what: str) -> Iterator[None]:
    """While others load `what`: torch.hub, left to itself, would run code that lies in a file of its cache."""
    try:
        with variables_of_torch():
            yield
    except pickle.UnpicklingError as error:
        raise refusal_message(what, error) from error


@contextmanager
def variables_of_torch() -> Iterator[None]:
    """torch.load reads data only, whatever the environment says. Both variables at once, torch refuses."""
    before = {name: os.environ.pop(name, None) for name in (DATA_ONLY, WITH_CODE)}
    os.environ[DATA_ONLY] = "1"
    try:
        yield
    finally:
        os.environ.pop(DATA_ONLY)
        os.environ.update({name: value for name, value in before.items() if value is not None})


def load_safetensors(path: Path) -> dict[str, Any]:
    if importlib.util.find_spec("safetensors") is None:
        raise ValueError(f"{path} needs the package safetensors, which is not installed: pip install safetensors")
    from safetensors import SafetensorError, safe_open  # optional

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            content = {"state_dict": {key: file.get_tensor(key) for key in file.keys()}}  # noqa: SIM118, it is no dict
        return content | ({EXPORTED: json.loads(metadata[EXPORTED])} if EXPORTED in metadata else {})
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{path} is damaged, or no safetensors file: {error}") from error
