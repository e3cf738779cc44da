"""State of a Trainer: whether it validates or was cut short, and the hooks by which the user converts its batches."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytorch_lightning as pl


@contextmanager
def validating(trainer: pl.Trainer) -> Iterator[None]:
    """Let the Trainer be in the stage of validation, in which our methods prepare a batch for evaluation."""
    stage = trainer.state.stage
    trainer.validating = True
    try:
        yield
    finally:
        trainer.state.stage = stage


def is_cut_short(trainer: pl.Trainer) -> bool:
    """Return whether the training ended within its last epoch, for example by `max_time` or `max_steps`."""
    has_ended = trainer.should_stop or trainer.global_step == trainer.max_steps
    return has_ended and trainer.num_training_batches > 0 and not trainer.is_last_batch


def begun_epochs(trainer: pl.Trainer) -> int:
    """Return the number of epochs that a training has begun, all its starts together. `current_epoch` lacks the last
    one if a start makes no step."""
    return trainer.fit_loop.epoch_progress.current.started


def batch_hooks_of_user(trainer: pl.Trainer) -> set[str]:
    """Return the names of the hooks by which the method's subclass or the data module converts a batch."""
    parts = [type(part) for part in (trainer.lightning_module, trainer.datamodule) if part is not None]
    hooks = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")
    modules = {hook: [getattr(part, hook).__module__ for part in parts] for hook in hooks}
    ours = ("pytorch_lightning.", "self_supervised.")
    return {hook for hook, names in modules.items() if not all(name.startswith(ours) for name in names)}
