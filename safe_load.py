"""Files of torch are read as data only: nothing in them can run, and damage is noticed."""

import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import torch


def safe_load(path: str | Path) -> Any:
    """What `torch.save` wrote, on the CPU.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged or another kind of file, or would run code when loaded; says which.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is damaged: it is empty")
    try:
        if zipfile.is_zipfile(path):  # files of torch before 1.6 are none, and have no checksums
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()  # torch itself does not compare the checksums
            if damaged is not None:
                raise OSError(f"the checksum of {damaged} is wrong")
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # torch's message goes on to advise how to run the file all the same
        if (found := re.search(r"unsupported (?:global: )?(?:GLOBAL|class) ([\w.]+)", str(error), re.I)) is None:
            raise ValueError(f"{path} is damaged, or no file of torch") from error
        raise ValueError(
            f"{path} holds more than data and would run code on loading, which is refused: {found[1]}"
        ) from error
    except Exception as error:  # torch and zipfile raise many kinds of them on damaged files
        first_line = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(f"{path} is damaged, or no file of torch: {first_line}") from error
