"""Resuming a training with other settings: what is refused, what comes too late, and the position in the epoch."""

import math
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Timer
from pytorch_lightning.strategies.launchers import _MultiProcessingLauncher
from pytorch_lightning.trainer.states import TrainerStatus
from pytorch_lightning.utilities import rank_zero_warn

from self_supervised import distributed
from self_supervised.data.batches import ResumableDataLoader
from self_supervised.setting_groups import MAKE_GROUPS, NOT_OF_TRAINING


def refuse_unresumable(content: dict[str, Any], method: pl.LightningModule, trainer: pl.Trainer) -> None:
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
            f"settings of its run; what differs: {named or 'the encoder'}."
        )
    groups = next(iter(content.get("optimizer_states", [])), {}).get("param_groups", [])
    has_names = all("param_names" in group for group in groups)  # not in checkpoints of earlier versions
    for name in ("optimizer_name", *(() if has_names else MAKE_GROUPS)):
        if name in changed:
            raise ValueError(
                f"{name}={changed[name]!r}: the checkpoint's optimizer has state for {before[name]!r}. Resume with "
                "that value, or start a new run from its weights (encoder_weights)."
            )
    refuse_lower_limits(content, trainer)


def loads_itself(trainer: pl.Trainer | None) -> bool:
    """Return whether weights that are loaded now are loaded by a Trainer, to resume or to evaluate. A Trainer that
    brings back what the processes of `ddp_notebook` have trained does not count."""
    if trainer is None or trainer.state.status != TrainerStatus.RUNNING:
        return False
    return distributed.is_distributed() or not isinstance(trainer.strategy.launcher, _MultiProcessingLauncher)


def origin_of(content: dict[str, Any], given: str | None) -> tuple[str | None, str | None]:
    """Return the weights from which the training of a checkpoint started, and the hash of their file, and warn if
    others are `given` in vain."""
    started_from = content.get("started_from")
    if given not in (None, started_from):
        rank_zero_warn(
            f"encoder_weights={given!r} has no effect: the weights are those of the checkpoint, whose training started "
            f"from {started_from or 'random ones'}. To start from others, begin a new run."
        )
    return started_from, content.get("started_from_hash")


def epochs_done(content: dict[str, Any]) -> int:
    """Return the number of completed epochs of a checkpoint's training."""
    loop = content.get("loops", {}).get("fit_loop", {})
    return loop.get("epoch_progress", {}).get("current", {}).get("processed", 0)


def epochs_begun(content: dict[str, Any]) -> int:
    """Return the number of epochs of a checkpoint's training, with the one in which it is."""
    progress = content.get("loops", {}).get("fit_loop", {}).get("epoch_loop.batch_progress", {})
    is_within = progress.get("current", {}).get("completed", 0) > 0 and not progress.get("is_last_batch", True)
    return epochs_done(content) + is_within


def refuse_lower_limits(content: dict[str, Any], trainer: pl.Trainer) -> None:
    """Raise ValueError if the checkpoint's training is already longer than the Trainer's limits."""
    done = {"max_epochs": epochs_begun(content), "max_steps": content["global_step"]}
    for name, reached in done.items():
        limit = getattr(trainer, name)
        if limit not in (None, -1) and reached > limit:
            raise ValueError(f"{name}={limit}: the checkpoint's training has already reached {reached}. Choose more.")


def has_ended(content: dict[str, Any], trainer: pl.Trainer) -> bool:
    """Return whether no step follows the checkpoint: it has all epochs, of which a command always sets the number, or
    the time of max_time is over."""
    state = content.get("callbacks", {}).get(Timer().state_key, {})
    elapsed = state.get("time_elapsed", {}).get("train", 0)
    limits = [timer._duration for timer in trainer.callbacks if isinstance(timer, Timer) and timer._duration]
    return epochs_done(content) >= trainer.max_epochs or any(elapsed >= limit for limit in limits)


def changed_too_late(content: dict[str, Any], method: pl.LightningModule, trainer: pl.Trainer) -> dict[str, Any]:
    """Return {name: value} of settings that come too late, because the checkpoint's training is complete."""
    if not has_ended(content, trainer):
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
        before: "steps" of the checkpoint that is resumed (`Plan.step_sizes`); None: of an earlier version.
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
            "(encoder_weights)."
        )
    if now.get("an_epoch", before["an_epoch"]) != before["an_epoch"]:
        rank_zero_warn(
            f"an epoch has {now['an_epoch']} optimizer steps, but had {before['an_epoch']} in the checkpoint's run. "
            "The learning rate and the momentum m follow the new length and do not end exactly at their final values"
        )


def convert_position(content: dict[str, Any], accumulated: int) -> None:
    """Convert the position in the epoch, in place, to batches of which `accumulated` make an optimizer step."""
    before = content.get("steps", {}).get("accumulated", accumulated)
    loop = content["loops"]["fit_loop"]
    progress = loop["epoch_loop.batch_progress"]
    if progress["current"]["ready"] % before and not progress.get("is_last_batch"):
        rank_zero_warn(
            "the checkpoint was saved between the accumulated batches of a step: the first step lacks the gradients of "
            "those before. Save with Checkpoints, or at the end of an epoch"
        )
    if before == accumulated:
        return
    positions = [p for p in loop["state_dict"].get("combined_loader", []) if ResumableDataLoader.is_position(p)]
    for counts in (*positions, progress["total"], progress["current"]):
        ready = counts.get("ready")  # of a file of Lightning's ModelCheckpoint, "completed" is one behind it
        for name in counts.keys() - {"epoch"}:
            late = 0 if ready is None else ready - counts[name]
            counts[name] = math.ceil((counts[name] + late) * accumulated / before) - late
