"""Settings of the loss that change during training: those of SCHEDULED."""

from torch import Tensor

from model_params import SCHEDULED, ModelParams, changes
from self_supervised.networks.keys import KeyQueue
from self_supervised.numerics import at_least_float32
from self_supervised.training import optimizers


def scheduled(params: ModelParams, step: int, plan: optimizers.Plan | None) -> dict[str, float]:
    """Return the values of the settings in SCHEDULED at an optimizer step, without those that are constant.

    `plan` has the length of the training. It may be None if all of them are constant.
    """
    p = params
    found = {}
    for name in SCHEDULED:
        if changes(p, name):
            warmup_steps = getattr(p, f"{name}_warmup_epochs") * plan.steps_per_epoch
            values = (getattr(p, field) for field in (f"{name}_warmup_start", name, f"{name}_final"))
            curves = (getattr(p, f"{name}_warmup"), getattr(p, f"{name}_schedule"))
            found[name] = optimizers.warmup_then(step, plan.steps, warmup_steps, *values, *curves)
    return found


def usable_keys(params: ModelParams, queue: KeyQueue | None, step: int, plan: optimizers.Plan | None) -> Tensor | None:
    """Return the keys of the queue that the loss may use at an optimizer step, in at least float32, or None."""
    waits = params.loss_type == "swav" and params.queue_from_epoch > 0
    if queue is None or (waits and step < params.queue_from_epoch * plan.steps_per_epoch):
        return None
    return at_least_float32(queue.keys)


def prototypes_are_frozen(params: ModelParams, step: int, plan: optimizers.Plan) -> bool:
    """Return whether prototypes do not change at an optimizer step."""
    return step < params.prototypes_frozen_epochs * plan.steps_per_epoch
