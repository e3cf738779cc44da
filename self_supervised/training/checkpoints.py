"""Checkpoints that are written atomically, read as data only, and resumed at the exact batch.

trainer = pl.Trainer(max_epochs=320, callbacks=[Checkpoints("runs/first", every_n_steps=500)])
trainer.fit(model, ckpt_path=newest("runs/first"))
"""

import math
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

from self_supervised import distributed
from self_supervised.data.loader import ResumableDataLoader
from self_supervised.folder_lock import locked
from self_supervised.numerics import not_finite
from self_supervised.safe_files import atomic_file, local_path, safe_load

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
GO_ON = 75  # exit status after a signal where torchrun would take 0 for the end of the training (EX_TEMPFAIL)
NOT_OF_TRAINING = (  # settings that may differ after a complete training
    "max_epochs", "evaluate_every_n_epochs", "num_data_workers", "decoding_threads", "pin_data_memory",
    "data_on_device", "torch_compile", "activation_checkpointing", "winograd", "data_path", "splits_path",
    "unreadable_images",
)  # fmt: skip
MAKE_GROUPS = (  # settings that determine the optimizer's parameter groups
    "exclude_matching_parameters_from_lars", "parameter_options", "layer_decay", "encoder_lr",
)  # fmt: skip


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
    found = sorted(local_path("folder", folder).glob("step_*.ckpt"), reverse=True)
    for path in found:
        try:
            read_checkpoint(path)
        except (ValueError, FileNotFoundError) as error:  # a training that still runs may have removed it
            rank_zero_warn(f"{error}; trying the checkpoint before it")
        else:
            return path
    if found:
        raise ValueError(f"none of the {len(found)} checkpoints in {folder} is valid. Move them away to start over")
    return None


# ---- Resuming with other settings ----


def refuse_another_model(content: dict[str, Any], method: pl.LightningModule, trainer: pl.Trainer) -> None:
    """Refuse to resume if the state in a checkpoint contradicts the settings of the method or the Trainer.

    All other settings are those of the method, from the first step on.

    Raises:
        ValueError: they contradict; names the settings.
    """
    saved = {name: tensor.shape for name, tensor in content["state_dict"].items()}
    own = {name: tensor.shape for name, tensor in method.state_dict().items()}
    differing = [key for key in {**own, **saved} if own.get(key) != saved.get(key)]
    before = content.get("hyper_parameters")
    before = before if isinstance(before, dict) else {}
    changed = {name: value for name, value in method.hparams.items() if before.get(name, value) != value}
    if differing:
        named = ", ".join(f"{name}={value!r} (checkpoint: {before[name]!r})" for name, value in changed.items())
        others = " and others" if len(differing) > 3 else ""
        raise ValueError(
            f"the checkpoint is of another model, in which {', '.join(differing[:3])}{others} differ. Resume with the "
            f"settings of its run; what differs: {named or 'the encoder'}"
        )
    groups = next(iter(content.get("optimizer_states", [])), {}).get("param_groups", [])
    has_names = all("param_names" in group for group in groups)  # not in checkpoints of earlier versions
    for name in ("optimizer_name", *(() if has_names else MAKE_GROUPS)):
        if name in changed:
            raise ValueError(
                f"{name}={changed[name]!r}: the checkpoint's optimizer has state for {before[name]!r}. Resume with "
                "that value, or start a new run from its weights (encoder_weights)"
            )
    refuse_lower_limits(content, trainer)


def epochs_done(content: dict[str, Any]) -> int:
    """Return the number of completed epochs of a checkpoint's training."""
    loop = content.get("loops", {}).get("fit_loop", {})
    return loop.get("epoch_progress", {}).get("current", {}).get("processed", 0)


def refuse_lower_limits(content: dict[str, Any], trainer: pl.Trainer) -> None:
    """Raise ValueError if the checkpoint's training is already longer than the Trainer's limits."""
    done = {"max_epochs": epochs_done(content), "max_steps": content["global_step"]}
    for name, reached in done.items():
        limit = getattr(trainer, name)
        if limit not in (None, -1) and reached > limit:
            raise ValueError(f"{name}={limit}: the checkpoint's training has already reached {reached}. Choose more")


def changed_too_late(content: dict[str, Any], method: pl.LightningModule, trainer: pl.Trainer) -> dict[str, Any]:
    """Return {name: value} of settings that come too late, because the checkpoint's training is complete."""
    if epochs_done(content) < (trainer.max_epochs or 0):
        return {}
    before = content.get("hyper_parameters", {})
    now = {name: value for name, value in method.hparams.items() if name not in NOT_OF_TRAINING}
    return {name: value for name, value in now.items() if before.get(name, value) != value}


