"""Where keys and targets come from: the queue, the lagging model, and prototypes.

Sizes: N images on this process, D = params.dim, K keys in the queue, P prototypes.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from pytorch_lightning.utilities.seed import isolate_rng
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

from model_params import ModelParams
from self_supervised import distributed
from self_supervised.networks import modules
from self_supervised.numerics import seeded

# ---- Queue and lagging model ----


class KeyQueue(nn.Module):
    """Ring buffer with the newest keys [K, D], which starts with random unit vectors and is saved with the model.

    A batch of any size fits. Writing needs no synchronization with the device.
    """

    def __init__(self, size: int, dim: int):
        super().__init__()
        self.register_buffer("keys", F.normalize(torch.randn(size, dim), dim=1))
        self.register_buffer("position", torch.zeros((), dtype=torch.long))  # next slot to write

    @torch.no_grad()
    def push(self, keys: Tensor) -> None:
        """Overwrite the oldest slots with `keys` [n, D]."""
        size = len(self.keys)
        if (skipped := len(keys) - size) > 0:  # more keys than slots: only the last ones stay
            self.position.add_(skipped)
            keys = keys[skipped:]
        slots = (self.position + torch.arange(len(keys), device=keys.device)) % size
        self.keys.index_copy_(0, slots, keys.to(self.keys.dtype))
        self.position.add_(len(keys)).remainder_(size)

    def push_views(self, keys_of_views: Sequence[Tensor]) -> None:
        """Push the keys of all views. Raises ValueError if the training step has left none."""
        if not keys_of_views:
            raise ValueError(
                "training_step: no keys for the queue. Call super().training_step(...) in yours, or set "
                "use_negative_examples_from_queue=False and use_nearest_keys=False."
            )
        self.push(torch.cat(keys_of_views))

    def states_of_processes(self, device: torch.device) -> dict[str, Tensor]:
        """Return the queues of all processes for a checkpoint, {name: [W, ...]}.

        Args:
            device: that of the process group.
        """
        return {name: distributed.gather(x[None].to(device)).cpu() for name, x in self.state_dict().items()}


def restore_queue(checkpoint: dict[str, Any], same_number: bool) -> None:
    """Put the queue of this process into the state_dict of a checkpoint, from the queues of all processes, or from the
    original's format: `queue` [D, K] and `queue_ptr` [1]."""
    state = checkpoint["state_dict"]
    for name, of_each in checkpoint.get("queues", {}).items():
        state[f"queue.{name}"] = queue_of_this_process(of_each, same_number)
    if "queue_ptr" in state:
        state["queue.keys"] = state.pop("queue").T.contiguous()
        state["queue.position"] = state.pop("queue_ptr").reshape(())


def queue_of_this_process(queues: Tensor, same_number: bool) -> Tensor:
    """Return this process's queue from those of all processes, [W, ...].

    Raises:
        ValueError: the `same_number` of processes is needed, and there are more or fewer.
    """
    if same_number and len(queues) != distributed.world_size():
        raise ValueError(
            f"gather_keys_for_queue=False: the checkpoint has the queues of {len(queues)} processes, and this run has "
            f"{distributed.world_size()}. Use as many, or start a new run from its weights (encoder_weights)."
        )
    return queues[distributed.rank() % len(queues)]


def frozen_copy(module: nn.Module, input_shape: tuple[int, ...] | None = None) -> nn.Module:
    """Return a copy that is not trained, and has no stochastic depth, as DINO's teacher.

    Args:
        input_shape: that of an image for a user's module; if passed, the copy is tried.

    Raises:
        ValueError: the copy computes with weights of the original, because `forward` or a hook refers to it.
    """
    copied = copy.deepcopy(module).requires_grad_(False)
    for part in copied.modules():
        if isinstance(part, StochasticDepth):  # of torchvision
            part.p = 0.0
        elif type(part).__name__.endswith("DropPath") and "drop_prob" in vars(part):  # of timm, transformers, DINO
            part.drop_prob = 0.0
    if input_shape is not None and not is_independent(copied, module, input_shape):
        raise ValueError(
            "encoder: its copy, the lagging model, uses weights or features of the original, because forward or a hook "
            "refers to the original by name. Use self instead, and return features instead of storing them."
        )
    return copied


