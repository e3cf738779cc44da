"""Batches of any size in the memory of a part: the gradient of a loss over all images, one part of them at a time
(GradCache, https://arxiv.org/abs/2101.06983)."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

Encoded = tuple[Tensor, ...]


class MicroBatches:
    """Outputs of a network for batches that are encoded in parts, without the memory for their gradients.

    `outputs` are leaves: the backward pass of a loss gives them gradients, which `backward` passes on to the network.
    For that, it encodes each part again, with the same random draws. Batch norm is computed over a part; its
    statistics, and all other buffers, are those of the first time.

    Args:
        encode: function [n, ...] -> tensors [n, ...].
        batches: batches [N, ...] by name.
        size: largest number of images in a part.
        seed: of the draws of dropout and similar layers.
    """

    def __init__(self, encode: Callable[[Tensor], Encoded], batches: dict[int, Tensor], size: int, seed: int):
        self.encode = encode
        self.batches = batches
        self.size = size
        self.seed = seed
        self.outputs: dict[int, Encoded] = {}
        with torch.no_grad():
            for name in batches:
                parts = zip(*(self.encode(part) for part in self.parts(name)), strict=True)
                self.outputs[name] = tuple(torch.cat(part).requires_grad_() for part in parts)

    def parts(self, name: int) -> Iterator[Tensor]:
        for number, part in enumerate(self.batches[name].split(self.size)):
            torch.manual_seed((self.seed + 1000003 * name + number) % 2**63)
            yield part

    def backward(self, module: nn.Module) -> None:
        """Add the gradients of the loss, by way of `outputs`, to those of the parameters of `module`."""
        before = {buffer: buffer.clone() for buffer in module.buffers()}
        for name, outputs in self.outputs.items():
            with_gradient = [i for i, output in enumerate(outputs) if output.grad is not None]
            gradients = zip(*(outputs[i].grad.split(self.size) for i in with_gradient), strict=True)
            for part, of_part in zip(self.parts(name), gradients, strict=True):
                encoded = self.encode(part)
                torch.autograd.backward([encoded[i] for i in with_gradient], list(of_part))
        with torch.no_grad():
            for buffer, value in before.items():
                buffer.copy_(value)
