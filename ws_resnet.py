"""ResNets without batch norm: weight-standardized convolutions and group norm (https://arxiv.org/abs/1903.10520).

torchvision's ResNets with two layers exchanged; parameters keep torchvision's names.
"""

from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet


def standardized(weight: Tensor) -> Tensor:
    """Every output unit's weights with mean 0 and standard deviation 1 over its inputs (unbiased, + 1e-5)."""
    flat = weight.float().flatten(1)
    correction = min(1, flat.shape[1] - 1)  # with one input the unbiased deviation would be 0 / 0
    flat = (flat - flat.mean(1, keepdim=True)) / (flat.std(1, keepdim=True, correction=correction) + 1e-5)
    return flat.view_as(weight).to(weight.dtype)


class Conv2d(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, standardized(self.weight), self.bias)


class Linear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, standardized(self.weight), self.bias)


def _standardize_convolutions(module: nn.Module) -> None:
    for layer in module.modules():
        if type(layer) is nn.Conv2d:
            layer.__class__ = Conv2d  # the same parameters and initial values; only forward() differs


def _ws_resnet(block: type, layers: list[int], **kwargs) -> ResNet:
    model = ResNet(block, layers, norm_layer=partial(nn.GroupNorm, 32), **kwargs)
    _standardize_convolutions(model)
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
