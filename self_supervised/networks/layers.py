"""The parts of an encoder: in stages, for learning rates that differ between them; and their train and eval modes."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

Parameters = dict[str, nn.Parameter]  # by their names in the encoder
FEWEST = 4  # stages, of an encoder that can be divided so often


@contextmanager
def in_eval_mode(module: nn.Module) -> Iterator[None]:
    """Put all parts into eval mode meanwhile."""
    with modes_kept(module):
        module.eval()
        yield


@contextmanager
def modes_kept(module: nn.Module) -> Iterator[None]:
    """Put each part into its earlier mode afterwards: a frozen stem stays in eval mode."""
    modes = {part: part.training for part in module.modules()}
    try:
        yield
    finally:
        for part, mode in modes.items():
            part.training = mode


def stages(encoder: nn.Module) -> dict[str, Parameters]:
    """The encoder's parameters in stages from input to output, each under the name of the module that it begins with.

    The stages are the encoder's children, in the order of their definition. While there are fewer than four, the
    largest of them is opened, and its children count instead: a ResNet has its stem and layer1 to layer4, a vision
    transformer its patch embedding and every block. A part that has only vectors (a norm) belongs to the stage before
    it; parameters of what was opened (class token, position embedding) belong to the first stage.
    """
    parts = [("", encoder)]
    while len(found := joined_parts(parts)) < FEWEST and (
        openable := [part for part in parts if can_be_opened(part[1])]
    ):
        name, module = largest = max(openable, key=lambda part: size(part[1]))
        at = parts.index(largest)
        parts[at : at + 1] = [(f"{name}.{child}".lstrip("."), part) for child, part in module.named_children()]
    in_parts = {name for stage in found.values() for name in stage}
    rest = {name: parameter for name, parameter in encoder.named_parameters() if name not in in_parts}
    first = next(iter(found), "")
    return {**found, first: {**rest, **found.get(first, {})}}


def joined_parts(parts: list[tuple[str, nn.Module]]) -> dict[str, Parameters]:
    """Parts that have parameters, vectors with the part before them. What two parts share is the first one's."""
    found, seen = {}, set()
    for name, module in parts:
        own = {f"{name}.{leaf}".lstrip("."): p for leaf, p in module.named_parameters() if id(p) not in seen}
        seen |= set(map(id, own.values()))
        if found and all(parameter.ndim < 2 for parameter in own.values()):
            found[next(reversed(found))] |= own
        elif own:
            found[name] = own
    return found


def size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def can_be_opened(module: nn.Module) -> bool:
    """Whether it is more than its own parameters: attention, for one, is a whole."""
    return 2 * sum(map(size, module.children())) > size(module)
