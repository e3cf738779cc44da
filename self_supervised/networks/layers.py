"""Parts of an encoder: their train and eval modes, and groups of layers with learning rates of their own."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

Parameters = dict[str, nn.Parameter]  # name in the encoder -> parameter
FEWEST_GROUPS = 4  # if the encoder can be divided into that many


def refuse_no_module(encoder: Any) -> None:
    """Raise ValueError for an `encoder` of the user that is not a module, such as a name or a class."""
    if encoder is not None and not isinstance(encoder, nn.Module):
        raise ValueError(
            f"encoder={encoder!r} is not a module. Pass an object of nn.Module, or a name as encoder_arch."
        )


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
    """Put each part of a copy into the mode of the part from which it was copied."""
    for part, copied in zip(source.modules(), target.modules(), strict=True):
        copied.training = part.training


def layer_groups(encoder: nn.Module) -> dict[str, Parameters]:
    """Return the encoder's parameters in groups from input to output, by the name of each group's first module.

    The groups are the encoder's children, in the order of their definition. While there are fewer than FEWEST_GROUPS,
    the largest child is replaced by its own children: a ResNet is divided into its stem and layer1 to layer4, a vision
    transformer into its patch embedding and every block. A part that has only vectors (a norm) belongs to the group
    before it; parameters of a replaced module itself (class token, position embedding) belong to the first group.
    """
    parts = [("", encoder)]
    while len(found := joined_parts(parts)) < FEWEST_GROUPS and (
        openable := [part for part in parts if can_be_opened(part[1])]
    ):
        largest = max(openable, key=lambda part: n_parameters(part[1]))
        name, module = largest
        at = parts.index(largest)
        parts[at : at + 1] = [(f"{name}.{child}".lstrip("."), part) for child, part in module.named_children()]
    grouped = {name for group in found.values() for name in group}
    rest = {name: parameter for name, parameter in encoder.named_parameters() if name not in grouped}
    first = next(iter(found), "")
    return {**found, first: {**rest, **found.get(first, {})}}


def joined_parts(parts: list[tuple[str, nn.Module]]) -> dict[str, Parameters]:
    """Return the parameters of each part that has any. Parts of vectors only join the part before them, and parameters
    that two parts share belong to the first."""
    found = {}
    seen = set()
    for name, module in parts:
        own = {f"{name}.{leaf}".lstrip("."): p for leaf, p in module.named_parameters() if id(p) not in seen}
        seen |= set(map(id, own.values()))
        if found and all(parameter.ndim < 2 for parameter in own.values()):
            found[next(reversed(found))] |= own
        elif own:
            found[name] = own
    return found


def n_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def requires_gradient(module: nn.Module) -> bool:
    """Return whether any weight of the module is trained."""
    return any(weight.requires_grad for weight in module.parameters())


def can_be_opened(module: nn.Module) -> bool:
    """Return whether at least half of the parameters are those of children. Attention, for example, stays whole."""
    return 2 * sum(map(n_parameters, module.children())) > n_parameters(module)
