"""Settings of the loss that change during training: those of SCHEDULED."""

from model_params import SCHEDULED, ModelParams, changes
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


def prototypes_are_frozen(params: ModelParams, step: int, plan: optimizers.Plan) -> bool:
    """Return whether prototypes do not change at an optimizer step."""
    return step < params.prototypes_frozen_epochs * plan.steps_per_epoch
