"""Optimizers and learning rates, for the length that the Trainer really has."""

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
from model_params import EncoderAndDataParams, ModelParams
from self_supervised import distributed
from self_supervised.data.loading import batch_size


def cosine(start: float, end: float, progress: float) -> float:
    """Half a cosine from `start` (progress 0) to `end` (progress 1); `end` ever after."""
    return end + (start - end) * (1 + math.cos(math.pi * min(progress, 1.0))) / 2


def line(start: float, end: float, progress: float) -> float:
    """A straight line from `start` (progress 0) to `end` (progress 1); `end` ever after."""
    return end + (start - end) * (1 - min(progress, 1.0))


def constant(start: float, end: float, progress: float) -> float:
    """`start`, whatever the progress."""
    return start


CURVE_FUNCTIONS = {"constant": constant, "linear": line, "cosine": cosine}


def warmup(step: int, warmup_steps: float, start: float = 0.0) -> float:
    """A straight line up to 1 over `warmup_steps`, from `start`, where it is one step before the first."""
    return min(1.0, start + (1 - start) * ((step + 1) / warmup_steps)) if step < warmup_steps else 1.0


def warmup_cosine(step: int, total_steps: int, warmup_steps: float, peak: float, end: float) -> float:
    """A straight line up to `peak` over `warmup_steps`, then half a cosine down to `end` at `total_steps`."""
    if step < warmup_steps:
        return peak * warmup(step, warmup_steps)
    return cosine(peak, end, after_warmup(step, total_steps, warmup_steps))


def after_warmup(step: int, total_steps: int, warmup_steps: float) -> float:
    """Progress from the end of the warm-up (0) to the end of the training (1)."""
    return (step - warmup_steps) / max(1, total_steps - warmup_steps)


def warmup_then(
    step: int, total_steps: int, warmup_steps: float, start: float, value: float, end: float, warmup: str, then: str
) -> float:
    """From `start` at step 0 to `value` after `warmup_steps`, then to `end` at `total_steps`.

    Args:
        warmup, then: keys of CURVES, the ways to `value` and to `end`; constant: `value` to the last step.
    """
    if step < warmup_steps:
        return CURVE_FUNCTIONS[warmup](start, value, step / warmup_steps)
    return CURVE_FUNCTIONS[then](value, end, after_warmup(step, total_steps, warmup_steps))


def steps_down(progress: float, milestones: tuple[float, ...], factor: float) -> float:
    """1, multiplied by `factor` at each milestone (a fraction of the training) that `progress` has reached."""
    return factor ** sum(progress >= milestone for milestone in milestones)


# ---- Optimizers and learning rates, for the length that the Trainer really has ----


Fraction = Callable[[int], float]  # of the highest learning rate, at an optimizer step


@frozen
class Plan:
    """What the settings come to on this Trainer."""

    processes: int
    accumulated: int  # batches of one optimizer step
    batch_size: int  # images of one process in one batch
    lr: float  # the highest, scaled
    steps: int  # of the optimizer
    steps_per_epoch: int
    warmup_steps: float = 0
    lr_factor: float = 1.0  # by which it, and every other rate, was scaled
    kind: str = "images"  # or videos

    @property
    def global_batch_size(self) -> int:
        return self.processes * self.accumulated * self.batch_size

    def of_checkpoint(self) -> dict[str, int]:
        """What a resumed run must have in common with this one, or must know."""
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


def checked_batch_size(params: EncoderAndDataParams, accumulated: int, loader: Any) -> int:
    """That of the loader, which may be the user's; that of the settings where it does not say.

    Raises:
        ValueError: the settings build on a batch size that the loader does not have.
    """
    found = getattr(loader, "batch_size", None) or getattr(getattr(loader, "batch_sampler", None), "batch_size", None)
    wanted = batch_size(params, accumulated)
    if found is None and params.lr_scaling is not None:
        raise ValueError(f"lr_scaling={params.lr_scaling!r} needs the batch_size of the loader, which has none")
    if params.global_batch_size is not None and found not in (None, wanted):
        raise ValueError(
            f"global_batch_size={params.global_batch_size} makes {wanted} images of one process in one batch, but the "
            f"loader's batch_size is {found}: change one of them"
        )
    return found or wanted


