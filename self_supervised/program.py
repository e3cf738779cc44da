"""What programs print: warnings and errors that the user or the machine caused as one line, a traceback for bugs of
this library, and nothing that is not about the run. At the end: a progress bar, and names in one line or a picture."""

import logging
import os
import re
import signal
import sys
import unicodedata
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning.utilities import rank_zero_only
from rich.progress import MofNCompleteColumn, Progress

EXPLAINED = (ValueError, OSError, ImportError, FloatingPointError, MemoryError, MisconfigurationException)
NO_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")  # in messages of PyTorch's RuntimeError
LOST_WORKER = "DataLoader worker"  # likewise
# likewise, for a process of the training that is gone: of gloo, of NCCL, and of the store at which processes meet
LOST_PROCESS = ("by peer", "Broken pipe", "Timed out waiting", "ncclRemoteError", "failed to recv, got 0 bytes")
SHOW_STACK = "SELF_SUPERVISED_TRACEBACK"  # environment variable
INTERRUPTED, TERMINATED = 128 + signal.SIGINT, 128 + signal.SIGTERM  # exit status
LIGHTNING = ("pytorch_lightning", "lightning_fabric")  # names of its loggers
# parts of messages that say nothing about the run; log.txt keeps them
NOISE = (
    "\N{ELECTRIC LIGHT BULB} Tip: ",  # advertises a package
    "GPU available: False",
    "TPU available: False",
    "stopped: `max_epochs=",  # as requested; other reasons to stop are shown
    "LeafSpec",  # how Lightning calls PyTorch
    "sync_dist=True",  # advice to the author of a LightningModule
    "batch will be used.",  # of --limit_val_batches 1, and of a dry run
    "worker processes in total",  # num_data_workers is a setting, which the help explains
    "across ranks is zero",  # no loaders for validation: evaluations=[]
)


@contextmanager
def one_line_errors(*others: type[Exception]) -> Iterator[None]:
    """Decorator or context manager for `main` that prints warnings as one line each, and an explained error as one line
    before it exits with status 1.

    Ctrl-C exits with status 130. All other exceptions keep their traceback, and with the environment variable
    SELF_SUPERVISED_TRACEBACK=1, explained errors keep it, too. The log.txt of a run always has it (run_folder.logged).

    Args:
        others: more exceptions whose messages explain the error.
    """
    try:
        with quiet_terminal():
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
        if os.environ.get(SHOW_STACK) or not (isinstance(error, (*EXPLAINED, *others)) or is_machine_error(error)):
            raise
        raise SystemExit(f"error: {message_of(error)}" if prints_errors() else 1) from error


@contextmanager
def quiet_terminal() -> Iterator[None]:
    """Print each warning as one line without its place in the code, and neither warnings nor messages of Lightning that
    are NOISE. What `run_folder.logged` writes does not change."""
    earlier_format = warnings.formatwarning
    handlers = [handler for name in LIGHTNING for handler in logging.getLogger(name).handlers]
    warnings.formatwarning = warning_line
    for handler in handlers:
        handler.addFilter(is_about_the_run)
    try:
        yield
    finally:
        warnings.formatwarning = earlier_format
        for handler in handlers:
            handler.removeFilter(is_about_the_run)


def warning_line(message: Warning | str, *_: Any, **__: Any) -> str:
    """Return a warning as the line to print, "" if it is NOISE."""
    line = " ".join(str(message).split())
    return "" if any(noise in line for noise in NOISE) else f"warning: {line}\n"


def is_about_the_run(record: logging.LogRecord) -> bool:
    return not any(noise in record.getMessage() for noise in NOISE)


def end(message: str, status: int) -> None:
    if prints_errors():
        print(f"error: {message}", file=sys.stderr)
    raise SystemExit(status) from None


def prints_errors() -> bool:
    """Return whether this process prints its error. Before the process group exists, all processes fail with the same
    error, and only the first prints it."""
    return rank_zero_only.rank == 0 or (dist.is_available() and dist.is_initialized())


def is_machine_error(error: Exception) -> bool:
    """Return whether a RuntimeError of PyTorch is caused by the machine."""
    return isinstance(error, RuntimeError) and (
        is_out_of_memory(error) or LOST_WORKER in str(error) or lost_a_process(error)
    )


def lost_a_process(error: Exception) -> bool:
    return isinstance(error, RuntimeError) and any(text in str(error) for text in LOST_PROCESS)


def is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError) or any(text in str(error).lower() for text in NO_MEMORY)


def message_of(error: Exception) -> str:
    """Return the message and notes of an error in one line."""
    if is_out_of_memory(error):
        reason = str(error).split(". ")[0] or type(error).__name__
        lines = [f"out of memory ({reason}). Choose a smaller batch_size, encoder or image size."]
    elif lost_a_process(error):
        lines = [f"another process of this training has ended, see its own output ({str(error).split('. ')[0]})"]
    else:
        text = str(error)
        if text.startswith("Caught ") and LOST_WORKER in text:  # PyTorch adds the traceback of the worker
            text = re.split(rf"^(?:[\w.]+\.)?{type(error).__name__}: ", text, flags=re.MULTILINE)[-1]
        lines = [text or type(error).__name__]
    return " ".join("; ".join([*lines, *getattr(error, "__notes__", [])]).split())


# ---- Progress bar, names ----


def bar() -> Progress:
    """Return a progress bar that also counts its steps."""
    return Progress(*Progress.get_default_columns(), MofNCompleteColumn())


def in_one_line(name: str) -> str:
    """Return the name of a class, run or file without line breaks, and with a replacement character for everything that
    no font has: control characters, and bytes of a file name that are not text."""
    shown = " ".join(name.split())
    return "".join("\ufffd" if unicodedata.category(one) in ("Cc", "Cs") else one for one in shown)


def label(name: str, longest: int = 160) -> str:
    """Return a name as a label for matplotlib, which reads text between dollar signs as a formula and omits names with
    a leading underscore from legends."""
    shown = in_one_line(name)
    shown = (shown if len(shown) <= longest else f"{shown[: longest - 1]}…").replace("$", r"\$")
    return f" {shown}" if shown.startswith("_") else shown
