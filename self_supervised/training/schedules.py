"""Schedules: functions of the optimizer step, or of the progress from 0 to 1.

The learning rate that an optimizer applies to a parameter comes from `params.lr` in three steps:

1. `layer_decay` and `parameter_options` change it for the parameter (`lr` of parameter_groups.ParameterRow).
2. `lr_scaling` multiplies it by `plan.lr_factor` (`initial_lr` of the optimizer's group). The log shows `plan.lr`,
   which is `params.lr` times this factor.
3. At each step it is multiplied by a fraction, of the functions below (`lr` of the group; metrics.csv has the highest).
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR

from model_params import SCHEDULED, ModelParams, has_schedule
from self_supervised.training.plan import Plan

Fraction = Callable[[int], float]  # optimizer step -> fraction of the highest learning rate

# ---- Curves ----


def cosine(start: float, end: float, progress: float) -> float:
    """Return a point of half a cosine from `start` (progress 0) to `end` (progress 1 and later)."""
    return end + (start - end) * (1 + math.cos(math.pi * min(progress, 1.0))) / 2


def line(start: float, end: float, progress: float) -> float:
    """Return a point of a straight line from `start` (progress 0) to `end` (progress 1 and later)."""
    return end + (start - end) * (1 - min(progress, 1.0))


def constant(start: float, end: float, progress: float) -> float:
    """Return `start`, whatever the progress."""
    return start


CURVE_FUNCTIONS = {"constant": constant, "linear": line, "cosine": cosine}


def steps_down(progress: float, milestones: tuple[float, ...], factor: float) -> float:
    """Return `factor` to the power of the number of milestones that `progress` has reached, in the same unit."""
    return factor ** sum(progress >= milestone for milestone in milestones)


def warmup(step: int, warmup_steps: float, start: float = 0.0) -> float:
    """Return a fraction that rises linearly to 1 over `warmup_steps`. It would be `start` one step before step 0."""
    return min(1.0, start + (1 - start) * ((step + 1) / warmup_steps)) if step < warmup_steps else 1.0


def after_warmup(step: int, total_steps: int, warmup_steps: float) -> float:
    """Return the progress between the end of the warm-up (0) and the end of the training (1)."""
    return (step - warmup_steps) / max(1, total_steps - warmup_steps)


def warmup_then(
    step: int, total_steps: int, warmup_steps: float, start: float, value: float, end: float, rising: str, falling: str
) -> float:
    """Return a value that goes from `start` at step 0 to `value` after `warmup_steps`, then to `end` at `total_steps`.

    Args:
        rising: key of CURVE_FUNCTIONS, the curve to `value`.
        falling: key of CURVE_FUNCTIONS, the curve from `value` to `end`; "constant" stays at `value`.
    """
    if step < warmup_steps:
        return CURVE_FUNCTIONS[rising](start, value, step / warmup_steps)
    return CURVE_FUNCTIONS[falling](value, end, after_warmup(step, total_steps, warmup_steps))


# ---- Schedules of a training ----


def pretraining_lr_fraction(params: ModelParams, plan: Plan, step: int) -> float:
    """Return the fraction of the highest learning rate: a linear warm-up, then the curve of `lr_schedule`."""
    p = params
    if step < plan.warmup_steps:
        return warmup(step, plan.warmup_steps, p.warmup_start_lr / p.lr)
    progress = after_warmup(step, plan.steps, plan.warmup_steps)
    end = p.final_lr_schedule_value / p.lr
    if p.lr_schedule == "steps":
        milestones = tuple(epoch * plan.steps_per_epoch for epoch in p.lr_decay_steps)
        return max(steps_down(step, milestones, p.lr_decay_factor), end)
    return CURVE_FUNCTIONS[p.lr_schedule](1.0, end, progress)


def classifier_lr_fraction(schedule: str, plan: Plan, step: int) -> float:
    """Return the fraction of a classifier's highest learning rate: a linear warm-up, then half a cosine to 0
    ("cosine") or a tenth from 60 % and a hundredth from 80 % of the training on ("steps")."""
    if schedule == "steps":
        return warmup(step, plan.warmup_steps) * steps_down(step / plan.steps, milestones=(0.6, 0.8), factor=0.1)
    if step < plan.warmup_steps:
        return warmup(step, plan.warmup_steps)
    return cosine(1.0, 0.0, after_warmup(step, plan.steps, plan.warmup_steps))


def scheduled(params: ModelParams, step: int, plan: Plan | None) -> dict[str, float]:
    """Return the values of the settings in SCHEDULED at an optimizer step, without those that are constant.

    `plan` has the length of the training. It may be None if all of them are constant.
    """
    p = params
    settings = {}
    for name in SCHEDULED:
        if has_schedule(p, name):
            warmup_steps = getattr(p, f"{name}_warmup_epochs") * plan.steps_per_epoch
            values = (getattr(p, field) for field in (f"{name}_warmup_start", name, f"{name}_final"))
            curves = (getattr(p, f"{name}_warmup"), getattr(p, f"{name}_schedule"))
            settings[name] = warmup_then(step, plan.steps, warmup_steps, *values, *curves)
    return settings


def prototypes_are_frozen(params: ModelParams, step: int, plan: Plan) -> bool:
    """Return whether prototypes do not change at an optimizer step."""
    return step < params.prototypes_frozen_epochs * plan.steps_per_epoch


class Schedule(LambdaLR):
    """Scheduler that sets the learning rate and weight decay of every group as functions of the optimizer step.

    The weight decay follows half a cosine to its final value (DINO, https://arxiv.org/abs/2104.14294, section 3.2). A
    checkpoint holds only the step, so a resumed run has the values of its own settings from its first step on.

    Args:
        fraction: optimizer step -> fraction of each group's learning rate.
        steps: optimizer steps of the training.
        final_decays: final weight decay of each group.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, fraction: Fraction, steps: int, final_decays: list[float]):
        pairs = zip(optimizer.param_groups, final_decays, strict=True)
        self.decays = [(group["weight_decay"], final) for group, final in pairs]
        self.steps = steps
        super().__init__(optimizer, fraction)

    def get_lr(self) -> list[float]:
        for group, (first, final) in zip(self.optimizer.param_groups, self.decays, strict=True):
            if first != final:
                group["weight_decay"] = cosine(first, final, self.last_epoch / self.steps)
        return super().get_lr()

    def state_dict(self) -> dict[str, int]:
        return {"last_epoch": self.last_epoch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load the step only. States of earlier versions also hold settings, which are ignored."""
        self.last_epoch = state["last_epoch"] - 1
        self._step_count = 2  # at 1, PyTorch would warn that the optimizer has not taken a step
        self.step()
