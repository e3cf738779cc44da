"""The only file that knows there may be several processes. Without a process group everything here is the identity.

W processes, N images on each. Every function that communicates must be called by all processes.
"""

import contextlib
import ctypes
import os
import platform
from collections.abc import Callable
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler


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


# ---- processes: without a process group everything here is the identity ----


Result = TypeVar("Result")
RANKS = ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK")  # of launchers


def is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank() -> int:
    return dist.get_rank() if is_distributed() else 0


def world_size() -> int:
    return dist.get_world_size() if is_distributed() else 1


def is_first_process() -> bool:
    """Whether this is the first process of a run. Before there is a process group, its launcher's variables say so."""
    return rank() == 0 and not any(int(os.environ.get(name) or 0) for name in RANKS)


class _Gather(torch.autograd.Function):
    """all_gather whose backward sums: each process's loss depends on everybody's rows, and the torch collective
    forgets that (the gradient would come out W times too small, and no error would say so)."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x) for _ in range(world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous().clone()
        dist.all_reduce(gradient)
        return gradient.chunk(world_size())[rank()]


def gather(x: Tensor) -> Tensor:
    """[N, ...] on each process -> [W N, ...] on every process, in the order of ranks, with gradient.

    N must be the same everywhere. DDP averages the gradients of the processes, so a loss that every process computes
    from gathered rows has exactly the gradient of one process with the joined batch.
    """
    return _Gather.apply(x) if is_distributed() else x


def gather_evaluated(x: Tensor, loader: DataLoader) -> Tensor:
    """x [n, ...], results for the samples that `loader` dealt to this process -> those for all samples, each once.

    `DistributedSampler` deals sample i to process i mod W and repeats the first ones until all have equally many:
    interleaving the shares restores the order, cutting at the size of the set drops the repeated ones. Any other
    sampler gives every process all samples, so that there is nothing to gather.
    """
    if not is_distributed() or not isinstance(getattr(loader, "sampler", None), DistributedSampler):
        return x
    with torch.no_grad():
        in_order = gather(x).unflatten(0, (world_size(), -1)).transpose(0, 1).flatten(0, 1)
    return in_order[: len(loader.dataset)]


def shuffled(encode: Callable[[Tensor], Tensor], x: Tensor, seed: tuple[int, ...], n_virtual_devices: int) -> Tensor:
    """encode(x), but every image shares its batch statistics with randomly chosen others (MoCo's shuffled batch norm).

    On W processes every process shuffles its images and deals them out evenly, so that of the N images which share
    their statistics no more than N / W (rounded up) also shared them as queries. On one process the shuffled batch is
    encoded in `n_virtual_devices` separate parts. Source: MoCo (https://arxiv.org/abs/1911.05722), section 3.3.

    Args:
        encode: [n, ...] -> [n, D]; called without gradient by the caller.
        x: images of this process [N, ...].
        seed: the same on every process, so that all draw the same permutation.
    """
    images = gather(x)
    of_each = np.arange(len(images)).reshape(world_size(), -1)
    order = np.random.default_rng(seed).permuted(of_each, axis=1).T.ravel()  # one of each process, again and again
    order = to_device(torch.from_numpy(order), x.device)
    if is_distributed():
        keys = gather(encode(images[order.chunk(world_size())[rank()]]))
    else:
        n_parts = max(1, min(n_virtual_devices, len(images) // 2))  # one image alone has no batch statistics
        keys = torch.cat([encode(part) for part in images[order].tensor_split(n_parts)])
    restored = torch.empty_like(keys)
    restored[order] = keys
    return restored.chunk(world_size())[rank()]


def any_process(flag: bool, device: torch.device | str = "cpu") -> bool:
    """Whether the flag is set on any process: the same answer on all of them."""
    return ask_all(flag, device)()


def ask_all(flag: bool, device: torch.device | str = "cpu") -> Callable[[], bool]:
    """any_process, whose answer may be fetched later, when nobody has to wait for it any more."""
    if not is_distributed():
        return lambda: flag
    answers = to_host(gather(torch.full((1,), flag, device=device)))
    return lambda: bool(answers().any())


def from_rank_zero(x: Tensor) -> Tensor:
    """The first process's x."""
    if is_distributed():
        x = x.contiguous()
        dist.broadcast(x, src=0)
    return x


def on_rank_zero(compute: Callable[[], Result]) -> Result:
    """compute() on the first process only; every process gets its result."""
    result = [compute() if rank() == 0 else None]
    if is_distributed():
        dist.broadcast_object_list(result, src=0)
    return result[0]
