"""How a program ends: one line for what the user or the machine caused, the stack for a fault of this library."""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning.utilities import rank_zero_only

EXPLAINED = (ValueError, OSError, ImportError, FloatingPointError, MemoryError, MisconfigurationException)
NO_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")  # PyTorch raises RuntimeError for these
LOST_WORKER = "DataLoader worker"
SHOW_STACK = "SELF_SUPERVISED_TRACEBACK"  # environment variable
INTERRUPTED = 128 + signal.SIGINT


@contextmanager
def one_line_errors(*others: type[Exception]) -> Iterator[None]:
    """Decorator or context manager around `main`: print an explained error as one line and exit with status 1.

    Ctrl-C exits with status 130. All other exceptions keep their stack. With the environment variable
    SELF_SUPERVISED_TRACEBACK=1, explained ones keep it, too; log.txt of a run has it in any case (run_folder.logged).

    Args:
        others: further exceptions that the program explains.
    """
    try:
        yield
        sys.stdout.flush()
    except KeyboardInterrupt:
        end("stopped by Ctrl-C", INTERRUPTED)
    except SystemExit as error:
        if isinstance(error.__context__, KeyboardInterrupt):  # Lightning makes status 1 of Ctrl-C
            end("stopped by Ctrl-C", INTERRUPTED)
        raise
    except BrokenPipeError:  # the reader of our output, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except Exception as error:
        if os.environ.get(SHOW_STACK) or not (isinstance(error, (*EXPLAINED, *others)) or is_explained(error)):
            raise
        raise SystemExit(f"error: {message_of(error)}" if is_told_here() else 1) from error


def end(message: str, status: int) -> None:
    if is_told_here():
        print(f"error: {message}", file=sys.stderr)
    raise SystemExit(status) from None


def is_told_here() -> bool:
    """Whether this process prints the message. Until processes have met, all fail alike and the first one prints."""
    return rank_zero_only.rank == 0 or (dist.is_available() and dist.is_initialized())


def is_explained(error: Exception) -> bool:
    """Whether a RuntimeError of PyTorch tells of the machine."""
    return isinstance(error, RuntimeError) and (is_of_memory(error) or LOST_WORKER in str(error))


def is_of_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError) or any(text in str(error).lower() for text in NO_MEMORY)


def message_of(error: Exception) -> str:
    """Return the message and notes of an error in one line."""
    if is_of_memory(error):
        found = str(error).split(". ")[0] or type(error).__name__
        lines = [f"out of memory ({found}). Choose a smaller batch_size, or an encoder or image size that needs less"]
    else:
        lines = [str(error) or type(error).__name__]
    return " ".join("; ".join([*lines, *getattr(error, "__notes__", [])]).split())
