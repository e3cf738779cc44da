"""The lagging pair: a slow copy of encoder and projection, never trained (https://arxiv.org/abs/1911.05722)."""

import copy

import torch
from torch import nn


def frozen_copy(module: nn.Module) -> nn.Module:
    return copy.deepcopy(module).requires_grad_(False)


@torch.no_grad()
def move_towards(target: nn.Module, source: nn.Module, weight: float) -> None:
    """target <- (1 - weight) target + weight source, parameters only: batch statistics are each network's own."""
    if targets := list(target.parameters()):  # a head of no layers has none
        torch._foreach_lerp_(targets, list(source.parameters()), weight)
