"""LARS, and the two groups of parameters: those it adapts and those it leaves alone."""

from collections.abc import Iterable

import torch
from torch import nn


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling on top of SGD with momentum (You et al., https://arxiv.org/abs/1708.03888).

    For every parameter p with gradient g, of a group with `adapt`:

        g <- g + weight_decay p;   q = eta |p| / |g|, or 1 where a norm is 0;   v <- momentum v + q g;   p <- p - lr v

    as in the code of VICReg, Barlow Twins and MoCo v3. Groups with `adapt=False` get plain SGD with momentum and their
    own weight decay. All arithmetic is batched over the parameters and never waits for the device.

    With `clip`, q <- min(q / lr, 1): no parameter has a rate lr q above lr, and in a small one it is eta |p| / |g|
    whatever lr is (LARC, https://github.com/NVIDIA/apex, parallel/LARC.py; solo-learn's `grad_clip_lars`, which
    divides by |g| + weight_decay |p| instead of the norm of their sum).
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
        of_all = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "eta": eta, "adapt": True}
        self.clip = clip  # not in the groups, which a checkpoint replaces
        super().__init__(params, of_all)

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
        # A copy of ours, to be changed in place: another one would cost as much as all the rest.
        gradients = torch._foreach_add([p.grad for p in params], params, alpha=group["weight_decay"])
        if group["adapt"]:
            weight_norms = torch.stack(torch._foreach_norm(params))
            gradient_norms = torch.stack(torch._foreach_norm(gradients))
            rates = group["eta"] * weight_norms / gradient_norms
            if self.clip:
                rates = (rates / group["lr"]).clamp(max=1.0)
            rates = torch.where((weight_norms > 0) & (gradient_norms > 0), rates, torch.ones_like(rates))
            torch._foreach_mul_(gradients, list(rates.unbind()))
        torch._foreach_mul_(velocities, group["momentum"])
        torch._foreach_add_(velocities, gradients)
        torch._foreach_add_(params, velocities, alpha=-group["lr"])


def parameter_groups(
    module: nn.Module, patterns: Iterable[str]
) -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]:
    """(adapted, excluded) trainable parameters by name; the excluded ones match a pattern.

    A pattern is a part of the parameter's name. Two of them mean more, because names alone miss the norms inside
    heads and downsample branches: ".bias" is every bias, ".bn" every parameter of a normalization layer.
    """
    patterns = list(patterns)
    adapted, excluded = {}, {}
    for prefix, layer in module.named_modules():
        is_norm = "norm" in type(layer).__name__.lower()
        for leaf, parameter in layer.named_parameters(recurse=False):
            if not parameter.requires_grad:
                continue
            name = f"{prefix}.{leaf}".lstrip(".")
            matches = any(pattern in f".{name}" for pattern in patterns) or (is_norm and ".bn" in patterns)
            matches = matches or (leaf.endswith("bias") and ".bias" in patterns)
            (excluded if matches else adapted)[name] = parameter
    return adapted, excluded
