"""Batches of any size in the memory of a part: the gradient of a loss over all images, one part of them at a time
(GradCache, https://arxiv.org/abs/2101.06983)."""

from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice

import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import DDPStrategy, SingleDeviceStrategy
from pytorch_lightning.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from self_supervised import distributed
from self_supervised.networks.recomputation import Rewound, buffers_of
from self_supervised.numerics import in_parts

Encoded = tuple[Tensor, ...]
Gradients = tuple[Tensor | None, ...]


class MicroBatches:
    """Outputs of networks for batches that are encoded in parts, without the memory for the gradients of more than one.

    `outputs` are leaves, unless each batch is one part: the backward pass of a loss gives them gradients, which
    `backward` passes on to the networks. For that, it encodes each part again, with the same random draws and the same
    buffers as the first time; only the last part's activations are still there. Batch norm is computed over a part, and
    its running statistics count each part once.

    Args:
        networks: the modules that `encode` calls.
        encode: function [n, ...] -> tensors [n, ...].
        batches: batches [N, ...] by the number of their view.
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
        self.size = size
        self.seed = seed
        self.has_one_part = all(len(batch) <= size for batch in batches.values())
        if self.has_one_part:  # as if there were no parts
            self.outputs = {view: encode(batch) for view, batch in batches.items()}
            return
        self.buffers = buffers_of(self.networks)
        parts = {view: in_parts(batch, size) for view, batch in batches.items()}
        self.parts = [(view, number, part) for view in parts for number, part in enumerate(parts[view])]
        with isolate_rng():  # a user's loader draws from the same state
            with torch.no_grad():
                encoded = [self.encoded(*part) for part in self.parts[:-1]]
            self.kept = self.encoded(*self.parts[-1])
        by_part = iter([*encoded, tuple(output.detach() for output in self.kept)])
        self.outputs = {view: leaves_of(islice(by_part, len(parts[view]))) for view in parts}

    def encoded(self, view: int, number: int, part: Tensor) -> Encoded:
        torch.manual_seed((self.seed + 1000003 * view + number) % 2**63)
        return self.encode(part)

    def backward(self) -> None:
        """Add the gradients of the loss, by way of `outputs`, to those of the networks' parameters."""
        if self.has_one_part:
            return
        *gradients, of_kept = chain.from_iterable(map(self.gradients, self.outputs.values()))
        pass_on(self.kept, of_kept)
        del self.kept
        with isolate_rng(), Rewound(self.networks, self.buffers):
            for part, of_part in zip(self.parts[:-1], gradients, strict=True):
                is_only_a_key = all(gradient is None for gradient in of_part)
                # A key is encoded again, too: it updates running statistics, which batch renorm reads in later parts.
                with torch.set_grad_enabled(not is_only_a_key):
                    encoded = self.encoded(*part)
                pass_on(encoded, of_part)

    def gradients(self, outputs: Encoded) -> Iterator[Gradients]:
        """Yield the gradients of each part."""
        n_parts = len(in_parts(outputs[0], self.size))
        parts = ([None] * n_parts if x.grad is None else in_parts(x.grad, self.size) for x in outputs)
        return zip(*parts, strict=True)


def leaves_of(parts: Iterable[Encoded]) -> Encoded:
    """Return the outputs of all parts together, as leaves."""
    return tuple(torch.cat(output).requires_grad_() for output in zip(*parts, strict=True))


def pass_on(outputs: Encoded, gradients: Gradients) -> None:
    pairs = [(output, gradient) for output, gradient in zip(outputs, gradients, strict=True) if gradient is not None]
    if pairs:
        torch.autograd.backward(*zip(*pairs, strict=True))


def backward_of_parts(method: pl.LightningModule) -> None:
    """Pass the gradients of the outputs of a step's micro-batches on to the networks. Raise ValueError if the
    training_step of a subclass has made none."""
    micro_batches, method.micro_batches = method.micro_batches, None
    if micro_batches is None:
        raise ValueError(
            "micro_batch_size: training_step has encoded the whole batch. Call super().training_step(...), or "
            "self.encode_each(...), or set micro_batch_size=None."
        )
    with method.trainer.precision_plugin.train_step_context():
        micro_batches.backward()
    distributed.average_gradients(method.parameters())
    synchronize_buffers_alone(method.trainer.model)


def prepare_strategy(trainer: pl.Trainer) -> None:
    """Prepare the Trainer's strategy. Raise ValueError if it needs a single backward pass through the network that it
    wraps."""
    kind, options = type(trainer.strategy), getattr(trainer.strategy, "_ddp_kwargs", {})
    if kind not in (SingleDeviceStrategy, DDPStrategy) or options.get("static_graph"):
        raise ValueError(
            f"micro_batch_size does not work with {kind.__name__}, nor with static_graph=True. Use strategy='ddp' "
            "without it, or accumulate_grad_batches."
        )
    synchronize_buffers_alone(trainer.model)


def synchronize_buffers_alone(network: nn.Module) -> None:
    """Keep DDP from averaging gradients in its backward pass, before the last part, until its next forward pass."""
    if isinstance(network, DistributedDataParallel):
        network.require_backward_grad_sync = False
        network.require_forward_param_sync = True  # which DDP switches off together with gradients
