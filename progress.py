"""The progress bar: images per second, and the time left for the whole training."""

import time
from datetime import timedelta
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import RichProgressBar
from rich.progress import BarColumn, ProgressColumn, Task, TextColumn
from rich.table import Column
from rich.text import Text

import run_folder

SMOOTHING = 0.05  # weight of the newest batch in the speed


class Progress(RichProgressBar):
    """Lightning's, with images per second over all processes (a moving average of batches, without validations), and
    the time until the last epoch ends, validations included once there was one."""

    def __init__(self) -> None:
        super().__init__(refresh_rate=4)
        self.seconds_per_batch: float | None = None
        self.batch_ended: float | None = None  # None: what comes now is no batch
        self.begun = (0.0, 0)  # time and step
        self.status = ""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self.begun = (time.monotonic(), trainer.global_step)
        self.status = ""

    def on_train_batch_start(self, *args: Any, **kwargs: Any) -> None:
        super().on_train_batch_start(*args, **kwargs)
        if self.batch_ended is None:
            self.batch_ended = time.monotonic()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any, **kwargs: Any) -> None:
        now = time.monotonic()
        took, self.batch_ended = now - self.batch_ended, now
        before = took if self.seconds_per_batch is None else self.seconds_per_batch
        self.seconds_per_batch = before + SMOOTHING * (took - before)
        since, first_step = self.begun
        done = trainer.global_step - first_step
        left = (now - since) / max(1, done) * (trainer.estimated_stepping_batches - trainer.global_step)
        images = pl_module.plan.processes * pl_module.plan.batch_size / max(self.seconds_per_batch, 1e-9)
        self.status = f"{images:,.0f} images/s, {timedelta(seconds=round(left))} left" if done else ""
        super().on_train_batch_end(trainer, pl_module, *args, **kwargs)

    def on_train_epoch_end(self, *args: Any, **kwargs: Any) -> None:
        super().on_train_epoch_end(*args, **kwargs)
        self.batch_ended = None

    def on_validation_start(self, *args: Any, **kwargs: Any) -> None:
        super().on_validation_start(*args, **kwargs)
        self.batch_ended = None

    def print(self, *args: Any, **kwargs: Any) -> None:
        run_folder.say(" ".join(map(str, args)))

    def get_metrics(self, *args: Any, **kwargs: Any) -> dict:
        return {name: value for name, value in super().get_metrics(*args, **kwargs).items() if name != "v_num"}

    def configure_columns(self, trainer: pl.Trainer) -> list:
        description = TextColumn("{task.description}")
        batches = TextColumn("{task.completed:.0f}/{task.total:.0f}")
        return [description, BarColumn(bar_width=20), batches, Status(self)]


class Status(ProgressColumn):
    """Speed and time left, beside the bar of the training."""

    def __init__(self, bar: Progress):
        super().__init__(Column(no_wrap=True))
        self.bar = bar

    def render(self, task: Task) -> Text:
        return Text(self.bar.status if task.id == self.bar.train_progress_bar_id else "")