def images_of_a_step(params: Any, trainer: pl.Trainer) -> int:
    """Return the number of images per optimizer step, according to the settings."""
    batches = trainer.num_devices * trainer.num_nodes * trainer.accumulate_grad_batches
    return params.global_batch_size or params.batch_size * batches


def refuse_other_steps(before: dict[str, int] | None, now: dict[str, int]) -> None:
    """Check that optimizer steps mean the same as before, because schedules and the position in the epoch count them.

    Args:
        before: "steps" of the checkpoint that is resumed (`Plan.of_checkpoint`); None: of an earlier version.
        now: the same of this run. "an_epoch" may be missing.

    Raises:
        ValueError: the number of images per step differs. Other steps per epoch give a warning.
    """
    if before is None:
        return
    if now["images"] != before["images"]:
        raise ValueError(
            f"batch_size: {now['images']} images per optimizer step, but the checkpoint's run had {before['images']}, "
            "and its schedules count steps. Choose batch_size (or global_batch_size), accumulate_grad_batches and the "
            "number of processes so that their product stays the same, or start a new run from its weights "
            "(encoder_weights)"
        )
    if now.get("an_epoch", before["an_epoch"]) != before["an_epoch"]:
        rank_zero_warn(
            f"an epoch has {now['an_epoch']} optimizer steps, but had {before['an_epoch']} in the checkpoint's run. "
            "The learning rate and the momentum m follow the new length and do not end exactly at their final values"
        )


def convert_position(content: dict[str, Any], accumulated: int) -> None:
    """Convert the position in the epoch, in place, to batches of which `accumulated` make an optimizer step."""
    before = content.get("steps", {}).get("accumulated", accumulated)
    if before == accumulated:
        return
    loop = content["loops"]["fit_loop"]
    positions = [p for p in loop["state_dict"].get("combined_loader", []) if ResumableDataLoader.is_position(p)]
    progress = loop["epoch_loop.batch_progress"]
    for counts in (*positions, progress["total"], progress["current"]):
        ready = counts.get("ready")  # of a file of Lightning's ModelCheckpoint, "completed" is one behind it
        for name in counts.keys() - {"epoch"}:
            late = 0 if ready is None else ready - counts[name]
            counts[name] = math.ceil((counts[name] + late) * accumulated / before) - late


# ---- Writing ----


class SafeCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoint plugin, with atomic writes and with reads as data only."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        if "://" in str(path):  # a URL, which fsspec writes
            return super().save_checkpoint(checkpoint, path, storage_options)
        with atomic_file(Path(path)) as unfinished, unfinished.open("wb") as file:
            torch.save(checkpoint, file)

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
        self.begun_batches = 0  # 1 while it saves at the start of a batch
        self.validated = False  # whether there was a validation since the last batch
        self.handlers: dict = {}  # signal -> its handler before ours
        self.listens = False  # whether signals are noted; otherwise they go to the earlier handler
        self.received: int | None = None  # number of the signal
        self.asked: Callable[[], bool] = lambda: False  # whether any process had a signal when it was last asked

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

    on_exception = teardown

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
        stop = self.asked_all(pl_module.device)
        due = self.every_n_steps is not None and trainer.global_step - self.last_saved >= self.every_n_steps
        if due or stop:
            self.begun_batches = 1
            self.save(trainer, pl_module)
            self.begun_batches = 0
        if stop:
            self.stop(trainer)

    def asked_all(self, device: torch.device) -> bool:
        """Return whether any process has received a signal. With multiple processes this is the answer of one batch
        ago, so that none waits for it."""
        before = self.asked
        self.asked = distributed.ask_all(self.received is not None, device)
        return (before if distributed.is_distributed() else self.asked)()

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict) -> None:
        """Subtract the batch that has begun when it saves, which is trained on after resuming."""
        loop = checkpoint["loops"]["fit_loop"]
        for position in loop["state_dict"].get("combined_loader", []):
            if ResumableDataLoader.is_position(position):
                position["batches"] -= self.begun_batches
        for counter in ("total", "current"):
            loop["epoch_loop.batch_progress"][counter]["ready"] -= self.begun_batches

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
                f"not saved. The newest valid checkpoint is {newest(self.folder)}: resume from it with a lower lr"
            )
        for logger in trainer.loggers:
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
        raise SIGTERMException(GO_ON if distributed.is_elastic() else None)
