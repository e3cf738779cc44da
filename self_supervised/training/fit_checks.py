"""Checks of subclasses, and at the start of `fit`: what Lightning accepts and our hooks, settings or schedules
contradict."""

import copy
import inspect
from itertools import chain
from types import CodeType
from typing import Any

import attrs
import pytorch_lightning as pl
import torch
from lightning_fabric.utilities.data import sized_len
from pytorch_lightning.callbacks import (
    BaseFinetuning,
    BatchSizeFinder,
    GradientAccumulationScheduler,
    LearningRateFinder,
    StochasticWeightAveraging,
)
from torch.nn import SyncBatchNorm

from model_params import DROP_LAST, PROTOTYPE_LOSSES, ModelParams, normalized_layers
from self_supervised import distributed
from self_supervised.catalogue import GROUPS
from self_supervised.networks import modules
from self_supervised.training import advice
from self_supervised.training.monitor import TrainingMonitor

HOOKS = (  # those of ours that a subclass may extend, but not replace
    "setup", "teardown", "configure_callbacks", "on_fit_start", "on_train_start", "on_train_batch_start", "backward",
    "on_after_backward", "optimizer_step", "on_save_checkpoint", "on_load_checkpoint",
)  # fmt: skip
LOST_LOSS = "these weights were trained with a loss of your own, and are trained with loss_type now. Pass loss, too"
UNSHUFFLED = "shuffle_batch_norm=True: no effect on networks without batch normalization. Set it to False"
SYNCHRONIZED = (
    "shuffle_batch_norm=True: no effect with sync_batchnorm=True, whose statistics are those of all images in any "
    "order. Set one of them to False"
)
OTHER_LAGGING = (
    "the lagging model starts from other weights than the model. If you have loaded weights into the model only, load "
    "them before you build the method (encoder=...), or set encoder_weights"
)


def refuse_used_trainer(trainer: pl.Trainer) -> None:
    """Raise ValueError if a Trainer would go on counting steps after its training, with a schedule that starts over."""
    if trainer.global_step > 0 and trainer.ckpt_path is None:
        raise ValueError(
            f"global_step={trainer.global_step}: this Trainer has trained already. Build a new Trainer for each "
            "training, and pass ckpt_path to fit to continue one."
        )


def refuse_hooks_without_super(method: type[pl.LightningModule]) -> None:
    """Raise TypeError for a subclass with a hook that does not call ours, which push keys, move the lagging model, seed
    the draws, or check.

    A hook is taken to call another one if its code has the names of both this hook and `super`, or of a base class.
    """
    bases = {"super", *(base.__name__ for base in method.__mro__)}
    for name in HOOKS:
        owners = [base for base in method.__mro__ if name in vars(base)]
        first_of_ours = next((i for i, base in enumerate(owners) if is_ours(base)), 0)
        for owner in owners[:first_of_ours]:
            hook = inspect.unwrap(vars(owner)[name])
            code = getattr(hook, "__code__", None)
            if code is None or hook.__name__ != name:  # of a decorator, which hides the function
                continue
            used = names_used(code)
            if name not in used or not bases & used:
                raise TypeError(
                    f"{owner.__name__}.{name} replaces a hook without which the method does not work. Call "
                    f"super().{name}(...) in its own body, or use a Callback."
                )


def is_ours(owner: Any) -> bool:
    """Return whether a class or function is one of this library."""
    return owner.__module__.partition(".")[0] in ("moco", "linear_classifier", "self_supervised")


def check_patterns(method: pl.LightningModule) -> None:
    """Raise ValueError if a pattern of the settings matches no parameter. Networks that a subclass adds are not there
    yet, so its patterns are checked when the training starts."""
    if is_ours(type(method).__init__):
        method.parameter_table()


