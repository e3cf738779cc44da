"""Activations of an encoder's blocks that are computed again in the backward pass instead of kept in memory: the same
gradients with less memory and one more pass."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

LISTS = (nn.Sequential, nn.ModuleList)


def recompute_activations(encoder: nn.Module) -> None:
    """Change an encoder in place so that only the inputs of its blocks are kept for the backward pass.

    Raises:
        ValueError: the encoder has no blocks, as residual networks and transformers have.
    """
    found = blocks(encoder)
    if not found:
        raise ValueError(
            f"activation_checkpointing=True: {type(encoder).__name__} has no list of blocks whose activations could be "
            "computed again. Leave it False, and choose micro_batch_size to save memory"
        )
    for block in found:
        block.forward = partial(_recomputed, block)  # type: ignore[method-assign]


def blocks(network: nn.Module) -> list[nn.Module]:
    """Return the modules of a network that follow each other in lists: the residual blocks of a ResNet, the layers of a
    transformer. A stage, which has such a list itself, counts by its own blocks."""
    found: list[nn.Module] = []
    for module in network.children():
        listed = isinstance(network, LISTS) and not isinstance(module, LISTS) and not is_plain(module)
        found += [module] if listed and not is_stage(module) else blocks(module)
    return found


def is_plain(module: nn.Module) -> bool:
    """Return whether it is one layer, or layers that follow each other."""
    children = list(module.children())
    return not children or (isinstance(module, LISTS) and all(map(is_plain, children)))


def is_stage(module: nn.Module) -> bool:
    """Return whether it has a list of at least two blocks of one kind."""
    for part in module.children():
        kinds = [type(block) for block in part.children() if not is_plain(block)] if isinstance(part, LISTS) else []
        if len(kinds) > len(set(kinds)):
            return True
    return False


def _recomputed(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """forward(*args, **kwargs) of a block; `block` is an argument so that a copy of the block has its own."""
    forward = partial(type(block).forward, block)
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    contexts = lambda: (nullcontext(), buffers_kept(block))  # noqa: E731
    return checkpoint(forward, *args, use_reentrant=False, context_fn=contexts, **kwargs)


@contextmanager
def buffers_kept(block: nn.Module) -> Iterator[None]:
    """Restore all buffers at the end: the running statistics of batch norm have seen these images already."""
    before = {buffer: buffer.clone() for buffer in block.buffers()}
    try:
        yield
    finally:
        for buffer, value in before.items():
            buffer.data.copy_(value)  # .data: the backward pass holds the buffer, but does not read it