def get_plan(params: EncoderAndDataParams, trainer: pl.Trainer, warmup_epochs: float = 0) -> Plan:
    """The Trainer's length in optimizer steps, and the learning rate for its number of images in one of them
    (linear scaling: https://arxiv.org/abs/1706.02677; square root: https://arxiv.org/abs/1404.5997)."""
    steps, steps_per_epoch = training_length(trainer)
    accumulated = trainer.accumulate_grad_batches
    if math.isinf(trainer.num_training_batches):
        warmup_epochs = of_endless_loader(params, warmup_epochs)
    if (warmup := warmup_epochs * steps_per_epoch) > steps:
        rank_zero_warn(
            f"the warm-up of {warmup_epochs} epochs is longer than the training: lr={params.lr} is never reached"
        )
    size = checked_batch_size(params, accumulated, trainer.train_dataloader)
    plan = Plan(distributed.world_size(), accumulated, size, params.lr, steps, steps_per_epoch, warmup)
    ratio = plan.global_batch_size / params.lr_batch_size
    factor = {None: 1.0, "linear": ratio, "sqrt": math.sqrt(ratio)}[params.lr_scaling]
    return evolve(plan, lr=params.lr * factor, lr_factor=factor, kind=params.dataset.kind)


def training_length(trainer: pl.Trainer) -> tuple[int, int]:
    """Optimizer steps of the whole training and of one epoch; of an endless loader the training is one epoch.

    Raises:
        ValueError: the Trainer does not know its end.
    """
    if trainer.train_dataloader is None:
        trainer.fit_loop.setup_data()  # with max_steps alone, Lightning counts the steps without looking at the loader
    steps, batches = trainer.estimated_stepping_batches, trainer.num_training_batches
    if math.isinf(steps):
        raise ValueError(
            "max_epochs=-1: the schedules need an end. Pass max_epochs or max_steps to the Trainer as well"
        )
    if batches == 0:
        raise ValueError("limit_train_batches leaves no batch to train on: choose more, or a loader that has some")
    if steps < 1:
        raise ValueError("the loader has no length: tell the Trainer max_steps, which the schedules need")
    return int(steps), int(steps) if math.isinf(batches) else math.ceil(batches / trainer.accumulate_grad_batches)


def of_endless_loader(params: EncoderAndDataParams, warmup_epochs: float) -> float:
    """The warm-up, as a fraction of the training: a loader without length has no epochs. The one of LARS's defaults,
    which would last for the whole training, is left out.

    Raises:
        ValueError: the settings count epochs.
    """
    counting = {"lr_decay_steps": getattr(params, "lr_decay_steps", None), "warmup_epochs": params.warmup_epochs}
    for name, value in counting.items():
        if value and not (name == "warmup_epochs" and value < 1):
            raise ValueError(
                f"{name}={value} counts epochs, but the loader has no length: pass limit_train_batches, the batches of "
                "an epoch, to the Trainer"
            )
    if warmup_epochs >= 1:
        rank_zero_info("the loader has no length, hence no epochs: LARS starts without lars_warmup_epochs")
    return warmup_epochs if warmup_epochs < 1 else 0.0


def get_optimizer(
    params: EncoderAndDataParams, groups: list[dict], lr: float, nesterov: bool = False
) -> torch.optim.Optimizer:
    """The optimizer that `params` names. LARS adapts the groups that have the weight decay of all, or say `adapt`."""
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
    """What the optimizer loads of a checkpoint: the state of each parameter, found by its name. Groups and their
    settings (learning rate, momentum, decay, ...) stay those of the optimizer, which PyTorch would replace.

    Raises:
        ValueError: the checkpoint has no names (it is of an earlier version) and other groups.
    """
    own, before, state = optimizer.state_dict()["param_groups"], saved["param_groups"], saved["state"]
    if all("param_names" in group for group in before):
        number_of = dict(zip(together(before, "param_names"), together(before, "params"), strict=True))
        names = zip(together(own, "param_names"), together(own, "params"), strict=True)
        state = {number: state[number_of[name]] for name, number in names if number_of.get(name) in state}
    elif [len(group["params"]) for group in own] != [len(group["params"]) for group in before]:
        raise ValueError(
            "the checkpoint's optimizer has other groups of parameters: give the settings of its run that make them "
            "(exclude_matching_parameters_from_lars, parameter_options, layer_decay, encoder_lr)"
        )
    return {**saved, "state": state, "param_groups": own}


