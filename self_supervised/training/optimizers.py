"""Learning rate schedules, the plan of a training on its Trainer, and optimizers."""

import functools
import math
from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
import torch
from attrs import evolve, frozen
from pytorch_lightning.utilities import rank_zero_info, rank_zero_warn
from torch.optim.lr_scheduler import LambdaLR

from lars import LARS
from model_params import OF_PROTOTYPES, SCHEDULED, EncoderAndDataParams, ModelParams
from self_supervised import distributed
from self_supervised.data.loader import size_of_batches
from self_supervised.data.loading import batch_size

Fraction = Callable[[int], float]  # optimizer step -> fraction of the highest learning rate


# ---- Schedules: pure functions of the optimizer step, or of the progress from 0 to 1 ----


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


def warmup_cosine(step: int, total_steps: int, warmup_steps: float, peak: float, end: float) -> float:
    """Return a value that rises linearly to `peak` over `warmup_steps`, then falls along half a cosine to `end`."""
    if step < warmup_steps:
        return peak * warmup(step, warmup_steps)
    return cosine(peak, end, after_warmup(step, total_steps, warmup_steps))


def warmup_then(
    step: int, total_steps: int, warmup_steps: float, start: float, value: float, end: float, warmup: str, then: str
) -> float:
    """Return a value that goes from `start` at step 0 to `value` after `warmup_steps`, then to `end` at `total_steps`.

    Args:
        warmup: key of CURVE_FUNCTIONS, the curve to `value`.
        then: key of CURVE_FUNCTIONS, the curve from `value` to `end`; "constant" stays at `value`.
    """
    if step < warmup_steps:
        return CURVE_FUNCTIONS[warmup](start, value, step / warmup_steps)
    return CURVE_FUNCTIONS[then](value, end, after_warmup(step, total_steps, warmup_steps))


def epochs_text(epochs: float) -> str:
    return "1 epoch" if epochs == 1 else f"{epochs:g} epochs"


# ---- Plan: batch size, length and learning rate of a training on its Trainer ----


@frozen
class Plan:
    """Effective batch size, length and learning rate of a training. As a string: one line for the log."""

    processes: int
    accumulated: int  # batches per optimizer step
    batch_size: int  # images per process and batch
    lr: float  # highest learning rate, scaled by `lr_factor`
    steps: int  # optimizer steps of the whole training
    steps_per_epoch: int
    warmup_steps: float = 0
    lr_factor: float = 1.0  # by which `lr_scaling` multiplies all learning rates
    kind: str = "images"  # or "videos"

    @property
    def global_batch_size(self) -> int:
        """Images of all processes per optimizer step."""
        return self.processes * self.accumulated * self.batch_size

    def of_checkpoint(self) -> dict[str, int]:
        """Return what a checkpoint keeps as "steps", for a resumed run to compare."""
        return {
            "images": self.global_batch_size,
            "accumulated": self.accumulated,
            "an_epoch": self.steps_per_epoch,
        }

    def __str__(self) -> str:
        return (
            f"{self.processes} (processes) x {self.accumulated} (accumulated batches) x {self.batch_size} "
            f"({self.kind}) = {self.global_batch_size} {self.kind} per optimizer step; "
            f"{self.steps} steps, {self.steps_per_epoch} an epoch, {self.warmup_steps:g} of warm-up; lr {self.lr:.4g}"
        )


def get_plan(params: EncoderAndDataParams, trainer: pl.Trainer, warmup_epochs: float = 0) -> Plan:
    """Return the plan of a training on this Trainer.

    `lr_scaling` follows the images per optimizer step: linear (https://arxiv.org/abs/1706.02677) or with their square
    root (https://arxiv.org/abs/1404.5997).
    """
    steps, steps_per_epoch = training_length(trainer)
    accumulated = trainer.accumulate_grad_batches
    if math.isinf(trainer.num_training_batches):
        warmup_epochs = of_endless_loader(params, warmup_epochs)
    if (warmup := warmup_epochs * steps_per_epoch) > steps:
        rank_zero_warn(
            f"the warm-up of {epochs_text(warmup_epochs)} is longer than the training: lr={params.lr} is never reached"
        )
    size = checked_batch_size(params, accumulated, trainer.train_dataloader)
    plan = Plan(distributed.world_size(), accumulated, size, params.lr, steps, steps_per_epoch, warmup)
    factor = lr_factor(params, plan.global_batch_size)
    return evolve(plan, lr=params.lr * factor, lr_factor=factor, kind=params.dataset.kind)


