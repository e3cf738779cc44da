"""Checkpoints that are kept: the best by a metric, and one every n epochs. `Checkpoints` keeps the newest, to resume.

Lightning's ModelCheckpoint cannot replace them. Lightning runs it after all other callbacks, so `step_N.ckpt` would
lack the best value of its own epoch. It also saves a first value that is NaN, saves only if all processes agree,
forgets the best value if a run was moved, and counts epochs from 0.
"""

import math
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.utilities import rank_zero_info, rank_zero_warn

from self_supervised import distributed
from self_supervised.catalogue import DATASETS, LABEL_FREE
from self_supervised.training.checkpoints import read_checkpoint
from self_supervised.training.trainer_state import is_cut_short


class Best(pl.Callback):
    """Callback that saves best_NAME.ckpt at the end of the epoch in which the metric NAME is best.

    The first of equal values counts. NaN is never best. Put it before `Checkpoints`, so that its files hold the best
    value up to their epoch.

    Args:
        folder: directory of the file.
        wanted: name of a logged metric. The lowest value is best if the name contains "loss", otherwise the highest;
            "NAME:min" and "NAME:max" override this.
    """

    def __init__(self, folder: str | Path, wanted: str):
        self.name, _, direction = wanted.partition(":")
        self.sign = -1 if direction == "min" or (not direction and lowest_is_best(self.name)) else 1
        self.path = Path(folder) / f"best_{self.name}.ckpt"
        self.best: float | None = None
        self.seen: set[str] = set()  # names of metrics logged so far
        self.validated = False

    @property
    def state_key(self) -> str:
        return f"Best{{{self.name}}}"

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take the best value of an earlier start from its file, if a start in between had no such callback."""
        if not self.path.is_file():
            self.best = None  # that of another directory
        elif trainer.global_step > 0:
            content = read_checkpoint(self.path)
            if content["global_step"] > trainer.global_step:  # of a training that was abandoned
                self.best = None
            elif self.best is None:
                self.load_state_dict(content["callbacks"].get(self.state_key, {"best": None}))
        dataset = pl_module.params.dataset_name
        if getattr(pl_module, "trains_on_dataset_name", True) and uses_test_labels(self.name, dataset):
            rank_zero_warn(
                f"save_best={self.name!r} selects the epoch by labels of the test set of {dataset}, which has no "
                "validation set, so test scores of that epoch are too good. Select by valid_rank_me or "
                "step_train_loss, or use the last epoch"
            )

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.validated = True
        self.seen |= set(trainer.callback_metrics)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.seen |= set(trainer.callback_metrics)
        if self.best is None and self.name not in self.seen and self.was_due(trainer):  # a resumed run may know a best
            refuse_unknown(self.name, self.seen)
        value = trainer.callback_metrics.get(self.name)
        value = None if value is None else float(value)
        is_better = is_finite(value) and (self.best is None or self.sign * value > self.sign * self.best)
        is_better = is_better and not trainer.fast_dev_run
        if distributed.on_rank_zero(lambda: is_better):  # metrics of a training step differ between processes
            self.best = value
            trainer.save_checkpoint(self.path, weights_only=False)
            rank_zero_info(f"{self.path.name}: {self.name} {value:.5g} after epoch {trainer.current_epoch + 1}")

    def was_due(self, trainer: pl.Trainer) -> bool:
        """Return whether this epoch includes a validation, so that all metrics are known at its end."""
        interval = trainer.check_val_every_n_epoch
        return self.validated if interval is None else (trainer.current_epoch + 1) % interval == 0

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best = state["best"] if is_finite(state["best"]) else None


class EveryNEpochs(pl.Callback):
    """Callback that saves epoch_N.ckpt after N epochs, for every multiple N of n."""

    def __init__(self, folder: str | Path, n: int):
        self.folder = Path(folder)
        self.n = n

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        trained = trainer.current_epoch + 1
        if trained % self.n == 0 and not (trainer.fast_dev_run or is_cut_short(trainer)):
            trainer.save_checkpoint(self.folder / f"epoch_{trained:04d}.ckpt", weights_only=False)


# ---- Names and values of metrics ----


def is_finite(value: float | None) -> bool:
    """Return whether a value can be the best. NaN cannot: it is neither higher nor lower than others."""
    return value is not None and math.isfinite(value)


def refuse_unknown(wanted: str, logged: set[str]) -> None:
    """Raise ValueError if "NAME", "NAME:min" or "NAME:max" is not among the names of logged metrics."""
    name = wanted.partition(":")[0]
    if name not in logged:
        raise ValueError(f"save_best={name!r} is not logged: choose one of {', '.join(sorted(logged))}")


def uses_test_labels(name: str, dataset_name: str) -> bool:
    """Return whether a metric depends on labels of the test set, on which most built-in data sets are validated."""
    label_free = name.startswith(tuple(f"valid_{one}" for one in LABEL_FREE))
    scored = name == "train_class_acc" or (name.startswith("valid_") and not label_free)
    return scored and dataset_name in DATASETS and DATASETS[dataset_name].validation_splits is None


def lowest_is_best(name: str) -> bool:
    """Return whether lower values of a metric are better."""
    return "loss" in name
