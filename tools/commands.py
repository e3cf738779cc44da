"""What the commands of this folder have in common."""

import argparse
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import attrs
import torch
from rich.progress import MofNCompleteColumn, Progress

from command_line import reader
from shared_params import EncoderAndDataParams


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


def add_fields(parser: argparse._ArgumentGroup, names: Iterable[str]) -> None:
    """Options for fields of EncoderAndDataParams, read as train.py reads them; none is there that was not given."""
    fields = attrs.fields_dict(EncoderAndDataParams)
    for name in names:
        parser.add_argument(f"--{name}", type=reader(fields[name].type), default=argparse.SUPPRESS, metavar="VALUE")
