"""Ends of programs: one line for errors that the user or the machine caused, a traceback for bugs of this library."""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning.utilities import rank_zero_only

EXPLAINED = (ValueError, OSError, ImportError, FloatingPointError, MemoryError, MisconfigurationException)
NO_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")  # in messages of PyTorch's RuntimeError
LOST_WORKER = "DataLoader worker"  # likewise
SHOW_STACK = "SELF_SUPERVISED_TRACEBACK"  # environment variable
INTERRUPTED = 128 + signal.SIGINT  # exit status


@contextmanager
def one_line_errors(*others: type[Exception]) -> Iterator[None]:
    """Decorator or context manager for `main` that prints an explained error as one line and exits with status 1.

    Ctrl-C exits with status 130. All other exceptions keep their traceback, and with the environment variable
    SELF_SUPERVISED_TRACEBACK=1, explained errors keep it, too. The log.txt of a run always has it (run_folder.logged).

    Args:
        others: more exceptions whose messages explain the error.
    """
    try:
        yield
        sys.stdout.flush()
    except KeyboardInterrupt:
        end("stopped by Ctrl-C", INTERRUPTED)
    except SystemExit as error:
        if isinstance(error.__context__, KeyboardInterrupt):  # Lightning exits with status 1 after Ctrl-C
            end("stopped by Ctrl-C", INTERRUPTED)
        raise
    except BrokenPipeError:  # the reader of our output, such as `head`, has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except Exception as error:
        if os.environ.get(SHOW_STACK) or not (isinstance(error, (*EXPLAINED, *others)) or is_explained(error)):
            raise
        raise SystemExit(f"error: {message_of(error)}" if prints_errors() else 1) from error


def end(message: str, status: int) -> None:
    if prints_errors():
        print(f"error: {message}", file=sys.stderr)
    raise SystemExit(status) from None


def prints_errors() -> bool:
    """Return whether this process prints its error. Before the process group exists, all processes fail with the same
    error, and only the first prints it."""
    return rank_zero_only.rank == 0 or (dist.is_available() and dist.is_initialized())


def is_explained(error: Exception) -> bool:
    """Return whether a RuntimeError of PyTorch is caused by the machine."""
    return isinstance(error, RuntimeError) and (is_out_of_memory(error) or LOST_WORKER in str(error))


def is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError) or any(text in str(error).lower() for text in NO_MEMORY)


def message_of(error: Exception) -> str:
    """Return the message and notes of an error in one line."""
    if is_out_of_memory(error):
        found = str(error).split(". ")[0] or type(error).__name__
        lines = [f"out of memory ({found}). Choose a smaller batch_size, encoder or image size."]
    else:
        lines = [str(error) or type(error).__name__]
    return " ".join("; ".join([*lines, *getattr(error, "__notes__", [])]).split())
