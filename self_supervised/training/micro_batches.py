"""Batches of any size in the memory of a part: the gradient of a loss over all images, one part of them at a time
(GradCache, https://arxiv.org/abs/2101.06983)."""

from collections.abc import Callable, Iterable, Iterator

import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from self_supervised.networks.recomputation import Rewound, buffers_of
from self_supervised.numerics import in_parts

Encoded = tuple[Tensor, ...]


class MicroBatches:
    """Outputs of networks for batches that are encoded in parts, without the memory for their gradients.

    `outputs` are leaves, unless each batch is one part: the backward pass of a loss gives them gradients, which
    `backward` passes on to the networks. For that, it encodes each part again, with the same random draws and the same
    buffers as the first time. Batch norm is computed over a part, and its running statistics count each part once.

    Args:
        networks: the modules that `encode` calls.
        encode: function [n, ...] -> tensors [n, ...].
        batches: batches [N, ...] by name.
        size: largest number of images in a part.
        seed: of the draws of dropout and similar layers.
    """

    def __init__(
        self,
        networks: Iterable[nn.Module],
        encode: Callable[[Tensor], Encoded],
        batches: dict[int, Tensor],
        size: int,
        seed: int,
    ):
        self.networks = nn.ModuleList(networks)
        self.encode = encode
        self.batches = batches
        self.size = size
        self.seed = seed
        self.outputs: dict[int, Encoded] = {}
        self.has_one_part = all(len(batch) <= size for batch in batches.values())
        if self.has_one_part:  # as if there were no parts
            self.outputs = {name: encode(batch) for name, batch in batches.items()}
            return
        self.buffers = buffers_of(self.networks)
        for name in batches:
            parts = zip(*self.encoded_without_gradient(name), strict=True)
            self.outputs[name] = tuple(torch.cat(part).requires_grad_() for part in parts)

    def parts(self, name: int) -> Iterator[Tensor]:
        for number, part in enumerate(in_parts(self.batches[name], self.size)):
            torch.manual_seed((self.seed + 1000003 * name + number) % 2**63)
            yield part

    @torch.no_grad()
    def encoded_without_gradient(self, name: int) -> list[Encoded]:
        return [self.encode(part) for part in self.parts(name)]

    def backward(self) -> None:
        """Add the gradients of the loss, by way of `outputs`, to those of the networks' parameters."""
        if self.has_one_part:
            return
        with Rewound(self.networks, self.buffers):
            for name, outputs in self.outputs.items():
                with_gradient = [i for i, output in enumerate(outputs) if output.grad is not None]
                if not with_gradient:  # the view is only a key, yet batch renorm of the next view reads what it leaves
                    self.encoded_without_gradient(name)
                    continue
                gradients = zip(*(in_parts(outputs[i].grad, self.size) for i in with_gradient), strict=True)
                for part, of_part in zip(self.parts(name), gradients, strict=True):
                    encoded = self.encode(part)
                    torch.autograd.backward([encoded[i] for i in with_gradient], list(of_part))


def refuse_strategy(trainer: pl.Trainer) -> None:
    """Raise ValueError if the Trainer's strategy needs a single backward pass through the network that it wraps."""
    kind, options = type(trainer.strategy), getattr(trainer.strategy, "_ddp_kwargs", {})
    if kind not in (SingleDeviceStrategy, DDPStrategy) or options.get("static_graph"):
        raise ValueError(
            f"micro_batch_size does not work with {kind.__name__}, nor with static_graph=True. Use strategy='ddp' "
            "without it, or accumulate_grad_batches"
        )


def synchronize_buffers_alone(network: nn.Module) -> None:
    """Keep DDP from averaging gradients in its backward pass, before the last part, until its next forward pass."""
    if isinstance(network, DistributedDataParallel):
        network.require_backward_grad_sync = False
        network.require_forward_param_sync = True  # which DDP switches off together with gradients