def lr_factor(params: EncoderAndDataParams, images: int) -> float:
    """Return the factor by which `lr_scaling` multiplies learning rates, for these images per optimizer step."""
    ratio = images / params.lr_batch_size
    return {None: 1.0, "linear": ratio, "sqrt": math.sqrt(ratio)}[params.lr_scaling]


def checked_batch_size(params: EncoderAndDataParams, accumulated: int, loader: Any) -> int:
    """Return the batch size of the loader, which may be the user's, or that of the settings if the loader has none.

    Raises:
        ValueError: the settings depend on a batch size that the loader does not have.
    """
    found = size_of_batches(loader)
    wanted = batch_size(params, accumulated)
    if found is None and params.lr_scaling is not None:
        raise ValueError(
            f"lr_scaling={params.lr_scaling!r} needs the batch_size of the loader, which has none. Set lr_scaling=None"
        )
    if params.global_batch_size is not None and found not in (None, wanted):
        raise ValueError(
            f"global_batch_size={params.global_batch_size} means {wanted} images per process and batch, but the loader "
            f"has batch_size={found}. Change one of them"
        )
    return found or wanted


def training_length(trainer: pl.Trainer) -> tuple[int, int]:
    """Return the optimizer steps of the training and of one epoch; with an endless loader the training is one epoch.

    Raises:
        ValueError: the Trainer has no end.
    """
    if trainer.train_dataloader is None:
        trainer.fit_loop.setup_data()  # with max_steps alone, Lightning counts steps without setting up the loader
    steps = trainer.estimated_stepping_batches
    batches = trainer.num_training_batches
    if math.isinf(steps):
        raise ValueError(
            "max_epochs=-1: the schedules need an end. Pass max_epochs or max_steps to the Trainer as well"
        )
    if batches == 0 or trainer.limit_train_batches == 0:
        raise ValueError(
            f"limit_train_batches={trainer.limit_train_batches} leaves no batch to train on. Raise it, or pass a "
            "longer loader"
        )
    if steps == -1:
        raise ValueError("the loader has no length: tell the Trainer max_steps, which the schedules need")
    steps = max(1, int(steps))  # max_steps=0 trains nothing
    return steps, steps if math.isinf(batches) else math.ceil(batches / trainer.accumulate_grad_batches)


def of_endless_loader(params: EncoderAndDataParams, warmup_epochs: float) -> float:
    """Return the warm-up as a fraction of the training, because a loader without length has no epochs.

    The default warm-up of LARS, in epochs, would last for the whole training and becomes 0.

    Raises:
        ValueError: a setting counts epochs.
    """
    counted_in_epochs = ["lr_decay_steps", "warmup_epochs", *(f"{name}_warmup_epochs" for name in SCHEDULED)]
    if (loss := getattr(params, "loss_type", None)) in OF_PROTOTYPES:
        counted_in_epochs.append("prototypes_frozen_epochs")
        if loss == "swav" and params.keeps_keys:
            counted_in_epochs.append("queue_from_epoch")
    for name, value in ((name, getattr(params, name, None)) for name in counted_in_epochs):
        if value and (name == "lr_decay_steps" or value >= 1):
            raise ValueError(
                f"{name}={value} counts epochs, but the loader has no length. Pass limit_train_batches, the number of "
                "batches per epoch, to the Trainer"
            )
    if warmup_epochs >= 1:
        rank_zero_info("the loader has no length and therefore no epochs: LARS starts without lars_warmup_epochs")
    return warmup_epochs if warmup_epochs < 1 else 0.0


def warmup_epochs(params: ModelParams) -> float:
    """Return `warmup_epochs` if it is set, otherwise `lars_warmup_epochs` with LARS and 0 without."""
    if params.warmup_epochs is not None:
        return params.warmup_epochs
    return params.lars_warmup_epochs if params.optimizer_name == "lars" else 0.0


# ---- Optimizers ----


def for_pretraining(params: ModelParams, plan: Plan, groups: list[dict]) -> dict:
    """Return what `configure_optimizers` returns for pretraining.

    With every step, the learning rates of all groups change in proportion, and the weight decay of each group
    approaches its final value, if that differs.

    Args:
        groups: parameter groups with their learning rates before `lr_scaling`, and with `final_weight_decay`.
    """
    late = [epoch for epoch in params.lr_decay_steps if epoch * plan.steps_per_epoch >= plan.steps]
    if late:
        rank_zero_warn(
            f"lr_decay_steps={late} are beyond the {plan.steps} steps of the training: lr does not fall there"
        )
    final_decays = [group["final_weight_decay"] for group in groups]
    groups = [without({**group, "lr": group["lr"] * plan.lr_factor}, "final_weight_decay") for group in groups]
    optimizer = get_optimizer(params, groups, plan.lr)
    fraction = functools.partial(pretraining_rate, params, plan)
    return per_step(Schedule(optimizer, fraction, plan.steps, final_decays))


