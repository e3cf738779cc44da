"""Verdict on a pretraining: the scores of the encoder next to those that it had at the start, in one line."""

import math
import os
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric.utilities.data import sized_len
from pytorch_lightning.utilities import rank_zero_info
from pytorch_lightning.utilities.seed import isolate_rng
from torch.utils.data import DataLoader

from model_params import ModelParams
from self_supervised import distributed
from self_supervised.catalogue import OWN_MODULE, video_models
from self_supervised.data.batches import list_of_loaders
from self_supervised.networks import modules
from self_supervised.setting_groups import SCORE_SETTINGS
from self_supervised.training.trainer_state import validating

COMPARED = ("valid_knn20_acc", "valid_class_acc")  # starts of names; the first that was scored decides
GIVE_COMPARED = {"knn", "linear_probe"}  # evaluations that give such scores
ADVICE = "Try a third of the lr, more epochs, or another preset: docs/troubleshooting.md"


def name_of_start(params: ModelParams, started_from: str | None) -> str:
    """Return the name of the encoder from which a training starts.

    Args:
        params: settings of the training.
        started_from: weights, as `encoders.source_of_weights` names them; None: none were loaded.
    """
    if started_from is None:
        return "starting encoder" if params.encoder_arch == OWN_MODULE else "random encoder"
    if os.path.isabs(started_from) or started_from.startswith("timm:"):
        return f"weights of {os.path.basename(started_from)}"
    return f"{'Kinetics' if params.encoder_arch in video_models() else 'ImageNet'} weights"


def verdict(name: str, before: dict[str, float], after: dict[str, float], obstacle: str = "") -> str:
    """Return the verdict as one line: the first accuracy that both scores have, before and after; if there is none,
    "none, because ...".

    Args:
        name: of the encoder at the start (`name_of_start`).
        before, after: its scores, and those at the end.
        obstacle: why validation yields no accuracy (`obstacle_to`); "": it does.
    """
    both = [one for start in COMPARED for one in before if one.startswith(start) and one in after]
    if not both:
        return f"none, because {obstacle or reason_for_none(name, before, after)}"
    score = both[0]
    first, last = before[score], after[score]
    if math.isnan(first + last):
        return f"none, because {score} is not finite"
    numbers = f"{score} {first:.4g} ({name}) -> {last:.4g}"
    if first == last == 100:
        return f"{numbers}: every image was right from the start. Use harder images to compare encoders"
    if f"{first:.4g}" == f"{last:.4g}":
        return f"{numbers}: no better than the {name}. {ADVICE}"
    return f"{numbers}: better" if last > first else f"{numbers}: WORSE than the {name}. {ADVICE}"


def reason_for_none(name: str, before: dict[str, float], after: dict[str, float]) -> str:
    no_labels = "the validation images have no labels (class numbers), or a single class"
    if not before:
        return f"{no_labels}, or the {name or 'starting encoder'} was not scored before the training"
    if not after:
        return "the trained encoder was not scored"
    return no_labels if before.keys() == after.keys() else f"the {name} was scored by other evaluations"


class Verdict(pl.Callback):
    """Callback that SelfSupervisedMethod adds to any Trainer (`configure_callbacks`).

    It scores the encoder before the first step on what validation uses, logs the scores as epoch 0, keeps them in
    checkpoints, and prints the verdict at the end.
    """

    def __init__(self) -> None:
        self.name = ""
        self.before: dict[str, float] = {}
        self.measured: dict[str, Any] = {}  # how `before` was: see `measurement`
        self.text = ""  # the verdict, when the training has ended
        self.was_validated = False  # True: trainer.validate has logged the scores of the start

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.global_step == 0:
            self.name = pl_module.starting_point()
            is_logged = self.was_validated and pl_module.latest_scores[0] == 0
            self.before = {} if obstacle_to(trainer, pl_module) else score_now(trainer, pl_module)
            self.measured = measurement(trainer, pl_module) if self.before else {}
            self.text = ""
            for logger in trainer.loggers if self.before and not is_logged else ():
                logger.log_metrics({"epoch": 0, **self.before}, step=0)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.fast_dev_run:
            obstacle = obstacle_to(trainer, pl_module)
            is_scored = self.before and not obstacle
            after = scores_at_end(pl_module) or score_now(trainer, pl_module) if is_scored else {}
            self.text = verdict(self.name, self.before, after, obstacle)
            now = measurement(trainer, pl_module) if after else {}
            if any(now.get(name, value) != value for name, value in self.measured.items()):
                self.text = f"none, because the {self.name} was scored on other images, or with other settings"
            rank_zero_info(f"verdict: {self.text}")

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.was_validated |= trainer.state.fn == "validate"

    def state_dict(self) -> dict[str, Any]:
        return {"name": self.name, "before": self.before, "measured": self.measured}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.name = state["name"]
        self.before = state["before"]
        self.measured = state.get("measured", {})  # earlier versions did not keep it


