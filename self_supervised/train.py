"""Pretrain, then score: the encoder before and after, and a linear classifier on it.

    self-supervised train simclr --dataset_name cifar10 --low_resolution_stem false --max_epochs 3 --linear_epochs 5

The first argument is a preset; every field of ModelParams and of RunOptions is an option: docs/command_line.md.
DATA_PATH says where data sets are. With --resume auto, the same command started again goes on where it was interrupted.
Several processes: docs/distributed.md.
"""

import json
import shutil
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import attrs
import pytorch_lightning as pl
from pytorch_lightning.callbacks import LambdaCallback
from pytorch_lightning.utilities import rank_zero_only
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch import nn

from linear_classifier import LinearClassifierMethod
from moco import SelfSupervisedMethod
from model_params import ModelParams
from self_supervised import distributed
from self_supervised.data import custom
from self_supervised.data.foreign_paths import kept_lists
from self_supervised.folder_lock import locked
from self_supervised.program import one_line_errors
from self_supervised.runs import command_line, dry_run, preflight, preview, run_folder
from self_supervised.runs.command_line import RunOptions
from self_supervised.runs.progress import Progress
from self_supervised.safe_files import atomic_write, check_folder, to_json
from self_supervised.training import checkpoints, parameter_groups
from self_supervised.training.milestones import Best, EveryNEpochs, refuse_unknown
from self_supervised.training.monitor import GradientNorms, LearningRate

KEPT = ("*.ckpt", "*/checkpoints/*.ckpt")  # of a run: never overwritten by another one
OF_THE_ENCODER = ("epochs", "trained encoder", "test set", "linear minutes", "linear classifier")  # of results.json


def trainer(out: Path, name: str, epochs: int, options: RunOptions) -> pl.Trainer:
    """Of one stage, without its loggers. The milestones are made before `Checkpoints` saves what they know."""
    folder, pretraining = out / name / "checkpoints", name == "pretraining"
    milestones = [Best(folder, wanted) for wanted in options.save_best if pretraining]
    if options.save_every_n_epochs and pretraining:
        milestones.append(EveryNEpochs(folder, options.save_every_n_epochs))
    saving = checkpoints.Checkpoints(folder, options.checkpoint_every_n_steps)
    callbacks = [Progress(out / name / "throughput.csv"), *figure_callbacks(options), *milestones, saving]
    return lightning(options, max_epochs=epochs, callbacks=callbacks)


def trainer_of_dry_run(params: ModelParams, options: RunOptions, callbacks: list[pl.Callback]) -> pl.Trainer:
    quiet = {"enable_model_summary": False, "enable_progress_bar": False, "limit_val_batches": 1}
    return lightning(options, max_epochs=params.max_epochs, callbacks=[*figure_callbacks(options), *callbacks], **quiet)


def figure_callbacks(options: RunOptions) -> list[pl.Callback]:
    """What is logged beside the method's own figures."""
    return [LearningRate(), *[GradientNorms()] * options.log_gradient_norms]


def lightning(options: RunOptions, **more: Any) -> pl.Trainer:
    """Its Trainer. What it refuses is said in one line."""
    given, plain = options.trainer_arguments(), RunOptions().trainer_arguments()
    try:
        return pl.Trainer(logger=False, enable_checkpointing=False, num_sanity_val_steps=0, **given, **more)
    except (TypeError, ValueError, MisconfigurationException) as error:
        refused = ", ".join(f"{name}={value!r}" for name, value in given.items() if value != plain[name])
        raise ValueError(f"Lightning refuses {refused}: {' '.join(str(error).split())}") from error