def names_used(code: CodeType) -> set[str]:
    """Return the names that the code of a function, and of the functions within it, uses."""
    inner = (names_used(constant) for constant in code.co_consts if isinstance(constant, CodeType))
    return {*code.co_names, *chain.from_iterable(inner)}


def refuse_manual_optimization(method: pl.LightningModule) -> None:
    """Raise ValueError for a subclass with manual optimization, in which Lightning does not call the hooks that move
    the lagging model and the learning rate."""
    if not method.automatic_optimization:
        raise ValueError(
            "automatic_optimization=False: the lagging model, the queue and the learning rate would not follow the "
            "steps. Leave it out, and use one optimizer."
        )


def refuse_frozen(method: pl.LightningModule) -> None:
    """Raise ValueError if there is nothing to train, for example after Lightning's `freeze`."""
    if not modules.requires_gradient(method):
        raise ValueError(
            "requires_grad=False for all weights, as after freeze(): there is nothing to train. Call unfreeze(), or "
            "classifier.requires_grad_() of a classifier whose encoder stays frozen."
        )


def try_one_image(method: pl.LightningModule) -> None:
    """Raise ValueError if the networks cannot train on a batch of one image."""
    p = method.params
    side = min(view.crop_size for view in getattr(p, "views", [p]))
    images = torch.zeros(1, *p.input_shape[:-2], side, side, device=method.device, dtype=method.dtype)
    copied = copy.deepcopy(method)
    getattr(copied, "encode", copied)(images)  # a classifier has no heads to encode with


def refuse_one_image(method: pl.LightningModule) -> None:
    """Raise ValueError if a batch of one image, on all processes together, contradicts the settings. A user's loss or
    training step may be able to learn from it."""
    has_own_step = not is_ours(type(method).training_step)
    if distributed.world_size() > 1 or getattr(method, "custom_loss", None) is not None or has_own_step:
        return
    try:
        attrs.evolve(method.params, batch_size=1, global_batch_size=None)
    except ValueError as error:
        raise ValueError(f"a batch has one image: {error} If it is the last one, set {DROP_LAST}.") from error


def refuse_last_batch_of_one(method: pl.LightningModule) -> None:
    """Raise ValueError at the start of a training, not after an epoch, if its last batch has one image and the method
    cannot train on it."""
    loader, n_batches = method.trainer.train_dataloader, method.trainer.num_training_batches
    n, size = sized_len(getattr(loader, "sampler", None)), getattr(loader, "batch_size", None)
    is_read = n and size and n_batches * size > n and method.plan.steps >= method.plan.steps_per_epoch
    if is_read and n % size == 1 and not getattr(loader, "drop_last", False):
        try_one_image(method)
        refuse_one_image(method)


def doubts_at_start(method: pl.LightningModule) -> list[str]:
    """Return the lines of `advice`, on a loss of the user that was not passed again, on shuffling in vain, and on a
    lagging model that starts from other weights.

    Raises:
        ValueError: the lagging model has parameters of other shapes, because a network was replaced.
    """
    p = method.params
    replaces_all = method.custom_loss is not None and p.loss_type not in PROTOTYPE_LOSSES  # else prototypes stay
    has_own_optimizer = not is_ours(type(method).configure_optimizers)
    lines = advice.doubts(p, method.plan, advice.CUSTOM_LOSS if replaces_all else p.loss_type, has_own_optimizer)
    lines += advice.doubts_of_max_epochs(p, method.trainer)
    lines += [LOST_LOSS] if method.lost_loss and method.custom_loss is None else []
    lines += doubts_of_shuffling(method) if p.shuffle_batch_norm else []
    weights = [tuple(list(network.parameters()) for network in pair) for pair in method.lagging_pairs()]
    if any([w.shape for w in lagging] != [w.shape for w in online] for lagging, online in weights):
        raise ValueError(modules.REPLACED)
    if not any(isinstance(callback, TrainingMonitor) for callback in method.trainer.callbacks):
        return []  # a Tuner tries batch sizes or learning rates, without callbacks and from step 0 each time
    same = all(torch.equal(*each) for lagging, online in weights for each in zip(lagging, online, strict=True))
    return lines if same or method.was_trained or method.global_step > 0 else [*lines, OTHER_LAGGING]


