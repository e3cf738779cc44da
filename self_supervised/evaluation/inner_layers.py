"""Outputs of an encoder's inner layers: the four stages of a ResNet, or the last blocks of a vision transformer."""

from collections.abc import Callable
from typing import Any

import torchvision
from torch import Tensor, nn

from self_supervised.networks.frozen_encoder import Encoder
from self_supervised.networks.layouts import RESNET_STAGES

LAST_BLOCKS = 4  # as in https://arxiv.org/abs/2104.14294
TIMM_TRANSFORMERS = {"VisionTransformer", "Eva", "Beit"}  # names of classes: timm is optional, and slow to import
Reading = Callable[[Tensor], Tensor]  # of the output of a layer, as [N, E]


def inner_layers(encoder: Encoder) -> dict[str, tuple[nn.Module, Reading]]:
    """Return each layer whose output is evaluated, and how it is read: layer1 to layer4 of a ResNet, averaged over
    space; the last four blocks of a transformer, each read as the encoder reads its last one; {} for other encoders."""
    model = encoder.model
    stages = {name: getattr(model, name, None) for name in RESNET_STAGES}
    if all(map(has_convolution, stages.values())):
        return {name: (stage, lambda output: output.flatten(2).mean(2)) for name, stage in stages.items()}
    if isinstance(model, torchvision.models.VisionTransformer):
        blocks = list(model.encoder.layers)
    elif TIMM_TRANSFORMERS & {kind.__name__ for kind in type(model).__mro__} and hasattr(model, "forward_head"):
        blocks = list(model.blocks)
    else:
        return {}
    numbers = range(len(blocks))[-LAST_BLOCKS:]
    return {f"block{number + 1:02}": (blocks[number], reading_of_tokens(model)) for number in numbers}


def reading_of_tokens(transformer: nn.Module) -> Reading:
    """Return how a transformer turns the tokens [N, T, E] after a block into an embedding: its last normalization, then
    the class token, or whatever it pools."""
    if isinstance(transformer, torchvision.models.VisionTransformer):
        return lambda tokens: transformer.encoder.ln(tokens)[:, 0]
    return lambda tokens: transformer.forward_head(transformer.norm(tokens), pre_logits=True)


def has_convolution(part: Any) -> bool:
    layers = part.modules() if isinstance(part, nn.Module) else ()
    return any(isinstance(layer, nn.Conv2d | nn.Conv3d) for layer in layers)


class ActivationRecorder:
    """Context manager that records the outputs of layers, as they are read, in every forward pass."""

    def __init__(self, layers: dict[str, tuple[nn.Module, Reading]]):
        self.layers = layers
        self.outputs: dict[str, Tensor] = {}

    def __enter__(self) -> "ActivationRecorder":
        self.hooks = [layer.register_forward_hook(self.hook(name)) for name, (layer, _) in self.layers.items()]
        return self

    def hook(self, name: str) -> Callable:
        def keep(module: nn.Module, inputs: tuple, output: Tensor) -> None:
            self.outputs[name] = self.layers[name][1](output)

        return keep

    def averages(self, n: int) -> dict[str, Tensor]:
        """Return the outputs [n, E] for n images, or for n videos, whose clips are averaged."""
        return {name: self.outputs[name].float().unflatten(0, (n, -1)).mean(1) for name in self.layers}

    def __exit__(self, *_: object) -> None:
        for hook in self.hooks:
            hook.remove()
