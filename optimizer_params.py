"""The settings of pretraining's optimizer: rates, decay, single parameters. Only ModelParams inherits them."""

from typing import TYPE_CHECKING, Any

from attrs import field, frozen

import parameter_options
from fields import choice, fraction, list_of_numbers, non_negative, plain, positive

if TYPE_CHECKING:
    from model_params import ModelParams


@frozen(kw_only=True, slots=False)  # Python cannot join the slots of two base classes
class OptimizerParams:
    """Settings of the optimizer and of its schedules. All rates that are set here scale with `lr_scaling`."""

    # optimization parameters
    optimizer_name: str = choice("sgd", ("sgd", "lars", "adamw", "adam"))  # lars: for large batches
    lr: float = positive(0.5, at_most=1000)  # learning rate: the highest, after the warm-up
    momentum: float = fraction(0.9)  # of sgd and lars
    weight_decay: float = non_negative(1e-4, at_most=1000)  # not of parameters that are excluded below
    max_epochs: int = positive(320)  # for the programs that make the Trainer; schedules follow the Trainer
    lars_eta: float = positive(1e-3, at_most=1000)  # trust coefficient of lars
    grad_clip_lars: bool = False  # lars: no parameter's rate above lr
    exclude_matching_parameters_from_lars: list[str] = field(factory=list)  # [".bias", ".bn"]: every bias and norm

    # schedules, in optimizer steps of the Trainer
    lr_schedule: str = choice("cosine", ("cosine", "linear", "steps", "constant"))  # after the warm-up
    final_lr_schedule_value: float = non_negative(0.0, at_most=1000)  # a learning rate; steps: the lowest
    lr_decay_steps: list[float] = list_of_numbers()  # steps: epochs from the beginning, as [60, 80]
    lr_decay_factor: float = positive(0.1, at_most=1)  # steps: of the rate, at each of them
    warmup_epochs: float | None = non_negative(None)  # None: lars_warmup_epochs, else 0
    lars_warmup_epochs: float = non_negative(1)  # with lars, where warmup_epochs is None
    warmup_start_lr: float = non_negative(0.0, at_most=1000)  # the warm-up's line rises from here
    final_weight_decay: float | None = non_negative(None, at_most=1000)  # None: constant; else along half a cosine

    # single parameters
    layer_decay: float = positive(1.0, at_most=1)  # stages of the encoder: each has the next one's rate times this
    # [{"pattern": "projection", "lr_mult": 10}, ...]: by regular expression of the name; parameter_options.py
    parameter_options: list[dict[str, Any]] = field(factory=list, converter=plain, validator=parameter_options.check)


def contradictions(params: "ModelParams") -> list[tuple[bool, str]]:
    """(whether the settings contradict each other, how, and the way out)"""
    p = params
    decay = max(p.weight_decay, p.final_weight_decay or 0.0)
    named = "weight_decay" if decay == p.weight_decay else "final_weight_decay"
    is_adam = p.optimizer_name.startswith("adam")
    # fmt: off
    return [
        (p.optimizer_name != "lars" and p.lr_scaling is None and p.lr * decay > 2,
         f"lr={p.lr} times {named}={decay} is above 2, so that every step would enlarge the weights: "
         f"choose a smaller {named}"),
        (p.lr_schedule == "steps" and not p.lr_decay_steps,
         "lr_schedule='steps' needs the epochs of the steps: set lr_decay_steps, for example "
         f"[{0.6 * p.max_epochs:.4g}, {0.8 * p.max_epochs:.4g}]"),
        (p.lr_schedule != "steps" and bool(p.lr_decay_steps),
         f"lr_decay_steps={p.lr_decay_steps} are of lr_schedule='steps', not of {p.lr_schedule!r}: set only one"),
        (p.warmup_start_lr > p.lr,
         f"warmup_start_lr={p.warmup_start_lr} is above lr={p.lr}, to which the warm-up rises: choose a smaller one"),
        (p.lr_schedule != "constant" and p.final_lr_schedule_value > p.lr,
         f"final_lr_schedule_value={p.final_lr_schedule_value} is above lr={p.lr}, from which lr_schedule falls to it: "
         "choose a smaller one, such as 0"),
        (p.final_weight_decay is not None and p.weight_decay == 0,
         f"final_weight_decay={p.final_weight_decay} is reached from weight_decay, in the same proportion for every "
         "parameter: set weight_decay above 0"),
        (p.grad_clip_lars and p.optimizer_name != "lars",
         f"grad_clip_lars=True is a part of optimizer_name='lars', not of {p.optimizer_name!r}: set one or the other"),
        (is_adam and any("momentum" in row for row in p.parameter_options),
         f"parameter_options set momentum, which optimizer_name={p.optimizer_name!r} does not have: leave it out"),
        (p.optimizer_name != "lars" and any("lars_exclude" in row for row in p.parameter_options),
         f"parameter_options set lars_exclude, which is of optimizer_name='lars', not of {p.optimizer_name!r}: "
         "leave it out"),
    ]
    # fmt: on
