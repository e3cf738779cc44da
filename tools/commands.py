"""What the commands of this folder have in common."""

from collections.abc import Iterator
from contextlib import contextmanager

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