def beginning(
    given: str | None, out: Path, name: str, method: pl.LightningModule, fit: pl.Trainer
) -> tuple[Path | None, int]:
    """The checkpoint from which a stage goes on, if there is one, and its optimizer steps.

    Raises:
        ValueError: the method or its Trainer cannot resume from it.
    """
    path = newest_of_stage(out, name) if given == "auto" else Path(given) if given else None
    if path is None:
        return None, 0
    content = checkpoints.read_checkpoint(path)
    method.on_load_checkpoint(content)  # as Lightning does before it loads: other names are translated
    try:
        checkpoints.refuse_another_model(content, method, fit)
        images = checkpoints.images_of_a_step(method.params, fit)
        checkpoints.refuse_other_steps(content.get("steps"), {"images": images})
        changed = ", ".join(f"{k}={v!r}" for k, v in checkpoints.changed_too_late(content, method, fit).items())
        if changed and name == "linear":
            start_over(out / name)
            return None, 0
        if changed:
            raise ValueError(
                f"{changed}: the training is complete. Choose more max_epochs to go on with other settings"
            )
    except ValueError as error:
        raise ValueError(f"{error}, or choose another --out (resume={given!r}: {path})") from error
    return path, content["global_step"]


def newest_of_stage(out: Path, name: str) -> Path | None:
    """The newest checkpoint of a stage. Of a finished pretraining whose step_*.ckpt were deleted, its last one."""
    found, finished = checkpoints.newest(out / name / "checkpoints"), out / "pretrained.ckpt"
    return finished if found is None and name == "pretraining" and finished.is_file() else found


def start_over(folder: Path) -> None:
    distributed.any_process(False)  # waits until all have read what is there
    distributed.on_rank_zero(lambda: shutil.rmtree(folder))


def validation_scores(fit: pl.Trainer, method: pl.LightningModule) -> dict[str, float]:
    return next(iter(fit.validate(method, verbose=False)), {})  # nothing where `evaluations` is empty


@rank_zero_only
def write_on_rank_zero(path: Path, content: str | dict[str, Any]) -> None:
    atomic_write(path, content if isinstance(content, str) else to_json(content, indent=2))


@rank_zero_only
def forget_outdated(out: Path, results: dict[str, Any]) -> None:
    """The encoder is trained further: what was scored, and the linear stage, are of the one before."""
    if outdated := [name for name in OF_THE_ENCODER if name in results]:
        for name in outdated:
            del results[name]
        shutil.rmtree(out / "linear", ignore_errors=True)
        write_on_rank_zero(out / "results.json", results)


def pretrain_stage(
    fit: pl.Trainer, model: SelfSupervisedMethod, resumed: Path | None, out: Path, results: dict
) -> None:
    """Fills in `results`: the encoder's scores before and after."""
    if resumed is None or "random encoder" not in results:  # its row begins metrics.csv
        results["random encoder"] = validation_scores(fit, model)
        write_on_rank_zero(out / "results.json", results)
        for callback in fit.callbacks:
            if isinstance(callback, Best):
                callback.scores = set(results["random encoder"])
    fit.callbacks.append(LambdaCallback(on_train_batch_start=lambda *_: forget_outdated(out, results)))
    start = time.time()
    fit.fit(model, ckpt_path=resumed)
    results["pretraining minutes"] = results.get("pretraining minutes", 0) + (time.time() - start) / 60
    results["epochs"] = fit.current_epoch  # fewer than max_epochs where max_time was up
    fit.save_checkpoint(out / "pretrained.ckpt", weights_only=False)
    results["trained encoder"] = validation_scores(fit, model)
    if model.params.dataset.is_custom and model.params.is_evaluated:  # elsewhere the validation set is the test set
        results["test set"] = next(iter(fit.test(model, verbose=False)), {})
    write_on_rank_zero(out / "results.json", results)


def linear_stage(
    out: Path, options: RunOptions, params: ModelParams, results: dict, encoder: nn.Module | None, settings: dict
) -> None:
    """Fills in `results`: the scores of a linear classifier. `settings` go before those that train.py sets."""
    settings = preflight.linear_settings(options, params) | settings
    linear = LinearClassifierMethod.from_moco_checkpoint(out / "pretrained.ckpt", encoder, **settings)
    fit = trainer(out, "linear", options.linear_epochs, options)
    resumed, step = beginning("auto" if options.resume else None, out, "linear", linear, fit)
    fit.loggers = run_folder.get_loggers(out, "linear", options.logger, step)
    run_folder.say("Training LinearClassifierMethod on the frozen encoder:")
    start = time.time()
    fit.fit(linear, ckpt_path=resumed)
    results["linear minutes"] = results.get("linear minutes", 0) + (time.time() - start) / 60
    results["linear classifier"] = validation_scores(fit, linear)
    fit.save_checkpoint(out / "linear.ckpt", weights_only=False)
    write_on_rank_zero(out / "results.json", results)


