"""The plan of a training on its Trainer: batch size, length, warm-up and learning rate."""

import math
from typing import Any

import pytorch_lightning as pl
from attrs import evolve, frozen
from lightning_fabric.utilities.data import sized_len
from pytorch_lightning.utilities import rank_zero_info

from model_params import PROTOTYPE_LOSSES, SCHEDULED, EncoderAndDataParams, ModelParams
from self_supervised import distributed
from self_supervised.data.batches import size_of_batches
from self_supervised.data.loading import images_per_batch
from self_supervised.training.trainer_state import batch_hooks_of_user


def epochs_text(epochs: float) -> str:
    return "1 epoch" if epochs == 1 else f"{epochs:g} epochs"


@frozen
class Plan:
    """Effective batch size, length and learning rate of a training. As a string: one line for the log."""

    processes: int
    accumulated: int  # accumulate_grad_batches of the Trainer
    batch_size: int  # images per process and batch
    lr: float  # highest learning rate, scaled by `lr_factor`
    steps: int  # optimizer steps of the whole training
    steps_per_epoch: int
    warmup_steps: float = 0
    lr_factor: float = 1.0  # by which `lr_scaling` multiplies all learning rates
    kind: str = "image"  # or "video"
    all_images: int | None = None  # images of a process, if they do not fill one batch
    epoch_batches: float = math.inf  # batches of an epoch on a process

    @property
    def images_read(self) -> int:
        """Images per process and batch: `batch_size`, unless there are fewer."""
        return self.all_images or self.batch_size

    @property
    def batches(self) -> int:
        """Batches per optimizer step: `accumulated`, unless an epoch has fewer."""
        return int(min(self.accumulated, self.epoch_batches))

    @property
    def global_batch_size(self) -> int:
        """Images of all processes per optimizer step."""
        return self.processes * self.batches * self.images_read

    def step_sizes(self) -> dict[str, int]:
        """Return what a checkpoint keeps as "steps", for a resumed run to compare."""
        return {
            "images": self.processes * self.accumulated * self.batch_size,
            "accumulated": self.accumulated,
            "an_epoch": self.steps_per_epoch,
        }

    def __str__(self) -> str:
        return (
            f"{self.processes} (processes) x {self.batches} (accumulated batches) x {self.images_read} "
            f"({self.kind}s) = {self.global_batch_size} {self.kind}s per optimizer step; "
            f"{self.steps} steps, {self.steps_per_epoch} an epoch, {self.warmup_steps:g} of warm-up; lr {self.lr:.4g}"
        )


def plan_of_own_optimizers(params: EncoderAndDataParams, trainer: pl.Trainer) -> Plan:
    """Return the plan of a training with optimizers of a subclass, which may have schedules of their own."""
    rates = [group["lr"] for optimizer in trainer.optimizers for group in optimizer.param_groups]
    return evolve(get_plan(params, trainer), lr=float(max(rates, default=0)), lr_factor=1.0)


def get_plan(params: EncoderAndDataParams, trainer: pl.Trainer, warmup_epochs: float = 0) -> Plan:
    """Return the plan of a training on this Trainer.

    `lr_scaling` follows the images per optimizer step: linear (https://arxiv.org/abs/1706.02677) or with their square
    root (https://arxiv.org/abs/1404.5997).
    """
    steps, steps_per_epoch = training_length(trainer)
    refuse_joined_loaders(trainer)
    accumulated, epoch_batches = trainer.accumulate_grad_batches, trainer.num_training_batches
    if math.isinf(epoch_batches):
        warmup_epochs = warmup_without_epochs(params, warmup_epochs)
    loader = trainer.train_dataloader
    size = checked_batch_size(params, accumulated, loader)
    n_images = sized_len(getattr(loader, "sampler", None)) if getattr(loader, "batch_size", None) else None
    plan = Plan(
        processes=distributed.world_size(),
        accumulated=accumulated,
        batch_size=size,
        lr=params.lr,
        steps=steps,
        steps_per_epoch=steps_per_epoch,
        warmup_steps=warmup_epochs * steps_per_epoch,
        kind=params.dataset.kind,
        all_images=n_images if n_images and n_images < size else None,
        epoch_batches=epoch_batches,
    )
    factor = lr_factor(params, plan.global_batch_size)
    plan = evolve(plan, lr=params.lr * factor, lr_factor=factor)
    report_doubts(plan, warmup_epochs)
    return plan


