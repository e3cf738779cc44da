"""Train and eval modes of the parts of a network, and whether they are trained."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

from pytorch_lightning.utilities import rank_zero_info
from torch import nn

REPLACED = (
    "a network was replaced after the method was built, but not its lagging copy. Build the method with the network: "
    "encoder=..., and the fields of the heads."
)


def has_batch_norm(module: nn.Module) -> bool:
    """Return whether a layer computes statistics of a batch."""
    return any(hasattr(layer, "running_mean") for layer in module.modules())


def require_module(encoder: Any) -> None:
    """Raise ValueError for an `encoder` of the user that is not a module, such as a name or a class."""
    if encoder is not None and not isinstance(encoder, nn.Module):
        raise ValueError(
            f"encoder={encoder!r} is not a module. Pass an object of nn.Module, or a name as encoder_arch."
        )


def plain_name(name: str) -> str:
    """Return the name that a parameter has if no network is compiled."""
    return name.replace("_orig_mod.", "")


def rename_as_in(module: nn.Module, tensors: dict[str, Any]) -> None:
    """Give the tensors of a checkpoint their names in `module`. If one of both was compiled, they differ."""
    named = chain(module.named_parameters(remove_duplicate=False), module.named_buffers(remove_duplicate=False))
    own = {plain_name(name): name for name, _ in named}
    for name in list(tensors):
        if (renamed := own.get(plain_name(name), name)) != name:
            tensors[renamed] = tensors.pop(name)


@contextmanager
def in_eval_mode(module: nn.Module) -> Iterator[None]:
    """Put all parts of a module into eval mode within the context."""
    with modes_kept(module):
        module.eval()
        yield


@contextmanager
def modes_kept(module: nn.Module) -> Iterator[None]:
    """Restore after the context the mode of each part, and which weights require a gradient: a frozen stem stays frozen
    and in eval mode."""
    modes = {part: part.training for part in module.modules()}
    trained = [weight for weight in module.parameters() if weight.requires_grad]
    try:
        yield
    finally:
        for weight in trained:
            weight.requires_grad_()
        for part, mode in modes.items():
            part.training = mode


def copy_modes(source: nn.Module, target: nn.Module) -> None:
    """Put each part of a copy into the mode of the part from which it was copied.

    Raises:
        ValueError: they have different numbers of parts, because the source was replaced.
    """
    # the wrapper that torch.compile puts around one of the two is no part
    source_parts, target_parts = ([x for x in net.modules() if not hasattr(x, "_orig_mod")] for net in (source, target))
    if len(source_parts) != len(target_parts):
        raise ValueError(REPLACED)
    for part, copied in zip(source_parts, target_parts, strict=True):
        copied.training = part.training


def n_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def requires_gradient(module: nn.Module) -> bool:
    """Return whether any weight of the module is trained."""
    return any(weight.requires_grad for weight in module.parameters())


def set_modes(encoder: nn.Module, says_if_frozen: bool = True) -> None:
    """Set train and eval mode in the parts of an encoder, as its weights say which are trained.

    If no weight requires a gradient, all of it is put into eval mode, with a warning if `says_if_frozen`. Else an
    encoder in eval mode is put into train mode, which Lightning does not do, and logged; its frozen parts are put into
    eval mode, so that their batch statistics stay; and `is_trained` of an `Encoder` is set.
    """
    if requires_gradient(encoder):
        if hasattr(encoder, "is_trained"):
            encoder.is_trained = True
        if not encoder.training:
            rank_zero_info("the encoder was in eval mode: its parts with trainable weights are put into train mode")
            encoder.train()
        for part in encoder.modules():
            if n_parameters(part) and not requires_gradient(part):
                part.eval()
    elif n_parameters(encoder):
        encoder.eval()
        if says_if_frozen:
            rank_zero_info(
                "warning: no weight of the encoder requires a gradient, so only the heads learn. Call "
                "encoder.requires_grad_() to train it"
            )
