"""The settings of SCE's loss, and what they are at a step: two of them may change. Only ModelParams inherits them."""

from typing import TYPE_CHECKING

from attrs import frozen

import schedules
from fields import choice, fraction, non_negative, positive

if TYPE_CHECKING:
    from model_params import ModelParams
    from optimizers import Plan

CHANGING = ("sce_coefficient", "sce_target_T")
WARMUPS = ("linear", "cosine")


@frozen(kw_only=True, slots=False)  # Python cannot join the slots of two base classes
class SCELossParams:
    """Settings of similarity contrastive estimation (https://arxiv.org/abs/2111.14585): of loss_type="sce"."""

    # sce parameters
    sce_coefficient: float = fraction(0.5)  # fraction of the target on the own key. 1: InfoNCE, 0: ReSSL
    sce_target_T: float = positive(0.05, by=1e-4)  # sharper than T

    # sce: the coefficient's schedule, in optimizer steps of the Trainer
    sce_coefficient_warmup_epochs: float = non_negative(0)  # in which it goes from its start to sce_coefficient
    sce_coefficient_warmup_start: float = fraction(1.0)  # as if it were InfoNCE
    sce_coefficient_warmup: str = choice("linear", WARMUPS)  # how it goes there
    sce_coefficient_schedule: str = choice("constant", tuple(schedules.CURVES))  # after the warm-up
    sce_coefficient_final: float = fraction(0.0)  # linear, cosine: what it goes to, reached at the end

    # sce: the target temperature's schedule, likewise
    sce_target_T_warmup_epochs: float = non_negative(0)  # in which it goes from its start to sce_target_T
    sce_target_T_warmup_start: float | None = positive(None, by=1e-4)  # to be set where there is a warm-up
    sce_target_T_warmup: str = choice("cosine", WARMUPS)  # how it goes there
    sce_target_T_schedule: str = choice("constant", tuple(schedules.CURVES))  # after the warm-up
    sce_target_T_final: float | None = positive(None, by=1e-4)  # linear, cosine: what it goes to, reached at the end


def changes(params: "ModelParams", name: str) -> bool:
    """Whether `name` of CHANGING is not the same in all steps."""
    return getattr(params, f"{name}_warmup_epochs") > 0 or getattr(params, f"{name}_schedule") != "constant"


def scheduled(params: "ModelParams", step: int, plan: "Plan | None") -> dict[str, float]:
    """Those of CHANGING that do change, at an optimizer step of a training whose length is in `plan`."""
    p, found = params, {}
    for name in CHANGING:
        if changes(p, name):
            warmup_steps = getattr(p, f"{name}_warmup_epochs") * plan.steps_per_epoch
            values = (getattr(p, field) for field in (f"{name}_warmup_start", name, f"{name}_final"))
            curves = getattr(p, f"{name}_warmup"), getattr(p, f"{name}_schedule")
            found[name] = schedules.warmup_then(step, plan.steps, warmup_steps, *values, *curves)
    return found


def contradictions(params: "ModelParams") -> list[tuple[bool, str]]:
    """(whether the settings contradict each other, how, and the way out)"""
    p, found = params, []
    for name in CHANGING:
        warmup, schedule = getattr(p, f"{name}_warmup_epochs"), getattr(p, f"{name}_schedule")
        start, final = f"{name}_warmup_start", f"{name}_final"
        of_other_loss = f"a schedule of {name} is a part of loss_type='sce', not of {p.loss_type!r}: leave "
        found += [
            (changes(p, name) and p.loss_type != "sce", f"{of_other_loss}{name}_warmup_epochs and {name}_schedule out"),
            (warmup > 0 and getattr(p, start) is None,
             f"{name}_warmup_epochs={warmup} needs the value that the warm-up starts with: set {start}"),
            (schedule != "constant" and getattr(p, final) is None,
             f"{name}_schedule={schedule!r} needs the value that it ends with: set {final}"),
        ]  # fmt: skip
    return found
