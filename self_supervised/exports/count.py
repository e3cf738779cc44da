"""Parameter and FLOP counts of each part of an encoder, and of the heads in its checkpoint."""

from pathlib import Path

import torch
from attrs import frozen
from rich.table import Table
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from self_supervised.exports.conversions import plain_model
from self_supervised.networks.frozen_encoder import Encoder
from self_supervised.networks.modules import n_parameters
from self_supervised.training import checkpoints

SPLIT_ABOVE = 0.9  # fraction of the parent's parameters; a part with more is listed by its own parts
STEM = ("conv1", "bn1")  # ResNet
HEAD_MODULES = ("projection_model", "prediction_model", "classifier")


@frozen
class Part:
    name: str
    parameters: int
    flops: int  # for one image; a multiply-add counts as two


def paths(module: nn.Module, prefix: str = "") -> list[str]:
    """Return the paths of the parts with parameters, in order."""
    part_paths = []
    whole = n_parameters(module)
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        size = n_parameters(child)
        inner = paths(child, f"{path}.") if size > SPLIT_ABOVE * whole else []
        part_paths += inner or ([path] if size else [])
    return part_paths


def count_parts(encoder: Encoder) -> list[Part]:
    """Return the counts of the encoder's parts, for one image of its size.

    FLOPs are counted as in papers: convolutions and matrix products, padding included, without norms and activations.
    Many papers report half of this number (multiply-adds).
    """
    model = plain_model(encoder).to("meta")
    image = torch.zeros(1, *encoder.params.input_shape, device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(image)
    flops = {name: sum(by_operation.values()) for name, by_operation in counter.get_flop_counts().items()}
    parts: dict[str, Part] = {}
    for path in paths(model):
        name = "stem" if path in STEM else path
        before = parts.get(name, Part(name, 0, 0))
        size = n_parameters(model.get_submodule(path))
        own_flops = flops.get(f"{type(model).__name__}.{path}", 0)
        parts[name] = Part(name, before.parameters + size, before.flops + own_flops)
    rest = n_parameters(model) - sum(part.parameters for part in parts.values())
    rest_flops = counter.get_total_flops() - sum(part.flops for part in parts.values())
    return [*parts.values(), *([Part("rest", rest, rest_flops)] if rest or rest_flops else [])]


def heads(state: dict[str, Tensor]) -> list[Part]:
    """Return the counts of the heads in a checkpoint of this library: MLPs, which use each weight once per image."""
    parts = []
    for head in HEAD_MODULES:
        tensors = [v for k, v in state.items() if k.startswith(f"{head}.") and k.endswith((".weight", ".bias"))]
        if tensors:
            flops = sum(2 * tensor.numel() for tensor in tensors if tensor.dim() == 2)
            parts.append(Part(head, sum(tensor.numel() for tensor in tensors), flops))
    return parts


def cost_table(encoder: Encoder, checkpoint: str | Path) -> Table:
    """Return a table of the encoder's parts, their sum and, below it, the heads."""
    p = encoder.params
    size = " x ".join(map(str, p.input_shape))
    table = Table(
        "part",
        title=f"{p.encoder_arch}, one {'clip' if p.dataset.of_videos else 'image'} of {size}",
        caption="FLOPs: a multiply-add counts as two",
    )
    for column in ("parameters", "FLOPs"):
        table.add_column(column, justify="right")
    parts = count_parts(encoder)
    total = Part("encoder", sum(part.parameters for part in parts), sum(part.flops for part in parts))
    ours = encoder.report.layout.startswith("self_supervised")
    has_heads = ours and any(key.split(".")[0] in HEAD_MODULES for key in encoder.report.left_out)
    for part in parts:
        table.add_row(part.name, f"{part.parameters:,}", f"{part.flops:,}")
    table.add_section()
    for part in [total, *(heads(checkpoints.read_checkpoint(checkpoint)["state_dict"]) if has_heads else [])]:
        table.add_row(part.name, f"{part.parameters:,}", f"{part.flops:,}")
    return table
