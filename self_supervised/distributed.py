"""Devices and processes: copies to and from a device, and communication between W processes with N images each.

Only this module communicates, and knows that process r has rows r, W + r, 2 W + r, ... of a joined batch, as
`DistributedSampler` deals them. Without a process group, every function that communicates is the identity; with one,
all processes must call it.
"""

import atexit
import contextlib
import ctypes
import os
import platform
from collections.abc import Callable, Iterable
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist
from pytorch_lightning.utilities import rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset

M_TRIM_THRESHOLD = -1  # malloc.h
M_MMAP_THRESHOLD = -3
RANKS = ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK")  # set by launchers
Result = TypeVar("Result")


# ---- Devices ----


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """Return a copy on the device. The host does not wait for a copy to a CUDA device, which requires pinned memory."""
    pinned = values.pin_memory() if device.type == "cuda" and not values.is_cuda else values
    return pinned.to(device, non_blocking=device.type == "cuda")  # MPS may read what is freed by then


def to_host(values: Tensor) -> Callable[[], Tensor]:
    """Start a copy to the host, and return a function that returns the copy and waits only if it is not complete."""
    on_host = values.to("cpu", non_blocking=values.is_cuda)
    if not values.is_cuda:
        return lambda: on_host
    copied = torch.cuda.Event()
    copied.record()

    def arrived() -> Tensor:
        copied.synchronize()
        return on_host

    return arrived


def usable_device(device: str) -> torch.device:
    """Return the device of this name, or for "auto" a GPU if there is one.

    Raises:
        ValueError: the device cannot be used on this machine.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        made = torch.zeros(1, device=device)
        made.item()  # "meta" has no values
        return made.device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"device={device!r}: cannot be used on this machine. {str(error).splitlines()[0]}") from error


def has_room(size: int, device: torch.device) -> bool:
    """Return whether `size` bytes are at most a quarter of a GPU's free memory."""
    return device.type == "cuda" and size <= torch.cuda.mem_get_info(device)[0] / 4


def keep_freed_memory(largest: int = 2**30) -> None:
    """Make glibc keep the memory of freed CPU tensors for those of the next step. By default, glibc returns every large
    block to the system, which then has to clear its pages again. Other allocators are not changed.

    Args:
        largest: bytes of the largest block that is kept. What is kept breaks into pieces that larger ones cannot use.
    """
    if platform.libc_ver()[0] == "glibc":
        with contextlib.suppress(OSError, AttributeError):  # another allocator replaces that of glibc
            for option, size in ((M_MMAP_THRESHOLD, largest), (M_TRIM_THRESHOLD, 2**31 - 1)):
                ctypes.CDLL(None).mallopt(option, size)


# ---- Processes ----


def is_distributed() -> bool:
    """Return whether there are at least two processes in the process group."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def torchrun_layout() -> tuple[int, int] | None:
    """Return (processes of each node, nodes) as torchrun started them this time, or None without torchrun.

    Raises:
        ValueError: the nodes have different numbers of processes.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    on_node, everywhere = (int(os.environ[name]) for name in ("LOCAL_WORLD_SIZE", "WORLD_SIZE"))
    if everywhere % on_node:
        raise ValueError(
            f"nproc_per_node={on_node} on this node, but {everywhere} processes in all. Start as many on each."
        )
    return on_node, everywhere // on_node


def is_elastic() -> bool:
    """Return whether torchrun starts processes again that ended with an error (`--max_restarts`)."""
    return torchrun_layout() is not None and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) > 0


def refuse_sharding(strategy: str) -> None:
    """Raise ValueError for a strategy of Lightning, given by its name or class name, that divides weights among
    processes."""
    if any(name in strategy.lower() for name in ("fsdp", "deepspeed", "modelparallel")):
        raise ValueError(
            f"strategy={strategy!r} divides the weights among the processes, but the lagging model, LARS and our "
            "checkpoints need whole ones. Use strategy='ddp', with activation_checkpointing=True and micro_batch_size "
            "to save memory."
        )


def end_group_at_exit() -> None:
    """Destroy the process group when the program exits, before Python is torn down. Lightning does so for NCCL only; a
    gloo group whose threads still run at that time can abort a program that has finished."""
    if is_distributed():
        atexit.unregister(_end_group)  # once, however many trainings there are
        atexit.register(_end_group)


def _end_group() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if is_distributed() else 0


def world_size() -> int:
    return dist.get_world_size() if is_distributed() else 1


def is_first_process() -> bool:
    """Return whether this is the first process of a run: by its launcher's variables before a process group exists."""
    return rank() == 0 and not any(int(os.environ.get(name) or 0) for name in RANKS)


class _Gather(torch.autograd.Function):
    """All-gather whose backward pass sums the gradients of all processes, because the loss of each process depends on
    the rows of all. `torch.distributed.all_gather` has no gradient."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x) for _ in range(world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.stack(parts, dim=1).flatten(0, 1)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous().clone()
        dist.all_reduce(gradient)
        return own_rows(gradient)


def gather(x: Tensor) -> Tensor:
    """Return the rows of all processes in the order of one process, with gradient: [N, ...] -> [W N, ...].

    Row n of process r is row n W + r, as `DistributedSampler` deals images. N must be the same on all processes. DDP
    averages the gradients of the processes, so a loss that every process computes from gathered rows has exactly the
    gradient of one process with the joined batch.
    """
    return _Gather.apply(x) if is_distributed() else x


def gather_each(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Return gather(x) of each tensor [N, ...], all of one shape, in one communication."""
    if not tensors or not is_distributed():
        return tensors
    return gather(torch.stack(tensors, dim=1)).unbind(1)


