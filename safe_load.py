"""Files of torch are read as data only: nothing in them can run, and damage is noticed."""

import importlib.util
import json
import os
import pickle
import re
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch

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
        raise refusal(path, error) from error
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


def refusal(path: str | Path, error: pickle.UnpicklingError) -> ValueError:
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
        raise refusal(what, error) from error


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
