"""Progress bar with images per second and the remaining time of the training, and throughput.csv."""

import csv
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from lightning_fabric.utilities.data import sized_len
from pytorch_lightning.callbacks import RichProgressBar
from pytorch_lightning.utilities import rank_zero_only
from rich.progress import BarColumn, ProgressColumn, Task, TextColumn
from rich.table import Column
from rich.text import Text

from self_supervised.safe_files import disk_errors_named, rows_of, write_rows
from self_supervised.training import run_folder

SMOOTHING = 0.05  # weight of the newest batch in the average speed
THROUGHPUT_COLUMNS = ("step", "epoch", "images_per_second")  # not in metrics.csv, since they depend on the clock


class Progress(RichProgressBar):
    """Lightning's progress bar with images per second and remaining time, and metrics as a line per epoch.

    Images per second count all processes, as a moving average over batches without validations. The remaining time is
    that until the end of the last epoch. It includes validations once there has been one.

    Args:
        file: CSV file that gets a row after each epoch, with its images per second (without validations).
        first_epoch: number of the first epoch in this file.
    """

    def __init__(self, file: Path | None = None, first_epoch: int = 1) -> None:
        super().__init__(refresh_rate=4)
        self.file = file
        self.first_epoch = first_epoch
        self.batches = 0  # in this epoch
        self.skipped = 0  # batches before them, of an epoch that is resumed in its middle
        self.seconds = 0.0  # duration of these batches
        self.seconds_per_batch: float | None = None
        self.batch_ended: float | None = None  # time; None at the start of an epoch and during validations
        self.begun = 0.0  # time
        self.first_step = 0
        self.status = ""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self.begun = time.monotonic()
        self.first_step = trainer.global_step
        self.status = ""
        if self.file is not None:
            keep_until(self.file, trainer.global_step)

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(trainer, module, batch, batch_idx)
        if self.batches == 0:
            self.skipped = batch_idx
        if self.batch_ended is None:
            self.batch_ended = time.monotonic()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any, **kwargs: Any) -> None:
        now = time.monotonic()
        took = now - self.batch_ended
        self.batch_ended = now
        self.batches += 1
        self.seconds += took
        before = took if self.seconds_per_batch is None else self.seconds_per_batch
        self.seconds_per_batch = before + SMOOTHING * (took - before)
        done = trainer.global_step - self.first_step
        left = (now - self.begun) / max(1, done) * (trainer.estimated_stepping_batches - trainer.global_step)
        images = images_in(pl_module) / max(self.seconds_per_batch, 1e-9)
        self.status = f"{images:,.0f} images/s, {timedelta(seconds=round(left))} left" if done else ""
        super().on_train_batch_end(trainer, pl_module, *args, **kwargs)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        super().on_train_epoch_end(trainer, pl_module, *args)
        if self.file is not None and self.batches:
            n = sized_len(getattr(trainer.train_dataloader, "sampler", None))  # the last batch may not be full
            skipped = images_in(pl_module) * self.skipped
            images = images_in(pl_module) * (self.skipped + self.batches)
            images = images if n is None else min(images, n * pl_module.plan.processes)
            speed = (images - skipped) / max(self.seconds, 1e-9)
            append(self.file, (trainer.global_step, trainer.current_epoch + self.first_epoch, round(speed, 1)))
        self.batches = 0
        self.seconds = 0.0
        self.batch_ended = None

    def on_validation_start(self, *args: Any, **kwargs: Any) -> None:
        super().on_validation_start(*args, **kwargs)
        self.batch_ended = None

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_validation_end(trainer, pl_module)
        if trainer.state.fn == "fit" and trainer.progress_bar_metrics:
            self.print(f"epoch {pl_module.epoch}:", scores_line(trainer.progress_bar_metrics))

    def print(self, *args: Any, **kwargs: Any) -> None:
        run_folder.say(" ".join(map(str, args)))

    def get_metrics(self, *args: Any, **kwargs: Any) -> dict:
        return {}  # next to the bar, they would wrap

    def _get_train_description(self, current_epoch: int) -> str:
        planned = self.trainer.max_epochs or -1
        text = f"Epoch {current_epoch + 1}" + (f"/{planned}" if planned > 0 else "")
        return text.ljust(len(self.validation_description))

    def configure_columns(self, trainer: pl.Trainer) -> list:
        description = TextColumn("{task.description}")
        batches = TextColumn("{task.completed:.0f}/{task.total:.0f}")
        return [description, BarColumn(bar_width=20), batches, Status(self)]


def scores_line(values: dict[str, Any]) -> str:
    """Return names and values in one line."""
    return ", ".join(f"{name} {significant(value)}" for name, value in values.items())


def significant(value: Any) -> str:
    """Return a value as it is printed: a number with four significant digits."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def images_in(module: pl.LightningModule) -> int:
    """Return the number of images in one batch of all processes."""
    return module.plan.processes * module.plan.images_read


@rank_zero_only
def keep_until(file: Path, step: int) -> None:
    """Write the heading and the rows up to `step`, from which a run resumes, and delete later rows."""
    _, rows = rows_of(file)
    write_rows(file, THROUGHPUT_COLUMNS, (row for row in rows if int(row["step"]) <= step))


@rank_zero_only
def append(file: Path, row: tuple) -> None:
    with disk_errors_named(file, in_place=True), file.open("a", newline="") as rows:
        csv.writer(rows).writerow(row)


class Status(ProgressColumn):
    """Column with speed and remaining time, next to the bar of the training."""

    def __init__(self, bar: Progress):
        super().__init__(Column(no_wrap=True))
        self.bar = bar

    def render(self, task: Task) -> Text:
        return Text(self.bar.status if task.id == self.bar.train_progress_bar_id else "")
