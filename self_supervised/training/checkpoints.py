"""Checkpoints that are written atomically, read as data only, and resumed at the exact batch.

trainer = pl.Trainer(max_epochs=320, callbacks=[Checkpoints("runs/first", every_n_steps=500)])
trainer.fit(model, ckpt_path=newest("runs/first"))
"""

import io
import os
import pickle
import signal
import subprocess
import threading
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from lightning_fabric.plugins import TorchCheckpointIO
from lightning_fabric.plugins.environments import SLURMEnvironment
from pytorch_lightning.utilities import rank_zero_info, rank_zero_warn
from pytorch_lightning.utilities.exceptions import SIGTERMException

from self_supervised import distributed
from self_supervised.data.batches import ResumableDataLoader
from self_supervised.folder_lock import locked
from self_supervised.numerics import not_finite
from self_supervised.safe_files import atomic_file, disk_errors_named, local_path
from self_supervised.torch_files import UNSUPPORTED, safe_load

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
OF_TENSORS = ("state_dict", "optimizer_states")  # the large parts of a checkpoint
EXIT_TO_RESTART = 75  # exit status after a signal where torchrun would take 0 for the end of the training (EX_TEMPFAIL)


# ---- Reading ----


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Return a checkpoint's content, on the CPU.

    Raises:
        FileNotFoundError, ValueError, OSError, MemoryError: as `safe_load`; also ValueError if it is not a checkpoint.
    """
    content = safe_load(path)
    if not isinstance(content, dict) or "state_dict" not in content:
        raise ValueError(f"{path} is not a checkpoint: it has no state_dict")
    return content


def name_at(step: int) -> str:
    """Return the file name of the checkpoint of an optimizer step."""
    return f"step_{step:09d}.ckpt"


def refuse_going_back(folder: Path, step: int, way_out: str) -> None:
    """Raise ValueError if a folder has a valid checkpoint of a later step than that at which a training starts."""
    later = [path for path in folder.glob("step_*.ckpt") if path.name > name_at(step)]
    if later and (ahead := newest(folder)) in later:
        raise ValueError(
            f"{ahead} is of an earlier run that went further than step {step}, where this run starts. {way_out}"
        )


def newest(folder: str | Path) -> Path | None:
    """Return the newest valid checkpoint of `Checkpoints` in a folder, or None if there are no checkpoints.

    Corrupt ones are reported and skipped.

    Raises:
        ValueError: there are checkpoints, but none of them is valid, or the folder is a URL.
        OSError, MemoryError: the machine could not read the newest, so all processes stop instead of choosing another.
    """
    paths = sorted(local_path("folder", folder).glob("step_*.ckpt"), reverse=True)
    for path in paths:
        try:
            read_checkpoint(path)
        except (ValueError, FileNotFoundError) as error:  # a training that still runs may have removed it
            rank_zero_warn(f"{error}; trying the checkpoint before it")
        else:
            return path
    if paths:
        raise ValueError(f"none of the {len(paths)} checkpoints in {folder} is valid. Move them away to start over.")
    return None


# ---- Writing ----


def take_back_begun_batch(checkpoint: dict) -> None:
    """Subtract a batch that has begun but not ended from the counters of a checkpoint: it is trained on after resuming.
    The second call changes nothing."""
    loop = checkpoint["loops"]["fit_loop"]
    batches = loop["epoch_loop.batch_progress"]
    begun = batches["current"]["ready"] - batches["current"]["processed"]
    started = batches["current"]["started"] - batches["current"]["processed"]  # not yet in on_train_batch_start
    for position in loop["state_dict"].get("combined_loader", []):
        if ResumableDataLoader.is_position(position):
            position["batches"] -= begun
    for counter in batches["total"], batches["current"]:
        counter["ready"] -= begun
        counter["started"] -= started


def writable_content(content: dict[str, Any]) -> dict[str, Any]:
    """Return what to write of a checkpoint, of which only data is read: NumPy's numbers become Python's, and the state
    of a callback that holds other objects is left out with a warning.

    Raises:
        ValueError: another part holds objects.
    """
    parts = {name: part for name, part in content.items() if name not in OF_TENSORS}
    parts = with_own_numbers(parts)
    states = parts.get("callbacks", {})
    for name in list(states):
        if held := objects_in(states[name]):
            rank_zero_warn(f"the state of the callback {name} is not saved: it holds {held}, and only data can be read")
            del states[name]
    for name, part in parts.items():
        if held := objects_in(part):
            raise ValueError(
                f"{name}: a checkpoint with it could not be read again, because it holds {held}. Let state_dict() or "
                "on_save_checkpoint() keep only numbers, texts, tensors, and lists or dicts of them."
            )
    return {**content, **parts}


def with_own_numbers(part: Any) -> Any:
    """Return a part of a checkpoint with Python's numbers in place of NumPy's. Other objects stay as they are."""
    if isinstance(part, np.generic):
        return part.item()
    if type(part) is dict:
        return {with_own_numbers(key): with_own_numbers(value) for key, value in part.items()}
    return type(part)(map(with_own_numbers, part)) if type(part) in (list, tuple) else part


def objects_in(part: Any) -> str:
    """Return which object keeps a part of a checkpoint from being read as data only, or an empty text."""
    written = io.BytesIO()
    try:
        torch.save(part, written)
        written.seek(0)
        torch.load(written, weights_only=True)
    except (pickle.PicklingError, AttributeError, TypeError) as error:  # the last two: of local and open objects
        return str(error)
    except pickle.UnpicklingError as error:
        match = UNSUPPORTED.search(str(error))
        return match[1] if match else str(error)
    return ""


class SafeCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoint plugin, with atomic writes and with reads as data only."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        if "://" in str(path):  # a URL, which fsspec writes
            return super().save_checkpoint(checkpoint, path, storage_options)
        content = writable_content(checkpoint)
        with atomic_file(Path(path)) as unfinished, unfinished.open("wb") as file:
            torch.save(content, file)

    def load_checkpoint(self, path: str | Path, *_: Any, **__: Any) -> dict[str, Any]:
        """Return a checkpoint's content, without states of callbacks that are filed under a class, not under a name:
        to load them would look up the class."""
        content = read_checkpoint(path)
        states = content.get("callbacks", {}).items()
        return {**content, "callbacks": {key: state for key, state in states if isinstance(key, str)}}


class Checkpoints(pl.Callback):
    """Callback that saves every n optimizer steps and after every epoch, and stops cleanly on SIGTERM and SIGUSR1.

    A run that is resumed from one of its files ends bit-identical to an uninterrupted one (with the built-in data sets,
    and with others in a `ResumableDataLoader`). On SIGTERM it saves, and the program exits with status 0
    (75 under `torchrun --max_restarts`, which takes 0 for the end of the training). On SIGUSR1,
    which SLURM sends before the time limit if asked to (`--signal=SIGUSR1@120`), it does the same, and requeues the job
    under SLURM. During a validation, or a test after a training, both take effect after it.

    Args:
        folder: local or mounted directory of the files `step_N.ckpt`, N optimizer steps. It is locked while a training
            writes into it.
        every_n_steps: optimizer steps between files; None: after epochs only.
        keep: number of newest files that are kept.
    """

    def __init__(self, folder: str | Path, every_n_steps: int | None = 1000, keep: int = 2):
        if keep < 1 or (every_n_steps is not None and every_n_steps < 1):
            raise ValueError(f"keep={keep} and every_n_steps={every_n_steps} must be at least 1")
        self.folder = local_path("folder", folder)
        self.every_n_steps = every_n_steps
        self.keep = keep
        self.lock = ExitStack()
        self.last_saved = 0  # optimizer step
        self.validated = False  # whether there was a validation since the last batch
        self.handlers: dict = {}  # signal -> its handler before ours
        self.listens = False  # whether signals are noted; otherwise they go to the earlier handler
        self.received: int | None = None  # number of the signal
        self.asked: Callable[[], bool] = bool  # whether any process had a signal when it was last asked; first False

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit" and distributed.is_elastic() and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            rank_zero_warn(
                "when torchrun starts processes again, it may hand on addresses of those that are gone. Set "
                "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 before torchrun, and pass --rdzv_backend c10d or --standalone"
            )
        if stage == "fit" and trainer.is_global_zero and not trainer.fast_dev_run:
            self.lock.enter_context(locked(self.folder))
        environment = trainer._accelerator_connector.cluster_environment
        if isinstance(environment, SLURMEnvironment):
            environment.auto_requeue = False  # Lightning would save in the middle of a step, to a file of its own
        self.handlers = self.listen()
        self.listens = True

    def teardown(self, *_: Any, **__: Any) -> None:
        """Restore the signal handlers and unlock the folder, also after an exception. `listens` tells our handler that
        it is done, because Lightning may install it once more."""
        self.listens = False
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        self.lock.close()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        if isinstance(exception, KeyboardInterrupt):
            written = max(self.folder.glob("step_*.ckpt"), default=None)
            state = f"the newest checkpoint is {written}" if written else f"there is no checkpoint in {self.folder} yet"
            rank_zero_info(f"stopped by Ctrl-C; {state}")
        self.teardown()

    def listen(self) -> dict:
        """Install our signal handlers and return the earlier ones. Python allows this only in the main thread."""
        if threading.current_thread() is not threading.main_thread():
            return {}
        return {number: signal.signal(number, self.note) for number in SIGNALS}

    def note(self, number: int, _: Any) -> None:
        """Handle a signal: remember it, or pass it on to the earlier handler after the training."""
        if self.listens:
            self.received = number
        else:
            signal.signal(number, self.handlers[number])
            signal.raise_signal(number)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.last_saved = trainer.global_step
        if not trainer.fast_dev_run:  # which writes nothing
            refuse_going_back(self.folder, trainer.global_step, "Resume from it, or choose another folder")
        self.listen_again()

    def listen_again(self, *_: Any) -> None:
        self.listen()  # Lightning has replaced our handler of SIGTERM

    on_validation_start = on_test_start = listen_again

    def path(self, trainer: pl.Trainer) -> Path:
        return self.folder / name_at(trainer.global_step)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int):
        # Saving waits for the start of the next batch, when the metrics of the last one are logged. It does not happen
        # after a validation within the epoch, because Lightning would skip a batch, nor between accumulated batches,
        # because their gradients are not saved.
        validated = self.validated
        self.validated = False
        if batch_idx == 0 or validated or batch_idx % trainer.accumulate_grad_batches:
            return
        stop = self.any_signal(pl_module.device)
        due = self.every_n_steps is not None and trainer.global_step - self.last_saved >= self.every_n_steps
        if due or stop:
            self.save(trainer, pl_module)
        if stop:
            self.stop(trainer)

    def any_signal(self, device: torch.device) -> bool:
        """Return whether any process has received a signal. With multiple processes this is the answer of one batch
        ago, so that none waits for it."""
        before = self.asked
        self.asked = distributed.any_process_later(self.received is not None, device)
        return (before if distributed.is_distributed() else self.asked)()

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict) -> None:
        take_back_begun_batch(checkpoint)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.save(trainer, pl_module)
        if distributed.any_process(self.received is not None, pl_module.device):
            self.stop(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.validated = True
        self.on_test_end(trainer, pl_module)

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        after_training = trainer.state.fn != "fit" and trainer.global_step > 0
        if after_training and distributed.any_process(self.received is not None, pl_module.device):
            self.stop(trainer)

    def save(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if trainer.fast_dev_run:  # a run could otherwise resume from its checkpoint
            return
        if names := not_finite(module):
            raise FloatingPointError(
                f"weights are not finite at step {trainer.global_step} ({len(names)} tensors, the first: {names[0]}): "
                f"not saved. The newest valid checkpoint is {newest(self.folder)}: resume from it with a lower lr."
            )
        for logger in trainer.loggers:
            with disk_errors_named(self.folder.parent, in_place=True):
                logger.save()  # metrics up to here are not computed again
        trainer.save_checkpoint(self.path(trainer), weights_only=False)
        self.last_saved = trainer.global_step
        if trainer.is_global_zero:
            written = [file for file in sorted(self.folder.glob("step_*.ckpt")) if file <= self.path(trainer)]
            for old in written[: -self.keep]:
                old.unlink()

    def stop(self, trainer: pl.Trainer) -> None:
        rank_zero_info(f"stopped by a signal after step {trainer.global_step}; the checkpoint is in {self.folder}")
        out_of_time = distributed.any_process(self.received == signal.SIGUSR1, trainer.strategy.root_device)
        job = os.environ.get("SLURM_JOB_ID")
        if "SLURM_ARRAY_JOB_ID" in os.environ:
            job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
        if out_of_time and job is not None and trainer.is_global_zero:
            subprocess.run(["scontrol", "requeue", job], check=True)
        self.received = None
        raise SIGTERMException(EXIT_TO_RESTART if distributed.is_elastic() else None)
