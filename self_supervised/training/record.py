"""TrainingRecord: what `self-supervised report`, `compare` and `curves` read, from a training with any Trainer."""

import math
import time
from pathlib import Path
from typing import Any

import attrs
import pytorch_lightning as pl
import yaml
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from pytorch_lightning.utilities import rank_zero_info

from model_params import nearest_preset
from self_supervised.fields import plain
from self_supervised.safe_files import atomic_write, remove, to_json
from self_supervised.training import run_folder
from self_supervised.training.monitor import LOG_INTERVAL, LogInterval
from self_supervised.training.verdict import Verdict

OF_TRAINER = (  # attributes of the Trainer that determine what it computes, named as the options of the command
    "precision", "accumulate_grad_batches", "limit_train_batches", "limit_val_batches", "gradient_clip_val",
    "log_every_n_steps",
)  # fmt: skip
RECORD = ("config.yaml", "run.json", "results.json")


class TrainingRecord(pl.Callback):
    """Callback that SelfSupervisedMethod adds to a Trainer, and that writes settings and scores of the training.

    They are the files RECORD of `run_folder`, next to metrics.csv, which is written as well if there is no CSVLogger.
    Only the first process writes. Without a directory of a logger, and where files of others have these names, nothing
    is written.
    """

    def __init__(self) -> None:
        self.folder: Path | None = None  # directory of the latest training's record; None: not recorded
        self.results: dict[str, Any] = {}
        self.began = 0.0  # time at which the training began
        self.added: CSVLogger | None = None  # ours, during the training

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.folder = logger_folder(trainer)
        if self.folder is None:
            return
        starts_over = trainer.global_step == 0
        remove(self.folder / "pretrained.evaluation")  # of the encoder as it was before
        self.results = {} if starts_over else run_folder.results_of(self.folder)
        if starts_over:
            discard(self.folder)
        facts = {"plan": str(pl_module.plan), "steps per epoch": pl_module.plan.steps_per_epoch}
        run_folder.begin_run_folder(self.folder, settings_text(trainer, pl_module), (), **facts)
        if not any(isinstance(logger, CSVLogger) for logger in trainer.loggers):
            self.added = run_folder.csv_logger(self.folder.parent, self.folder.name, trainer.global_step)
            trainer.loggers = [*trainer.loggers, self.added]
        self.results |= {"preset": nearest_preset(pl_module.params)}
        step, scores = pl_module.latest_scores
        if starts_over and step == 0 and scores:
            self.results[pl_module.starting_point()] = scores
            if self.added is not None:  # it was not there yet
                self.added.log_metrics({"epoch": 0, **scores}, step=0)
        for outdated in ("epochs", "trained encoder", "verdict"):
            self.results.pop(outdated, None)
        self.began = time.time()
        self.write(pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.folder is not None:
            minutes = self.results.get("pretraining minutes", 0) + (time.time() - self.began) / 60
            step, scores = pl_module.latest_scores
            scores = scores if step == trainer.global_step else {}  # {}: not evaluated after the last step
            self.results |= {"pretraining minutes": minutes, "epochs": trainer.current_epoch, "trained encoder": scores}
            for text in (one.text for one in trainer.callbacks if isinstance(one, Verdict) and one.text):
                self.results["verdict"] = text
            self.write(pl_module)

    def write(self, method: pl.LightningModule) -> None:
        atomic_write(self.folder / "results.json", to_json(self.results | method.labels_result(), indent=2))

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Take our logger out of the Trainer, also after an exception."""
        if self.added is not None:
            trainer.loggers = [logger for logger in trainer.loggers if logger is not self.added]
            self.added = None

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self.teardown(trainer, pl_module, "fit")


def logger_folder(trainer: pl.Trainer) -> Path | None:
    """Return the directory of the Trainer's CSVLogger, else of its TensorBoardLogger; None if it has neither, on all
    processes except the first, and if files of others are in the way."""
    loggers = [one for kind in (CSVLogger, TensorBoardLogger) for one in trainer.loggers if isinstance(one, kind)]
    if not (trainer.is_global_zero and loggers) or "://" in str(loggers[0].log_dir):
        return None
    folder = Path(loggers[0].log_dir)
    names = RECORD if isinstance(loggers[0], CSVLogger) else (*RECORD, "metrics.csv")
    if (present := [name for name in names if (folder / name).exists()]) and not is_record(folder):
        rank_zero_info(f"{folder} has its own {present[0]}, so nothing is written for `self-supervised report`")
        return None
    return folder


def is_record(folder: Path) -> bool:
    """Return whether the files of RECORD in a directory are those of an earlier training in Python."""
    try:
        starts = run_folder.starts_of(folder)
    except ValueError:
        return False
    return bool(starts) and "plan" in starts[0]


def discard(folder: Path) -> None:
    """Delete the record of an earlier training, whose logs Lightning deletes when another begins in their directory."""
    run_folder.keep_edited(folder / "config.yaml")
    for name in RECORD:
        (folder / name).unlink(missing_ok=True)


def settings_text(trainer: pl.Trainer, method: pl.LightningModule) -> str:
    """Return config.yaml: preset, options of the Trainer, and settings of the method."""
    options = {name: getattr(trainer, name) for name in OF_TRAINER}
    if any(isinstance(callback, LogInterval) for callback in trainer.callbacks):
        options["log_every_n_steps"] = None  # chosen as by the command
    for name in ("limit_train_batches", "limit_val_batches"):
        if isinstance(options[name], float) and options[name] == 1:  # the fraction; the number 1 is one batch
            options[name] = None
    planned = trainer.max_epochs or -1
    epochs = planned if planned > 0 else math.ceil(method.plan.steps / method.plan.steps_per_epoch)
    settings = attrs.asdict(method.params) | {"max_epochs": epochs}
    return yaml.safe_dump(plain({"preset": nearest_preset(method.params), **options, **settings}), sort_keys=False)


def callbacks_of_record(trainer: pl.Trainer) -> list[pl.Callback]:
    """Return the callbacks that compare and record a training, and that the Trainer does not have yet."""
    kinds: list[type[pl.Callback]] = [Verdict, TrainingRecord]  # TrainingRecord writes what the others find
    if trainer.loggers and trainer.log_every_n_steps == LOG_INTERVAL:
        kinds = [LogInterval, *kinds]
    present = {type(callback) for callback in trainer.callbacks}
    return [kind() for kind in kinds if kind not in present]