def obstacle_to(trainer: pl.Trainer, module: pl.LightningModule, has_scores: bool = False) -> str:
    """Return why validation yields no accuracy, or only from loaders that cannot be read once more; "" if it does.

    Args:
        has_scores: whether it has yielded scores, so that its loaders need no look.
    """
    if not GIVE_COMPARED & set(module.params.evaluations):
        return f"evaluations={module.params.evaluations} has neither knn nor linear_probe"
    if has_scores:
        return ""
    if trainer.fast_dev_run or not trainer.limit_val_batches:
        return f"{'fast_dev_run' if trainer.fast_dev_run else 'limit_val_batches=0'} turns the validation off"
    if not trainer.enable_validation:
        return "there is no validation loader"
    if trainer.val_dataloaders is None:  # the first validation is some epochs away
        with validating(trainer):
            trainer.fit_loop.epoch_loop.val_loop.setup_data()
    loaders = list_of_loaders(trainer.val_dataloaders)
    if not all(isinstance(loader, DataLoader) for loader in loaders):
        return "a validation loader is not a DataLoader"
    return "" if loaders else "there is no validation loader, or it has no images"


def measurement(trainer: pl.Trainer, module: pl.LightningModule) -> dict[str, Any]:
    """Return what scores have in common if they can be compared: settings, and the part of each validation loader."""
    lengths = map(sized_len, list_of_loaders(trainer.val_dataloaders))  # None: of an IterableDataset
    parts = [n / (length or 1) for n, length in zip(trainer.num_val_batches, lengths, strict=True)]
    return {"parts": parts, **{name: getattr(module.params, name) for name in SCORE_SETTINGS}}


def scores_at_end(method: pl.LightningModule) -> dict[str, float]:
    """Return what the last validation of a training has logged; {} if the weights have changed since.

    A training that is resumed after its last step has logged nothing, but its verdict has scored the encoder.
    """
    step, scores = method.latest_scores
    if not 0 < step == method.global_step:
        return {}
    logged = method.trainer.callback_metrics
    return {name: float(logged.get(name, value)) for name, value in scores.items()}


def score_now(trainer: pl.Trainer, module: pl.LightningModule) -> dict[str, float]:
    """Return the scores that a validation would log, and make them the latest ones. Logs, random states and the network
    do not change, but all processes get the buffers of the first one."""
    plugin = trainer.precision_plugin
    with isolate_rng(), torch.no_grad(), modules.in_eval_mode(module), validating(trainer):
        distributed.share_buffers(module.model)
        for i, loader in enumerate(list_of_loaders(trainer.val_dataloaders)):
            for n, batch in enumerate(loader):
                if n >= trainer.num_val_batches[i]:
                    break
                batch = module._on_before_batch_transfer(plugin.convert_input(batch), dataloader_idx=i)
                with plugin.val_step_context():  # scores themselves are computed in float32
                    module.keep_embeddings(trainer.strategy.batch_to_device(batch, dataloader_idx=i), i)
        scores = {name: value for of_loader in module.scores_of_loaders() for name, value in of_loader.items()}
    module.latest_scores = (trainer.global_step, scores)
    return scores
