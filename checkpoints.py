"""Checkpoints that survive: written whole or not at all, read as data only, resumed at the very batch.

trainer = pl.Trainer(max_epochs=320, callbacks=[Checkpoints("runs/first", every_n_steps=500)])
trainer.fit(model, ckpt_path=newest("runs/first"))
"""

import os
import signal
import subprocess
import threading
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric.plugins import TorchCheckpointIO
from lightning_fabric.plugins.environments import SLURMEnvironment
from pytorch_lightning.utilities import rank_zero_info, rank_zero_warn
from pytorch_lightning.utilities.exceptions import SIGTERMException

import ddp
from folder_lock import locked
from loader import Loader
from safe_load import safe_load
from whole_files import whole

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


def read(path: str | Path) -> dict[str, Any]:
    """A checkpoint's content, on the CPU. Raises what `safe_load` raises, and ValueError if it is no checkpoint."""
    content = safe_load(path)
    if not isinstance(content, dict) or "state_dict" not in content:
        raise ValueError(f"{path} is no checkpoint: it has no state_dict")
    return content


def newest(folder: str | Path) -> Path | None:
    """The newest good checkpoint that `Checkpoints` left in a folder, or None. Damaged ones are named and passed over.

    Raises:
        ValueError: there are checkpoints, and none of them is good.
    """
    found = sorted(Path(folder).expanduser().glob("step_*.ckpt"), reverse=True)
    for path in found:
        try:
            read(path)
        except (ValueError, FileNotFoundError) as error:  # a training that still runs may have removed it
            rank_zero_warn(f"{error}; trying the checkpoint before it")
        else:
            return path
    if found:
        raise ValueError(f"none of the {len(found)} checkpoints in {folder} is good: move them away to start anew")
    return None