def report_doubts(plan: Plan, warmup_epochs: float) -> None:
    """Warn of an epoch that is shorter than a step, and of a warm-up that is as long as the training."""
    accumulated, epoch_batches = plan.accumulated, plan.epoch_batches
    if epoch_batches < accumulated:
        rank_zero_info(
            f"warning: accumulate_grad_batches={accumulated}, but an epoch has {epoch_batches} batches, so a step gets "
            f"only {epoch_batches}/{accumulated} of their mean gradient. Set it to {epoch_batches}"
        )
    if plan.steps <= plan.warmup_steps:
        rank_zero_info(
            f"warning: the warm-up of {epochs_text(warmup_epochs)} is as long as the training, or longer: "
            f"lr={plan.lr:.4g} is reached at the last step, or never"
        )


def refuse_joined_loaders(trainer: pl.Trainer) -> None:
    """Raise ValueError if a batch is a list with a batch of each loader, which would be taken for views of the same
    images, unless a hook of the user makes one batch of them."""
    loaders = trainer.train_dataloader
    if not isinstance(loaders, list | tuple) or batch_hooks_of_user(trainer):
        return
    if len(loaders) == 1:
        raise ValueError("train_dataloaders: a list with one loader. Pass the loader itself.")
    if len(loaders) > 1:
        raise ValueError(
            f"train_dataloaders: a batch of each of the {len(loaders)} loaders "
            "would be taken for views of the same images. Pass one loader of torch.utils.data.ConcatDataset."
        )


def lr_factor(params: EncoderAndDataParams, images: int) -> float:
    """Return the factor by which `lr_scaling` multiplies learning rates, for these images per optimizer step."""
    ratio = images / params.lr_batch_size
    return {None: 1.0, "linear": ratio, "sqrt": math.sqrt(ratio)}[params.lr_scaling]


def checked_batch_size(params: EncoderAndDataParams, accumulated: int, loader: Any) -> int:
    """Return the batch size of the loader, which may be the user's, or that of the settings if the loader has none.

    Raises:
        ValueError: the settings depend on a batch size that the loader does not have.
    """
    size = size_of_batches(loader)
    wanted = images_per_batch(params, accumulated)
    if size is None and params.lr_scaling is not None:
        raise ValueError(
            f"lr_scaling={params.lr_scaling!r} needs the batch_size of the loader, which has none. Set lr_scaling=None."
        )
    if params.global_batch_size is not None and size not in (None, wanted):
        raise ValueError(
            f"global_batch_size={params.global_batch_size} means {wanted} images per process and batch, but the loader "
            f"has batch_size={size}. Change one of them."
        )
    return size or wanted


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
            "max_epochs=-1: the schedules need an end. Pass max_epochs or max_steps to the Trainer as well."
        )
    if batches == 0 or trainer.limit_train_batches == 0:
        raise ValueError(
            f"limit_train_batches={trainer.limit_train_batches} leaves no batch to train on. Raise it, or pass a "
            "longer loader."
        )
    if steps == -1:
        raise ValueError(
            "max_steps=-1: the loader has no length, and the schedules need one. Pass max_steps to the Trainer."
        )
    steps = max(1, int(steps))  # max_steps=0 trains nothing
    return steps, (steps if math.isinf(batches) else math.ceil(batches / trainer.accumulate_grad_batches))


def warmup_without_epochs(params: EncoderAndDataParams, warmup_epochs: float) -> float:
    """Return the warm-up as a fraction of the training, because a loader without length has no epochs.

    The default warm-up of LARS, in epochs, would last for the whole training and becomes 0.

    Raises:
        ValueError: a setting counts epochs.
    """
    counted_in_epochs = ["lr_decay_steps", "warmup_epochs", *(f"{name}_warmup_epochs" for name in SCHEDULED)]
    if getattr(params, "loss_type", None) in PROTOTYPE_LOSSES:
        counted_in_epochs.append("prototypes_frozen_epochs")
        if params.assigns_over_queue:
            counted_in_epochs.append("queue_from_epoch")
    for name, value in ((name, getattr(params, name, None)) for name in counted_in_epochs):
        if value and (name == "lr_decay_steps" or value >= 1):
            raise ValueError(
                f"{name}={value} counts epochs, but the loader has no length. Pass limit_train_batches, the number of "
                "batches per epoch, to the Trainer."
            )
    if warmup_epochs >= 1:
        rank_zero_info("the loader has no length and therefore no epochs: LARS starts without lars_warmup_epochs")
    return warmup_epochs if warmup_epochs < 1 else 0.0


def resolved_warmup_epochs(params: ModelParams) -> float:
    """Return `warmup_epochs` if it is set, otherwise `lars_warmup_epochs` with LARS and 0 without."""
    if params.warmup_epochs is not None:
        return params.warmup_epochs
    return params.lars_warmup_epochs if params.optimizer_name == "lars" else 0.0
