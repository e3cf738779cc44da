"""PyTorch and safetensors files, read as data only: no code of a file runs, and corrupt files raise an error."""

import errno
import importlib.util
import json
import os
import pickle
import re
import warnings
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch

from self_supervised.fields import as_path

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
    path = as_path(path)
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
