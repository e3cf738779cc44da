"""What the commands of this folder have in common."""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from rich.progress import MofNCompleteColumn, Progress


@contextmanager
def in_words() -> Iterator[None]:
    """A user's mistake ends the command with its sentence, without the stack that led there."""
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        raise SystemExit(f"{error}") from error


def parser_of(name: str, description: str) -> argparse.ArgumentParser:
    """Of `python -m tools.NAME`; its help is the module's docstring, as it stands there."""
    formatter = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(
        prog=f"python -m tools.{name}", description=description, formatter_class=formatter, allow_abbrev=False
    )


def bar() -> Progress:
    return Progress(*Progress.get_default_columns(), MofNCompleteColumn())


def usable(device: str) -> torch.device:
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device={device!r} cannot be used here: {str(error).splitlines()[0]}") from error
