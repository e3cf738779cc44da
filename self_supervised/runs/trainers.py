"""Trainers of a run: of its two stages and of its dry run, from its options."""

from pathlib import Path
from typing import Any

import attrs
import pytorch_lightning as pl
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from moco import SelfSupervisedMethod
from self_supervised.runs.progress import Progress
from self_supervised.runs.run_options import RunOptions
from self_supervised.training import checkpoints, precision, run_folder
from self_supervised.training.milestones import Best, EveryNEpochs
from self_supervised.training.monitor import GradientNorms, LearningRate, LogInterval


def trainer_of_stage(out: Path, name: str, epochs: int, options: RunOptions) -> pl.Trainer:
    """Return the Trainer of one stage, without loggers. `Checkpoints` comes last, since it saves the state of the
    milestones."""
    folder = out / name / "checkpoints"
    first_epoch = run_folder.first_epoch(out)
    callbacks = [Progress(out / name / "throughput.csv", first_epoch), *logging_callbacks(options)]
    if name == "pretraining":
        callbacks += [Best(folder, wanted) for wanted in options.save_best]
        if options.save_every_n_epochs:
            callbacks.append(EveryNEpochs(folder, options.save_every_n_epochs))
    callbacks.append(checkpoints.Checkpoints(folder, options.checkpoint_every_n_steps))
    more = {"enable_model_summary": False, "default_root_dir": out}
    return lightning_trainer(options, max_epochs=epochs, callbacks=callbacks, **more)


def trainer_of_dry_run(model: SelfSupervisedMethod, options: RunOptions, callbacks: list[pl.Callback]) -> pl.Trainer:
    options = with_precision(options, model)
    quiet = {"enable_model_summary": False, "enable_progress_bar": False, "limit_val_batches": 1}
    callbacks = [*logging_callbacks(options), *callbacks]
    return lightning_trainer(options, max_epochs=model.params.max_epochs, callbacks=callbacks, **quiet)


def with_precision(options: RunOptions, model: SelfSupervisedMethod, out: Path | None = None) -> RunOptions:
    """Return the options with "auto" replaced by a precision: the resumed run's, or the fastest on this machine."""
    if options.precision != "auto":
        return options
    chosen, reason = None, "as before"
    if options.resume and out:
        resumed = [] if options.resume == "auto" else [Path(options.resume), *Path(options.resume).parents[:3]]
        stored = (run_folder.settings_of_run(folder).get("precision") for folder in [out, *resumed])
        chosen = next(filter(None, stored), None)
    if not chosen:
        chosen, reason = precision.choose(model, options.accelerator, options.n_processes)
    run_folder.say(f"precision: {chosen} ({reason})")
    return attrs.evolve(options, precision=chosen)


def logging_callbacks(options: RunOptions) -> list[pl.Callback]:
    """Return the callbacks that log more than the method itself does."""
    interval = [LogInterval()] if options.log_every_n_steps is None else []
    return [*interval, LearningRate(), *([GradientNorms()] if options.log_gradient_norms else [])]


def lightning_trainer(options: RunOptions, **more: Any) -> pl.Trainer:
    """Return a Trainer with the arguments in `options` and `more`, which win.

    Raises:
        ValueError: Lightning rejects an argument; the message names all that differ from their defaults. Or PyTorch
            would reject sync_batchnorm when the training starts.
    """
    # With SLURM, Lightning starts from a checkpoint of its own in default_root_dir, by default the current directory.
    more = {"default_root_dir": Path(__file__).parent, **more}
    given = options.trainer_arguments()
    plain = RunOptions().trainer_arguments()
    try:
        trainer = pl.Trainer(logger=False, enable_checkpointing=False, num_sanity_val_steps=0, **(given | more))
    except (TypeError, ValueError, MisconfigurationException) as error:
        refused = ", ".join(f"{name}={value!r}" for name, value in given.items() if value != plain[name])
        raise ValueError(f"{refused}: rejected by Lightning. {' '.join(str(error).split())}") from error
    if options.sync_batchnorm and trainer.world_size > 1 and trainer.strategy.root_device.type == "cpu":
        raise ValueError("sync_batchnorm=True: PyTorch synchronizes batch norm on GPUs only. Leave it out on CPUs.")
    return trainer