def run_or_resume(
    out: Path,
    preset: str,
    options: RunOptions,
    params: ModelParams,
    encoder: nn.Module | None = None,
    **linear_settings: Any,
) -> dict[str, Any]:
    """Carry out one run, or the rest of one, and return what results.json holds.

    Args:
        encoder: your own module, instead of the one that `params.encoder_arch` names; it is trained in place.
        linear_settings: fields of LinearClassifierMethodParams for the linear stage, such as batch_size.
    """
    results = {"preset": preset}
    if options.resume:
        results = run_folder.results_of(out) | results
    if params.dataset.is_custom:
        lists = params.splits_path or str((out / "splits").resolve())
        gone = options.resume and not Path(lists).expanduser().is_dir()  # the run was moved
        params = attrs.evolve(params, splits_path=(gone and kept_lists(out.resolve())) or lists)
        custom.has_written(params)  # refuses other settings than the lists' before config.yaml says them
    model = SelfSupervisedMethod(params, encoder=encoder)
    with run_folder.logged(out / "log.txt"):
        fit = trainer(out, "pretraining", params.max_epochs, options)
        # Before anything is written: what is refused leaves a run as it was.
        resumed, step = beginning(options.resume, out, "pretraining", model, fit)
        run_folder.begin_run_folder(out, command_line.to_yaml(preset, options, model.params), sys.argv)
        fit.loggers = run_folder.get_loggers(out, "pretraining", options.logger, step)
        table = parameter_groups.printed(model.parameter_table(), params.optimizer_name)
        write_on_rank_zero(out / "parameters.txt", table)
        pretrain_stage(fit, model, resumed, out, results)
        if options.linear_epochs:
            linear_stage(out, options, model.params, results, encoder, linear_settings)
    return results


@one_line_errors()
def main(arguments: Sequence[str] | None = None) -> None:
    do(*command_line.parse(sys.argv[1:] if arguments is None else arguments))


def do(preset: str, options: RunOptions, params: ModelParams) -> None:
    """What the command asks for."""
    if options.print_config:
        print(command_line.to_yaml(preset, options, params), end="")
    elif options.preview:
        print(preview.write_preview(params, options.preview))
    elif options.dry_run:
        preflight.check_run(options, params)
        model = dry_run.run_two_steps(params, lambda callbacks: trainer_of_dry_run(params, options, callbacks))
        for wanted in options.save_best:
            refuse_unknown(wanted, dry_run.logged_names(model))
    else:
        out = Path(options.out or f"runs/{preset}_{params.dataset_name}")
        check_folder("out", out)
        with locked(out) if distributed.is_first_process() else nullcontext():  # the others belong to it
            start(out, preset, options, params)


def start(out: Path, preset: str, options: RunOptions, params: ModelParams) -> None:
    """A new run, or the rest of an earlier one."""
    if not options.resume and any(file for pattern in KEPT for file in out.glob(pattern)):
        raise ValueError(f"out={out} holds an earlier run. Pass --resume auto to resume it, or another --out")
    if options.resume:
        before = run_folder.settings_of_run(out)
        run_folder.refuse_another_run(out, before, {"preset": preset, **attrs.asdict(params)})
        if params.seed is None:  # that of the run that we go on with
            params = attrs.evolve(params, seed=before.get("seed"))
    preflight.check_run(options, params)
    results = run_or_resume(out, preset, options, params)
    with run_folder.logged(out / "log.txt"):
        run_folder.say(json.dumps(results, indent=2))
