"""What the commands of this folder have in common."""

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


def bar() -> Progress:
    return Progress(*Progress.get_default_columns(), MofNCompleteColumn())


def usable(device: str) -> torch.device:
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device={device!r} cannot be used here: {str(error).splitlines()[0]}") from error
