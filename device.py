"""Copies to and from the device that do not block; its memory; the precision of what is compared."""

import contextlib
import ctypes
import platform
from collections.abc import Callable

import torch
from torch import Tensor


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """Without waiting for the device, which only copies from pinned memory do not."""
    pinned = values.pin_memory() if device.type == "cuda" and not values.is_cuda else values
    return pinned.to(device, non_blocking=True)


def to_host(values: Tensor) -> Callable[[], Tensor]:
    """Starts the copy; what it returns is called for the values, and waits only if they have not arrived by then."""
    on_host = values.to("cpu", non_blocking=True)
    if not values.is_cuda:
        return lambda: on_host
    copied = torch.cuda.Event()
    copied.record()

    def arrived() -> Tensor:
        copied.synchronize()
        return on_host

    return arrived


def usable(device: str) -> torch.device:
    """Return the device of this name; "auto" is a GPU if there is one. Raises ValueError if it cannot be used here."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        made = torch.zeros(1, device=device)
        made.item()  # "meta" has no values
        return made.device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"device={device!r} cannot be used here: {str(error).splitlines()[0]}") from error


def has_room(size: int, device: torch.device) -> bool:
    """Whether `size` bytes are at most a quarter of a GPU's free memory."""
    return device.type == "cuda" and size <= torch.cuda.mem_get_info(device)[0] / 4


def keep_freed_memory() -> None:
    """Keep the memory that tensors on the CPU free for those of the next step. Otherwise glibc returns every large
    block to the system, which then has to clear its pages anew. Other mallocs are left alone."""
    if platform.libc_ver()[0] == "glibc":
        with contextlib.suppress(OSError, AttributeError):  # another malloc has taken its place
            for option, size in ((M_MMAP_THRESHOLD, 2**30), (M_TRIM_THRESHOLD, 2**31 - 1)):
                ctypes.CDLL(None).mallopt(option, size)


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