def pretraining_rate(params: ModelParams, plan: Plan, step: int) -> float:
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


def linear_cosine(plan: Plan, step: int) -> float:
    """Return the fraction of the peak learning rate of a linear classifier at a step."""
    return warmup_cosine(step, plan.steps, plan.warmup_steps, peak=1.0, end=0.0)


def linear_steps(plan: Plan, step: int) -> float:
    """Return the fraction of the peak learning rate of a linear classifier at a step."""
    decay = steps_down(step / plan.steps, milestones=(0.6, 0.8), factor=0.1)
    return decay * warmup(step, plan.warmup_steps)


def get_optimizer(
    params: EncoderAndDataParams, groups: list[dict], lr: float, nesterov: bool = False
) -> torch.optim.Optimizer:
    """Return the optimizer `optimizer_name`, which keeps its own settings when it loads the state of a checkpoint.

    Args:
        groups: parameter groups. LARS adapts those with `adapt=True`; without `adapt`, those without a weight decay of
            their own.
        lr: learning rate of groups without their own.
    """
    optimizer = build_optimizer(params, groups, lr, nesterov)
    optimizer.register_load_state_dict_pre_hook(with_own_settings)
    return optimizer


def build_optimizer(
    params: EncoderAndDataParams, groups: list[dict], lr: float, nesterov: bool
) -> torch.optim.Optimizer:
    p = params
    if p.optimizer_name == "lars":
        groups = [{**group, "adapt": group.get("adapt", "weight_decay" not in group)} for group in groups]
        return LARS(groups, lr, p.momentum, p.weight_decay, p.lars_eta, getattr(p, "grad_clip_lars", False))
    groups = [without(group, "adapt") for group in groups]
    if p.optimizer_name == "sgd":
        return torch.optim.SGD(groups, lr, p.momentum, weight_decay=p.weight_decay, nesterov=nesterov)
    groups = [without(group, "momentum") for group in groups]
    return {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}[p.optimizer_name](
        groups, lr, weight_decay=p.weight_decay
    )


def with_own_settings(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
    """Return what the optimizer loads from a checkpoint: the state of each parameter, matched by its name.

    Groups and their settings (learning rate, momentum, weight decay, ...) stay those of the optimizer. PyTorch would
    replace them.

    Raises:
        ValueError: the checkpoint has no names, because it is of an earlier version, and has other groups.
    """
    own = optimizer.state_dict()["param_groups"]
    before = saved["param_groups"]
    state = saved["state"]
    if all("param_names" in group for group in before):
        number_of = dict(zip(together(before, "param_names"), together(before, "params"), strict=True))
        names = zip(together(own, "param_names"), together(own, "params"), strict=True)
        state = {number: state[number_of[name]] for name, number in names if number_of.get(name) in state}
    elif [len(group["params"]) for group in own] != [len(group["params"]) for group in before]:
        raise ValueError(
            "the checkpoint's optimizer has other parameter groups. Pass the settings of its run that determine them "
            "(exclude_matching_parameters_from_lars, parameter_options, layer_decay, encoder_lr)"
        )
    return {**saved, "state": state, "param_groups": own}


def together(groups: list[dict], name: str) -> list:
    """Return the items of the lists `name` of all groups, in their order."""
    return [item for group in groups for item in group[name]]


def without(group: dict, name: str) -> dict:
    """Return a copy of a group without one of its settings."""
    return {key: value for key, value in group.items() if key != name}


class Schedule(LambdaLR):
    """Scheduler that sets the learning rate and weight decay of every group as functions of the optimizer step.

    The weight decay follows half a cosine to its final value (DINO, https://arxiv.org/abs/2104.14294, appendix C). A
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


def per_step(scheduler: LambdaLR) -> dict:
    """Return the dict of `configure_optimizers` for a scheduler that advances at every optimizer step."""
    return {"optimizer": scheduler.optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def groups_text(optimizer: torch.optim.Optimizer) -> str:
    """Return a description of the optimizer's parameter groups, one line each if they have names."""
    groups = optimizer.param_groups
    if not all("name" in group for group in groups):
        return f"parameters with and without weight decay: {' and '.join(str(len(g['params'])) for g in groups)}"
    rows = ["parameter groups", f"{'':<32} {'tensors':>7} {'highest lr':>10} {'decay':>7}"]
    for g in groups:
        rows.append(f"{g['name']:<32} {len(g['params']):>7} {g['initial_lr']:>10.3g} {g['weight_decay']:>7.3g}")
    return "\n".join(rows)