class SafeCheckpointIO(TorchCheckpointIO):
    """Lightning's, but a file appears under its name only when all of it is on the disk, and is read as data only."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        if "://" in str(path):  # fsspec's business
            return super().save_checkpoint(checkpoint, path, storage_options)
        with whole(Path(path)) as unfinished, unfinished.open("wb") as file:
            torch.save(checkpoint, file)

    def load_checkpoint(self, path: str | Path, *_: Any, **__: Any) -> dict[str, Any]:
        return read(path)


class Checkpoints(pl.Callback):
    """Saves every n optimizer steps and after every epoch, keeps the newest ones, and stops cleanly when asked to.

    Resumed from one of its files, a run ends with the same bits as if it had never been interrupted (with data sets of
    ours, and with others in a `loader.Loader`). On SIGTERM it saves, and the program exits with status 0. So it does on
    SIGUSR1, which SLURM sends before the time is up if told so (`--signal=SIGUSR1@120`); under SLURM the job is then
    queued again. Both wait for a validation to end.

    Args:
        folder: of the files `step_N.ckpt`, N optimizer steps. It is locked while a training writes into it.
        every_n_steps: optimizer steps between files; None: after epochs only.
        keep: how many of the newest files stay.
    """

    def __init__(self, folder: str | Path, every_n_steps: int | None = 1000, keep: int = 2):
        if keep < 1 or (every_n_steps is not None and every_n_steps < 1):
            raise ValueError(f"keep={keep} and every_n_steps={every_n_steps} must be at least 1")
        self.folder, self.every_n_steps, self.keep = Path(folder).expanduser(), every_n_steps, keep
        self.lock = ExitStack()
        self.last_saved = 0
        self.begun_batches = 0
        self.validated = False  # since the last batch
        self.handlers: dict = {}  # those before ours
        self.listens = False
        self.received: int | None = None  # signal
        self.asked: Callable[[], bool] = lambda: False

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit" and trainer.is_global_zero and not trainer.fast_dev_run:
            self.lock.enter_context(locked(self.folder))
        environment = trainer._accelerator_connector.cluster_environment
        if isinstance(environment, SLURMEnvironment):
            environment.auto_requeue = False  # it saves in the middle of a step, and a file of its own
        self.handlers = self.listen()
        self.listens = True

    def teardown(self, *_: Any, **__: Any) -> None:
        """Also after an exception. Lightning may put our handler back once more, so it must know that we are done."""
        self.listens = False
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        self.lock.close()

    on_exception = teardown

    def listen(self) -> dict:
        """Note the signals from here on; returns the handlers before."""
        if threading.current_thread() is not threading.main_thread():
            return {}
        return {number: signal.signal(number, self.note) for number in SIGNALS}

    def note(self, number: int, _: Any) -> None:
        if self.listens:
            self.received = number
        else:
            signal.signal(number, self.handlers[number])
            signal.raise_signal(number)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.last_saved = trainer.global_step
        later = [path for path in self.folder.glob("step_*.ckpt") if path.name > self.path(trainer).name]
        if later and (ahead := newest(self.folder)) in later:
            raise ValueError(
                f"{ahead} is of an earlier run that went further than step {trainer.global_step}, where this one "
                "begins: resume from it, or choose another folder"
            )
        self.listen()  # again: Lightning has put its own handler of SIGTERM before ours

    def path(self, trainer: pl.Trainer) -> Path:
        return self.folder / f"step_{trainer.global_step:09d}.ckpt"

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int):
        # Here, and not at the end of the batch before, because by now its figures are logged. Not after a validation
        # within the epoch: Lightning would leave a batch out. Not between accumulated batches: their gradients are not
        # saved.
        validated, self.validated = self.validated, False
        if batch_idx == 0 or validated or batch_idx % trainer.accumulate_grad_batches:
            return
        stop = self.asked_all(pl_module.device)
        due = self.every_n_steps is not None and trainer.global_step - self.last_saved >= self.every_n_steps
        if due or stop:
            self.begun_batches = 1
            self.save(trainer, pl_module)
            self.begun_batches = 0
        if stop:
            self.stop(trainer)

    def asked_all(self, device: torch.device) -> bool:
        """Whether any process has received a signal; of several, at the batch before: nobody waits for the answer."""
        before, self.asked = self.asked, ddp.ask_all(self.received is not None, device)
        return (before if ddp.is_distributed() else self.asked)()

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict) -> None:
        """The batch that has begun when we save is trained on after resuming: it does not count yet."""
        loop = checkpoint["loops"]["fit_loop"]
        for position in loop["state_dict"].get("combined_loader", []):
            if Loader.is_position(position):
                position["batches"] -= self.begun_batches
        for counter in ("total", "current"):
            loop["epoch_loop.batch_progress"][counter]["ready"] -= self.begun_batches

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.save(trainer, pl_module)
        if ddp.any_process(self.received is not None, pl_module.device):
            self.stop(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.validated = True
        after_training = trainer.state.fn == "validate" and trainer.global_step > 0
        if after_training and ddp.any_process(self.received is not None, pl_module.device):
            self.stop(trainer)

    def save(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if trainer.fast_dev_run:  # its checkpoint would be taken for that of a run
            return
        if not all_finite(module):
            raise FloatingPointError(
                f"weights are not finite at step {trainer.global_step}: not saved; the newest good checkpoint is "
                f"{newest(self.folder)}"
            )
        for logger in trainer.loggers:
            logger.save()  # figures up to here are not computed again
        trainer.save_checkpoint(self.path(trainer), weights_only=False)
        self.last_saved = trainer.global_step
        if trainer.is_global_zero:
            files = sorted(self.folder.glob("step_*.ckpt"))
            for old in files[: files.index(self.path(trainer)) + 1][: -self.keep]:
                old.unlink()

    def stop(self, trainer: pl.Trainer) -> None:
        rank_zero_info(f"stopped by a signal after step {trainer.global_step}, saved in {self.folder}")
        out_of_time = ddp.any_process(self.received == signal.SIGUSR1, trainer.strategy.root_device)
        job = os.environ.get("SLURM_JOB_ID")
        if "SLURM_ARRAY_JOB_ID" in os.environ:
            job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
        if out_of_time and job is not None and trainer.is_global_zero:
            subprocess.run(["scontrol", "requeue", job], check=True)
        self.received = None
        raise SIGTERMException


def all_finite(module: torch.nn.Module) -> bool:
    return bool(torch.stack([p.detach().isfinite().all() for p in module.parameters()]).all())