def together(groups: list[dict], name: str) -> list:
    return [item for group in groups for item in group[name]]


def without(group: dict, name: str) -> dict:
    return {key: value for key, value in group.items() if key != name}


def for_pretraining(params: ModelParams, plan: Plan, groups: list[dict]) -> dict:
    """The optimizer that `params` names over groups with their own rates before `lr_scaling`. With every step the rates
    of all groups change in proportion and, if wanted, the weight decay of each goes towards its final one."""
    warn_of_late_steps(params, plan)
    final_decays = [group["final_weight_decay"] for group in groups]
    groups = [without({**group, "lr": group["lr"] * plan.lr_factor}, "final_weight_decay") for group in groups]
    optimizer, rate = get_optimizer(params, groups, plan.lr), functools.partial(pretraining_rate, params, plan)
    return per_step(Schedule(optimizer, rate, plan.steps, final_decays))


def warn_of_late_steps(params: ModelParams, plan: Plan) -> None:
    late = [epoch for epoch in params.lr_decay_steps if epoch * plan.steps_per_epoch >= plan.steps]
    if late:
        rank_zero_warn(
            f"lr_decay_steps={late} are beyond the {plan.steps} steps of the training: lr does not fall there"
        )


def pretraining_rate(params: ModelParams, plan: Plan, step: int) -> float:
    """Share of the highest rate: a line up over the warm-up, then what `lr_schedule` names."""
    p = params
    if step < plan.warmup_steps:
        return warmup(step, plan.warmup_steps, p.warmup_start_lr / p.lr)
    progress = after_warmup(step, plan.steps, plan.warmup_steps)
    end = p.final_lr_schedule_value / p.lr
    if p.lr_schedule == "steps":
        milestones = tuple(epoch * plan.steps_per_epoch for epoch in p.lr_decay_steps)
        return max(steps_down(step, milestones, p.lr_decay_factor), end)
    return CURVE_FUNCTIONS[p.lr_schedule](1.0, end, progress)


class Schedule(LambdaLR):
    """The learning rate of every group, and its weight decay where the final one differs (along half a cosine: DINO,
    https://arxiv.org/abs/2104.14294, appendix C), as functions of the optimizer step and of the settings.

    A checkpoint holds the step, nothing else: a resumed run has the values of its own settings from its first step on.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, rate: Fraction, steps: int, final_decays: list[float]):
        pairs = zip(optimizer.param_groups, final_decays, strict=True)
        self.decays, self.steps = [(group["weight_decay"], final) for group, final in pairs], steps
        super().__init__(optimizer, rate)

    def get_lr(self) -> list[float]:
        for group, (first, final) in zip(self.optimizer.param_groups, self.decays, strict=True):
            if first != final:
                group["weight_decay"] = cosine(first, final, self.last_epoch / self.steps)
        return super().get_lr()

    def state_dict(self) -> dict[str, int]:
        return {"last_epoch": self.last_epoch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Also of earlier versions, which kept the settings with the step."""
        self.last_epoch = state["last_epoch"] - 1
        self._step_count = 2  # PyTorch warns of a first step that no step of the optimizer came before
        self.step()


def per_step(scheduler: LambdaLR) -> dict:
    """What `configure_optimizers` returns."""
    return {"optimizer": scheduler.optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def groups_text(optimizer: torch.optim.Optimizer) -> str:
    """Its groups of parameters: one line each, where they have names."""
    groups = optimizer.param_groups
    if not all("name" in group for group in groups):
        return f"parameters with and without weight decay: {' and '.join(str(len(g['params'])) for g in groups)}"
    rows = ["groups of parameters", f"{'':<32} {'tensors':>7} {'highest lr':>10} {'decay':>7}"]
    for g in groups:
        rows.append(f"{g['name']:<32} {len(g['params']):>7} {g['initial_lr']:>10.3g} {g['weight_decay']:>7.3g}")
    return "\n".join(rows)


def warmup_epochs(params: ModelParams) -> float:
    """`warmup_epochs` where it is set; else LARS has its own."""
    p = params
    return p.lars_warmup_epochs * (p.optimizer_name == "lars") if p.warmup_epochs is None else p.warmup_epochs