def average_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Replace gradients by their means over all processes, as DDP does."""
    for parameter in parameters if is_distributed() else ():
        if parameter.grad is not None:
            dist.all_reduce(parameter.grad)
            parameter.grad /= world_size()


def own_rows(joined: Tensor) -> Tensor:
    """Return this process's rows of a joined batch: [W N, ...] -> [N, ...]."""
    return joined[rank() :: world_size()]


def positions(first: int, n: int) -> np.ndarray:
    """Return the places, in a joined batch or epoch, of the rows `first` to `first + n - 1` of this process."""
    return (first + np.arange(n)) * world_size() + rank()


def gather_evaluated(x: Tensor, loader: DataLoader) -> Tensor:
    """Return the results for all samples, each once, from x [n, ...] for the samples of `loader` on this process.

    `DistributedSampler` repeats the first samples until all processes have equally many; they are dropped here. Any
    other sampler gives every process all samples, so there is nothing to gather. An `IterableDataset` may give a part,
    or all, which cannot be told apart.
    """
    if world_size() > 1 and isinstance(getattr(loader, "dataset", None), IterableDataset):
        rank_zero_warn(
            "each process scores the samples that it reads from an IterableDataset, and they are not gathered. Let "
            "each read all of them"
        )
    samplers = (getattr(loader, "sampler", None), getattr(getattr(loader, "batch_sampler", None), "sampler", None))
    sampler = next((one for one in samplers if isinstance(one, DistributedSampler)), None)
    if sampler is None or sampler.num_replicas != world_size():
        return x
    with torch.no_grad():
        return gather(x)[: len(sampler.dataset)]


def shuffled(encode: Callable[[Tensor], Tensor], x: Tensor, seed: tuple[int, ...], n_virtual_devices: int) -> Tensor:
    """Return encode(x) with shuffled batch norm: every image shares its batch statistics with randomly chosen others.

    Each of W processes shuffles its images and distributes them evenly over all processes. Of the N images that share
    their statistics as keys, at most N / W (rounded up) also share them as queries. One process encodes the shuffled
    batch in `n_virtual_devices` separate parts, as so many processes would if they divide the batch. Source: MoCo
    (https://arxiv.org/abs/1911.05722), section 3.3.

    Args:
        encode: function [n, ...] -> [n, D]. The caller disables gradients.
        x: images of this process [N, ...].
        seed: the same on every process, so that all draw the same permutation.
    """
    images = gather(x)
    n_parts = world_size() if is_distributed() else max(1, min(n_virtual_devices, len(images) // 2))  # a part needs two
    rng, order = np.random.default_rng(seed), np.arange(len(images))
    if len(images) % n_parts:
        order = rng.permutation(order)
    else:  # one image of each process in turn
        order = rng.permuted(order.reshape(-1, n_parts).T, axis=1).T.ravel()
    parts = [to_device(torch.from_numpy(part), x.device) for part in np.array_split(order, n_parts)]
    if is_distributed():
        keys, order = gather(encode(images[parts[rank()]])), torch.stack(parts, dim=1).flatten()
    else:
        keys, order = torch.cat([encode(images[part]) for part in parts]), torch.cat(parts)
    restored = torch.empty_like(keys)
    restored[order] = keys
    return own_rows(restored)


def any_process(flag: bool, device: torch.device | str = "cpu") -> bool:
    """Return whether the flag is set on any process: the same answer on all processes."""
    return any_process_later(flag, device)()


def any_process_later(flag: bool, device: torch.device | str = "cpu") -> Callable[[], bool]:
    """Return a function that returns the answer of `any_process`. Called later, it does not wait for the device."""
    if not is_distributed():
        return lambda: flag
    if dist.get_backend() == "nccl":  # which takes no tensor of the CPU
        device = torch.device("cuda", torch.cuda.current_device())
    answers = to_host(gather(torch.full((1,), flag, device=device)))
    return lambda: bool(answers().any())


def from_rank_zero(x: Tensor) -> Tensor:
    """Return the first process's x on every process."""
    if is_distributed():
        x = x.contiguous()
        dist.broadcast(x, src=0)
    return x


def share_buffers(*modules: torch.nn.Module | None) -> None:
    """Give all processes the first one's buffers, such as running statistics, in place. DDP does so in its forward pass
    alone, and not at all while gradients are accumulated."""
    for module in modules:
        for buffer in () if module is None else module.buffers():
            buffer.copy_(from_rank_zero(buffer))


def on_rank_zero(compute: Callable[[], Result]) -> Result:
    """Return compute() of the first process on every process. Only the first process computes it."""
    result = [compute() if rank() == 0 else None]
    if is_distributed():
        dist.broadcast_object_list(result, src=0)
    return result[0]
