"""Activations of an encoder's blocks that are computed again in the backward pass instead of kept in memory: the same
gradients with less memory and one more pass."""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

LISTS = (nn.Sequential, nn.ModuleList)


def recompute_activations(encoder: nn.Module) -> None:
    """Change an encoder in place so that only the inputs of its blocks are kept for the backward pass.

    Raises:
        ValueError: the encoder has no blocks, as residual networks and transformers have.
    """
    encoder_blocks = blocks(encoder)
    if not encoder_blocks:
        raise ValueError(
            f"activation_checkpointing=True: {type(encoder).__name__} has no list of blocks whose activations could be "
            "computed again. Leave it False, and choose micro_batch_size to save memory."
        )
    for block in encoder_blocks:
        own_forward = vars(block).get("forward")
        block.forward = partial(_recomputed, block, own_forward)  # type: ignore[method-assign]


def blocks(network: nn.Module) -> list[nn.Module]:
    """Return the modules of a network that follow each other in lists: the residual blocks of a ResNet, the layers of a
    transformer. A stage, which has such a list itself, counts by its own blocks."""
    modules: list[nn.Module] = []
    for module in network.children():
        listed = isinstance(network, LISTS) and not isinstance(module, LISTS) and not is_plain(module)
        modules += [module] if listed and not is_stage(module) else blocks(module)
    return modules


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


def _recomputed(block: nn.Module, own_forward: Callable | None, *args: Any, **kwargs: Any) -> Any:
    """forward(*args, **kwargs) of a block; `block` is an argument so that a copy of the block has its own.

    Args:
        own_forward: the block's `forward` if it was set on the block itself, not by its class.
    """
    forward = own_forward or partial(type(block).forward, block)
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return forward(*args, **kwargs)
    before = buffers_of(block)
    contexts = lambda: (nullcontext(), Rewound(block, before))  # noqa: E731
    return checkpoint(forward, *args, use_reentrant=False, context_fn=contexts, **kwargs)


Buffers = list[tuple[dict, str, Tensor, Tensor]]  # (buffers of a module, name, buffer, copy)


def buffers_of(block: nn.Module) -> Buffers:
    named = ((module._buffers, name) for module in block.modules() for name in module._buffers)
    return [(of_module, name, x, x.clone()) for of_module, name in named if (x := of_module[name]) is not None]


def put_back(buffers: Buffers) -> None:
    """Give buffers their earlier values, also those that were replaced by other tensors."""
    for of_module, name, buffer, value in buffers:
        of_module[name] = buffer
        buffer.data.copy_(value)  # .data: autograd holds the buffer, whose values the backward pass does not read


class Rewound:
    """Context of a second pass: buffers, such as the running statistics of batch norm, have the values that they had
    before the first pass, and afterwards their present ones again."""

    def __init__(self, block: nn.Module, before: Buffers):
        self.block, self.before = block, before

    def __enter__(self) -> None:
        self.present = buffers_of(self.block)
        put_back(self.before)

    def __exit__(self, *_: object) -> None:
        put_back(self.present)
