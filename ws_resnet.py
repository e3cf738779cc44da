"""ResNets with weight-standardized convolutions and group norm (https://arxiv.org/abs/1903.10520).

They are torchvision's ResNets with two kinds of layers replaced. Parameters keep torchvision's names.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet


def standardized_weight(weight: Tensor) -> Tensor:
    """Return weights of mean 0 and standard deviation 1 over the inputs of each output unit.

    The standard deviation is the unbiased one, plus 1e-5.
    """
    flat = weight.float().flatten(1)
    correction = min(1, flat.shape[1] - 1)  # with one input, the unbiased standard deviation would be 0 / 0
    flat = (flat - flat.mean(1, keepdim=True)) / (flat.std(1, keepdim=True, correction=correction) + 1e-5)
    return flat.view_as(weight).to(weight.dtype)


class PointConv2d(nn.Conv2d):
    """Convolution that is computed as a linear layer if its output is a single pixel.

    This happens in the last stage of a ResNet on small images. Most taps of the kernel see only padding there, so a
    linear layer over the other taps is many times faster than a convolution.
    """

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if isinstance(self.padding, str):  # "same"
            return super()._conv_forward(x, weight, bias)
        height, width = x.shape[-2:]
        (k1, k2), (p1, p2), (s1, s2) = self.kernel_size, self.padding, self.stride
        one_pixel = (height + 2 * p1 - k1) // s1 == (width + 2 * p2 - k2) // s2 == 0
        plain = self.dilation == (1, 1) and self.groups == 1 and self.padding_mode == "zeros"
        if not (one_pixel and plain and p1 + height <= k1 and p2 + width <= k2):
            return super()._conv_forward(x, weight, bias)
        seen = (slice(None), slice(None), slice(p1, p1 + height), slice(p2, p2 + width))
        taps = Taps.apply(weight, seen) if torch.is_grad_enabled() else weight[seen]
        return F.linear(x.flatten(1), taps.flatten(1), bias)[:, :, None, None]


class Taps(torch.autograd.Function):
    """Indexing weight[seen] with a gradient in the weight's memory format, which saves two copies."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, seen: tuple[slice, ...]) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.seen = seen
        return weight[seen].clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        whole = torch.zeros_like(*ctx.saved_tensors)
        whole[ctx.seen] = gradient
        return whole, None


class Conv2d(PointConv2d):
    """Convolution with standardized weights."""

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, standardized_weight(self.weight), self.bias)


class Linear(nn.Linear):
    """Linear layer with standardized weights."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, standardized_weight(self.weight), self.bias)


def exchange_convolutions(module: nn.Module, kind: type[nn.Conv2d]) -> None:
    """Turn all plain convolutions of a module into another kind, in place."""
    for layer in module.modules():
        if type(layer) is nn.Conv2d:
            layer.__class__ = kind  # keeps parameters and initial values; only forward() changes


def _ws_resnet(block: type, layers: list[int], **kwargs) -> ResNet:
    model = ResNet(block, layers, norm_layer=partial(nn.GroupNorm, 32), **kwargs)
    exchange_convolutions(model, Conv2d)
    return model


ws_resnet18 = partial(_ws_resnet, BasicBlock, [2, 2, 2, 2])
ws_resnet34 = partial(_ws_resnet, BasicBlock, [3, 4, 6, 3])
ws_resnet50 = partial(_ws_resnet, Bottleneck, [3, 4, 6, 3])
ws_resnet101 = partial(_ws_resnet, Bottleneck, [3, 4, 23, 3])
ws_resnet152 = partial(_ws_resnet, Bottleneck, [3, 8, 36, 3])

WS_RESNETS = {
    "ws_resnet18": ws_resnet18,
    "ws_resnet34": ws_resnet34,
    "ws_resnet50": ws_resnet50,
    "ws_resnet101": ws_resnet101,
    "ws_resnet152": ws_resnet152,
}
