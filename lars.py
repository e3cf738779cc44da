"""LARS, and the split of parameters into those that it adapts and those that it does not."""

from collections.abc import Iterable

import torch
from torch import nn


class LARS(torch.optim.Optimizer):
    """SGD with momentum and layer-wise adaptive rate scaling (You et al., https://arxiv.org/abs/1708.03888).

    For each parameter p with gradient g in a group with `adapt=True`:

        g <- g + weight_decay p
        q = eta |p| / |g|, or 1 if one of the norms is 0
        v <- momentum v + q g
        p <- p - lr v

    This is the code of VICReg, Barlow Twins and MoCo v3. Groups with `adapt=False` are updated by plain SGD with
    momentum and their own weight decay. All operations are batched over parameters and never wait for the device.

    Args:
        params: parameters, or groups with the key `adapt` (default: True).
        lr: learning rate.
        momentum: factor of the previous velocity v.
        weight_decay: factor of p that is added to its gradient.
        eta: trust coefficient.
        clip: use min(q / lr, 1) as q, so that the learning rate lr q of a parameter is at most lr (after LARC of
            https://github.com/NVIDIA/apex, parallel/LARC.py). apex and solo-learn divide by |g| + weight_decay |p|
            instead of the norm of the sum.
    """

    def __init__(
        self,
        params,
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        eta: float = 1e-3,
        clip: bool = False,
    ):
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "eta": eta, "adapt": True}
        self.clip = clip  # not an option of groups, because loading a checkpoint replaces those
        super().__init__(params, defaults)

    def __getstate__(self) -> dict:
        return {**super().__getstate__(), "clip": self.clip}  # for copy and pickle

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                self._step_group(group, params)
        return loss

    def _step_group(self, group: dict, params: list[torch.Tensor]) -> None:
        for p in params:
            if not self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        velocities = [self.state[p]["momentum_buffer"] for p in params]
        # This copy is changed in place and becomes the velocity: one pass over memory less than with both.
        gradients = torch._foreach_add([p.grad for p in params], params, alpha=group["weight_decay"])
        if group["adapt"]:
            weight_norms = torch.stack(torch._foreach_norm(params))
            gradient_norms = torch.stack(torch._foreach_norm(gradients))
            rates = group["eta"] * weight_norms / gradient_norms
            if self.clip:
                rates = (rates / group["lr"]).clamp(max=1.0)
            rates = torch.where((weight_norms > 0) & (gradient_norms > 0), rates, torch.ones_like(rates))
            torch._foreach_mul_(gradients, list(rates.unbind()))
        torch._foreach_add_(gradients, velocities, alpha=group["momentum"])
        torch._foreach_add_(params, gradients, alpha=-group["lr"])
        for p, velocity in zip(params, gradients, strict=True):
            self.state[p]["momentum_buffer"] = velocity


def split_by_patterns(
    module: nn.Module, patterns: Iterable[str]
) -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]:
    """Return the trainable parameters (adapted, excluded) by name. Excluded ones match a pattern.

    A pattern is a part of the parameter's name. Two patterns match more, because names alone would miss the
    normalization layers in heads and downsample branches: ".bias" matches every bias, and ".bn" every parameter of a
    normalization layer.
    """
    patterns = list(patterns)
    adapted = {}
    excluded = {}
    seen = set()  # layers may share a parameter
    for prefix, layer in module.named_modules():
        is_norm = "norm" in type(layer).__name__.lower()
        for leaf, parameter in layer.named_parameters(recurse=False):
            if not parameter.requires_grad or parameter in seen:
                continue
            seen.add(parameter)
            name = f"{prefix}.{leaf}".lstrip(".")
            matches = any(pattern in f".{name}" for pattern in patterns) or (is_norm and ".bn" in patterns)
            matches = matches or (leaf.endswith("bias") and ".bias" in patterns)
            (excluded if matches else adapted)[name] = parameter
    return adapted, excluded
