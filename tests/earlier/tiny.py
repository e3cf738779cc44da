"""A very small encoder as a model of timm, so that the programs can build it by the name timm:earlier_tiny.

    python tests/earlier/tiny.py train byol --encoder_arch timm:earlier_tiny ...

runs a program (a module of PYTHONPATH) that knows this name. This file imports nothing of the library.
"""

import runpy
import sys
from collections import OrderedDict
from pathlib import Path

import torch
from PIL import Image
from timm.models import register_model
from torch import Tensor, nn

SMALL = {"dataset_name": "digits", "dim": 8, "mlp_hidden_dim": 8, "K": 64, "seed": 0}
NAMED = {  # settings of methods whose tensors' names and shapes are stored in expected.json
    "resnet18": {**SMALL, "encoder_arch": "resnet18", "mlp_normalization": "gn", "mlp_hidden_dim": 32},
    "ws_resnet18": {**SMALL, "encoder_arch": "ws_resnet18", "mlp_normalization": "br"},
    "predictor and online classifier": {
        **SMALL, "encoder_arch": "timm:earlier_tiny", "mlp_normalization": "bn", "prediction_mlp_layers": 2,
        "use_mlp_weight_standardization": True, "online_classifier": True,
    },
}  # fmt: skip


@register_model
def earlier_tiny(in_chans: int = 1, **_: object) -> nn.Module:
    """[N, C, H, W] -> [N, 8], 348 parameters."""
    layers = {
        "conv1": nn.Conv2d(in_chans, 4, 3, padding=1, bias=False),
        "bn1": nn.BatchNorm2d(4),
        "relu1": nn.ReLU(),
        "conv2": nn.Conv2d(4, 8, 3, stride=2, padding=1, bias=False),
        "bn2": nn.BatchNorm2d(8),
        "relu2": nn.ReLU(),
        "pool": nn.AdaptiveAvgPool2d(1),
        "flatten": nn.Flatten(),
    }
    return nn.Sequential(OrderedDict(layers))


def fixed_images() -> Tensor:
    """Floats [4, 1, 8, 8] whose embeddings are stored in expected.json."""
    numbers = torch.arange(4 * 8 * 8).mul(37).remainder(101)
    return (numbers / 50 - 1).reshape(4, 1, 8, 8)


def write_images(folder: Path, first: int, last: int) -> None:
    """Gray PNG files number `first` to `last` - 1, in two class folders."""
    for i in range(first, last):
        file = folder / ("even", "odd")[i % 2] / f"{i:02}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        numbers = torch.arange(8 * 8).mul(17 + i).remainder(256)
        Image.fromarray(numbers.to(torch.uint8).reshape(8, 8).numpy()).save(file)


if __name__ == "__main__":
    program = sys.argv[1]
    sys.argv = [f"{program}.py", *sys.argv[2:]]
    runpy.run_module(program, run_name="__main__")