def doubts_of_shuffling(method: pl.LightningModule) -> list[str]:
    """Return a line if `shuffle_batch_norm` does not change the batch statistics of keys."""
    if not modules.has_batch_norm(method):
        return [UNSHUFFLED]
    layers = (layer for layer in method.modules() if hasattr(layer, "running_mean"))
    is_synchronized = distributed.world_size() > 1 and all(isinstance(layer, SyncBatchNorm) for layer in layers)
    return [SYNCHRONIZED] if is_synchronized else []


def refuse_constant_heads(params: ModelParams) -> None:
    """Raise ValueError if group norm has one unit in each group, so that its output is 0 for every image. It is refused
    here, so that checkpoints with it can still be loaded."""
    constant = [name for kind, width, name, _ in normalized_layers(params) if kind == "gn" and width == GROUPS]
    if constant:
        raise ValueError(
            f"{constant[0]}={GROUPS}: group norm has {GROUPS} groups; with one unit in each, its output is 0 for "
            f"every image. Choose {2 * GROUPS} or another multiple of {GROUPS}."
        )


def refuse_subsets(params: Any) -> None:
    """Raise ValueError for settings that choose among the images of `dataset_name`, which are not those of a loader."""
    whole = {"data_fraction": 1.0, "label_fraction": None, "labels_per_class": None, "validate_on": "test"}
    names = [name for name, value in whole.items() if getattr(params, name, value) != value]
    if names:
        given, off = (", ".join(f"{name}={value[name]!r}" for name in names) for value in (attrs.asdict(params), whole))
        raise ValueError(f"{given}: no effect on your own loader. Choose its images yourself, and set {off}.")


def refuse_finetuning(callbacks: list[pl.Callback]) -> None:
    """Raise ValueError for callbacks that add parameter groups in the middle of a training."""
    for callback in callbacks:
        if isinstance(callback, BaseFinetuning):
            raise ValueError(
                f"{type(callback).__name__} adds parameter groups that the learning rate schedule does not have. Use "
                "encoder_lr of LinearClassifierMethod, or start a second training in which these weights are trained."
            )


def refuse_callbacks(callbacks: list[pl.Callback], learning_rates: set[float]) -> None:
    """Raise ValueError for Lightning's callbacks that would silently override the settings.

    Args:
        callbacks: those of the Trainer.
        learning_rates: the highest learning rates of all parameter groups.
    """
    for callback in callbacks:
        if isinstance(callback, StochasticWeightAveraging):
            raise ValueError(
                "StochasticWeightAveraging replaces the learning rate schedule and resets the statistics of every "
                "batch norm, even of a frozen encoder. Use WeightAveraging or EMAWeightAveraging."
            )
        if isinstance(callback, GradientAccumulationScheduler):
            raise ValueError(
                "GradientAccumulationScheduler changes the images per step after the schedules were built. Use "
                "Trainer(accumulate_grad_batches=...)."
            )
        if isinstance(callback, LearningRateFinder | BatchSizeFinder) and not callback._early_exit:
            raise ValueError(
                f"{type(callback).__name__} runs as a callback only after the learning rate schedule was built. Call "
                "lr_find or scale_batch_size of a Tuner(trainer), then trainer.fit(model)."
            )
        if isinstance(callback, LearningRateFinder) and len(learning_rates) > 1:
            raise ValueError(
                f"lr_find tries the same learning rate for all parameter groups, but here they have "
                f"{len(learning_rates)} ({', '.join(f'{lr:g}' for lr in sorted(learning_rates))}). Leave out "
                "parameter_options, layer_decay, encoder_lr and online_classifier during the search."
            )
