"""ResNets with weight-standardized convolutions and group norm (https://arxiv.org/abs/1903.10520).

They are torchvision's ResNets with two kinds of layers replaced. Parameters keep torchvision's names.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from self_supervised.convolutions import PointConv2d, exchange_convolutions


def standardized_weight(weight: Tensor) -> Tensor:
    """Return weights of mean 0 and standard deviation 1 over the inputs of each output unit.

    The standard deviation is the unbiased one, plus 1e-5.
    """
    # without a helper of ours: exports/conversions.py writes this source into files
    flat = weight.to(torch.promote_types(weight.dtype, torch.float32)).flatten(1)
    correction = min(1, flat.shape[1] - 1)  # with one input, the unbiased standard deviation would be 0 / 0
    flat = (flat - flat.mean(1, keepdim=True)) / (flat.std(1, keepdim=True, correction=correction) + 1e-5)
    return flat.view_as(weight).to(weight.dtype)


class Conv2d(PointConv2d):
    """Convolution with standardized weights."""

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, standardized_weight(self.weight), self.bias)


class Linear(nn.Linear):
    """Linear layer with standardized weights."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, standardized_weight(self.weight), self.bias)


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