def is_independent(copied: nn.Module, module: nn.Module, input_shape: tuple[int, ...]) -> bool:
    """Return whether a copy encodes images of the shape [C, H, W] without the weights of its original."""

    def encoded(network: nn.Module) -> Tensor:
        with seeded(0):  # forward may draw
            return network(images)

    weights = list(module.parameters())
    with (
        torch.no_grad(),
        isolate_rng(torch.cuda.is_initialized()),  # not isolate_rng(), which initializes CUDA
        modules.in_eval_mode(module),
        modules.in_eval_mode(copied),
    ):
        # not the number of an earlier trial, of which a hook may have kept the features
        images = torch.rand(3, *input_shape, device=weights[0].device if weights else None)
        expected, of_copy = encoded(module), encoded(copied)
        kept = [weight.clone() for weight in weights]
        try:
            for weight in weights:
                weight.add_(1)
            again = encoded(copied)
        finally:
            for weight, before in zip(weights, kept, strict=True):
                weight.copy_(before)
    return of_copy.shape == expected.shape and torch.allclose(again, of_copy, equal_nan=True)


@torch.no_grad()
def ema_update(target: nn.Module, source: nn.Module, weight: float) -> None:
    """Update in place: target <- (1 - weight) target + weight source.

    Only parameters are updated: each network keeps its own batch statistics.
    """
    if targets := list(target.parameters()):  # a head without layers has none
        torch._foreach_lerp_(targets, list(source.parameters()), weight)


# ---- Prototypes ----


class Prototypes(nn.Module):
    """P prototypes [P, D], with which projections are compared: the last layer of SwAV and DINO.

    Only their directions count. As in the authors' code, SwAV's are scaled to length 1 before each step, and DINO's are
    divided by their lengths in `forward` (weight normalization). `params.loss_type` is "swav" or "dino".
    """

    def __init__(self, params: ModelParams):
        super().__init__()
        self.weight = nn.Linear(params.dim, params.n_prototypes, bias=False).weight
        self.register_buffer("center", torch.zeros(params.n_prototypes))
        self.assigns = params.loss_type == "swav"
        self.queue_from_epoch, self.uses_queue = params.queue_from_epoch, True
        self.center_momentum = params.center_momentum  # fraction of itself that DINO's center keeps at each step

    def forward(self, z: Tensor) -> Tensor:
        """Return the similarities [N, P] of projections [N, D]."""
        return z @ (self.weight if self.assigns else F.normalize(self.weight, dim=1)).to(z.dtype).T

    @torch.no_grad()
    def begin_step(self, epoch: float) -> None:
        """Give SwAV's prototypes the length 1, and use the queue for its assignments from `queue_from_epoch` on."""
        self.uses_queue = epoch >= self.queue_from_epoch
        if self.assigns:
            self.weight.copy_(F.normalize(self.weight, dim=1))

    @torch.no_grad()
    def targets(self, keys: dict[int, Tensor], queue: Tensor | None, temperature: float) -> dict[int, Tensor]:
        """Return the target distributions over prototypes [N, P] of the keys [N, D] of each view.

        SwAV (https://arxiv.org/abs/2006.09882, equation 3) assigns the keys of all processes and of the queue [K, D] to
        the prototypes in equal parts. DINO (https://arxiv.org/abs/2104.14294, equations 1 and 4) takes the softmax of
        the scores less a center, and moves the center toward the mean score of all processes.
        """
        if self.assigns:
            return {j: self.assignments(k, queue, temperature) for j, k in keys.items()}
        scores = {j: self(k) for j, k in keys.items()}
        targets = {j: torch.softmax((score - self.center) / temperature, dim=1) for j, score in scores.items()}
        mean = torch.stack(list(scores.values())).mean((0, 1))
        self.center.lerp_(distributed.gather(mean[None]).mean(0).to(self.center.dtype), 1 - self.center_momentum)
        return targets

    def assignments(self, keys: Tensor, queue: Tensor | None, temperature: float) -> Tensor:
        keys = distributed.gather(keys)
        scores = self(torch.cat([keys, queue]) if queue is not None and self.uses_queue else keys)
        return distributed.own_rows(sinkhorn(scores, temperature)[: len(keys)])


def sinkhorn(scores: Tensor, temperature: float, iterations: int = 3) -> Tensor:
    """Return distributions over P prototypes [N, P], of equal total weight per prototype, close to
    softmax(scores / temperature)."""
    log_weights = scores / temperature
    for _ in range(iterations):
        log_weights = log_weights - log_weights.logsumexp(0)
        log_weights = log_weights - log_weights.logsumexp(1, keepdim=True)
    return log_weights.exp()


@torch.no_grad()
def nearest_keys(keys: Tensor, queue: Tensor) -> Tensor:
    """Return the key of the queue [K, D] that is most similar to each of the keys [N, D], of length 1 (NNCLR,
    https://arxiv.org/abs/2104.14548, equation 2)."""
    return queue[(keys @ queue.T).argmax(1)]
