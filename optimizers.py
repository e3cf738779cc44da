"""Optimizers and learning rates, for the length that the Trainer really has."""

import functools
import math
from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl
import torch
from attrs import evolve, frozen
from pytorch_lightning.utilities import rank_zero_warn
from torch import nn

import ddp
import schedules
from lars import LARS

if TYPE_CHECKING:
    from linear_classifier import LinearClassifierMethodParams
    from model_params import ModelParams
    from shared_params import EncoderAndDataParams

Parameters = dict[str, nn.Parameter]


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

    @property
    def global_batch_size(self) -> int:
        return self.processes * self.accumulated * self.batch_size

    def __str__(self) -> str:
        return (
            f"{self.processes} (processes) x {self.accumulated} (accumulated batches) x {self.batch_size} (images) = "
            f"{self.global_batch_size} images per optimizer step; "
            f"{self.steps} steps, {self.steps_per_epoch} an epoch, {self.warmup_steps:g} of warm-up; lr {self.lr:.4g}"
        )


def batch_size(params: "EncoderAndDataParams", accumulated: int) -> int:
    """Images of one process in one batch.

    Raises:
        ValueError: `global_batch_size` cannot be shared out equally.
    """
    if params.global_batch_size is None:
        return params.batch_size
    shares = ddp.world_size() * accumulated
    if params.global_batch_size % shares:
        raise ValueError(
            f"global_batch_size={params.global_batch_size} is not divisible by {shares} = {ddp.world_size()} processes "
            f"x {accumulated} accumulated batches: choose a multiple of {shares}"
        )
    return params.global_batch_size // shares


def checked_batch_size(params: "EncoderAndDataParams", accumulated: int, loader: Any) -> int:
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


def get_plan(params: "EncoderAndDataParams", trainer: pl.Trainer, warmup_epochs: float = 0) -> Plan:
    """The Trainer's length in optimizer steps, and the learning rate for its number of images in one of them
    (linear scaling: https://arxiv.org/abs/1706.02677; square root: https://arxiv.org/abs/1404.5997)."""
    steps, accumulated = trainer.estimated_stepping_batches, trainer.accumulate_grad_batches
    if not 1 <= steps < math.inf:
        raise ValueError("the loader has no length: tell the Trainer max_steps, which the schedules need")
    steps_per_epoch = math.ceil(min(steps, trainer.num_training_batches / accumulated))
    if (warmup := warmup_epochs * steps_per_epoch) > steps:
        rank_zero_warn(
            f"the warm-up of {warmup_epochs} epochs is longer than the training: lr={params.lr} is never reached"
        )
    size = checked_batch_size(params, accumulated, trainer.train_dataloader)
    plan = Plan(ddp.world_size(), accumulated, size, params.lr, int(steps), steps_per_epoch, warmup)
    ratio = plan.global_batch_size / params.lr_batch_size
    return evolve(plan, lr=params.lr * {None: 1.0, "linear": ratio, "sqrt": math.sqrt(ratio)}[params.lr_scaling])


def for_pretraining(params: "ModelParams", plan: Plan, adapted: Parameters, excluded: Parameters) -> dict:
    """The optimizer that `params` names over two groups of parameters, with warm-up and half a cosine per step."""
    p, lr = params, plan.lr
    groups = [{"params": list(adapted.values())}, {"params": list(excluded.values()), "weight_decay": 0.0}]
    if p.optimizer_name == "lars":
        groups[1]["adapt"] = False
        optimizer = LARS(groups, lr, p.momentum, p.weight_decay, p.lars_eta)
    elif p.optimizer_name == "sgd":
        optimizer = torch.optim.SGD(groups, lr, p.momentum, weight_decay=p.weight_decay)
    else:
        optimizer = torch.optim.AdamW(groups, lr, weight_decay=p.weight_decay)
    end = p.final_lr_schedule_value / p.lr  # all rates here are shares of the highest
    cosine = functools.partial(schedules.warmup_cosine, total_steps=plan.steps, warmup_steps=plan.warmup_steps)
    return per_step(optimizer, functools.partial(cosine, peak=1.0, end=end))


def for_linear_stage(params: "LinearClassifierMethodParams", plan: Plan, classifier: nn.Module) -> dict:
    """SGD whose rate falls to a tenth at 60 % and at 80 % of the training."""
    p = params
    optimizer = torch.optim.SGD(classifier.parameters(), plan.lr, p.momentum, weight_decay=p.weight_decay)
    return per_step(optimizer, lambda step: schedules.steps_down(step / plan.steps, milestones=(0.6, 0.8), factor=0.1))


def per_step(optimizer: torch.optim.Optimizer, rate) -> dict:
    """What `configure_optimizers` returns: the learning rate is `rate(step)` times the group's."""
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def warmup_epochs(params: "ModelParams") -> float:
    """`warmup_epochs` where it is set; else LARS has its own."""
    p = params
    return p.lars_warmup_epochs * (p.optimizer_name == "lars") if p.warmup_epochs is None else p.warmup_epochs
