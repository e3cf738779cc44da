"""Pretrain an encoder, score it before and after, and train a linear classifier on it.

    self-supervised train simclr --dataset_name cifar10 --low_resolution_stem false --max_epochs 3 --linear_epochs 5

The first argument is a preset; every field of ModelParams and of RunOptions is an option: docs/command_line.md. The
environment variable DATA_PATH is the directory of the data sets. With --resume auto, the same command resumes an
interrupted run. Multiple processes: docs/distributed.md.
"""

import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import pytorch_lightning as pl
from pytorch_lightning.callbacks import LambdaCallback
from pytorch_lightning.utilities import rank_zero_only
from torch import nn

from linear_classifier import LinearClassifierMethod
from moco import SelfSupervisedMethod
from model_params import ModelParams
from self_supervised import distributed, recipes
from self_supervised.data.foreign_paths import config_of, run_of
from self_supervised.folder_lock import locked
from self_supervised.program import one_line_errors
from self_supervised.runs import (
    command_line,
    dry_run,
    earlier_run,
    effective,
    memory_plan,
    preflight,
    preview,
    trackers,
    trainers,
)
from self_supervised.runs.progress import scores_line, significant
from self_supervised.runs.run_options import RunOptions
from self_supervised.safe_files import atomic_write, check_folder, remove, to_json
from self_supervised.setting_groups import MEANING_OF_SCORES
from self_supervised.threads import use_free_cores
from self_supervised.training import parameter_groups, run_folder
from self_supervised.training.trainer_state import begun_epochs, is_cut_short
from self_supervised.training.verdict import obstacle_to, scores_at_end, verdict

ENCODER_RESULTS = ("epochs", *run_folder.LATER_SCORES, "verdict", "linear minutes", "linear epochs")  # in results.json
OUTDATED_FILES = ("linear", "linear.ckpt", "pretrained.evaluation")  # of the encoder before it is trained further


# ---- The two stages ----


def forget_other_scores(
    results: dict[str, Any], out: Path, start_name: str, settings: dict[str, Any], now: dict[str, Any]
) -> None:
    """Delete the scores before and after the training if they were computed with other settings than those of `now`,
    and can be computed again, because the method has the starting weights, named `start_name`."""
    is_scored = now["evaluations"] and now["limit_val_batches"] != 0
    baseline = run_folder.baseline_of(results)
    has_changed = any(settings.get(name, now[name]) != now[name] for name in MEANING_OF_SCORES)
    if is_scored and baseline == start_name and has_changed:
        for name in (baseline, *run_folder.LATER_SCORES[:2], "verdict"):
            results.pop(name, None)
        write_on_rank_zero(out / "results.json", results)


def validation_scores(trainer: pl.Trainer, method: pl.LightningModule, of: str = "") -> dict[str, float]:
    """Return the scores of the last epoch if the weights have not changed since, else of another validation, before
    which a line says `of` which encoder. It is logged unless an earlier process has logged it."""
    if scores := scores_at_end(method):
        return scores
    if of:
        if not (trainer.limit_val_batches and method.params.is_evaluated):
            return {}
        run_folder.say(f"Scores of the {of}:")
    loggers = trainer.loggers
    epoch = begun_epochs(trainer) - 1 + method.first_epoch
    if loggers and not method.step_metrics:  # nothing was trained
        path = Path(loggers[0].log_dir) / "metrics.csv"
        is_logged = distributed.on_rank_zero(lambda: run_folder.has_scores(path, epoch, trainer.global_step))
        trainer.loggers = [] if is_logged else loggers
    scores = next(iter(trainer.validate(method, verbose=False)), {})
    trainer.loggers = loggers
    return scores


@rank_zero_only
def write_on_rank_zero(path: Path, content: str | dict[str, Any]) -> None:
    atomic_write(path, content if isinstance(content, str) else to_json(content, indent=2))


def delete_outdated(out: Path, results: dict[str, Any]) -> None:
    """Delete what becomes outdated when the encoder is trained further: OUTDATED_FILES, among them the linear stage,
    and the scores in `results` and in results.json. Name exported files and reports, which stay.

    Every process deletes the scores: all must know whether another validation follows.
    """
    # also if results.json was moved away, or pretrained.ckpt deleted
    if (out / "pretrained.ckpt").is_file() or (out / "linear/checkpoints").is_dir():
        for name in OUTDATED_FILES:
            rank_zero_only(remove)(out / name)
        exported = [path for path in out.glob("pretrained.*") if path.suffix != ".ckpt"]
        if stale := sorted(path.name for path in (*exported, *out.glob("report.html"))):
            run_folder.say(f"{', '.join(stale)}: of the encoder before this training. Write them again after it")
    delete_results(ENCODER_RESULTS, out, results)


def delete_results(names: Sequence[str], out: Path, results: dict[str, Any]) -> None:
    """Delete results of these names, also in results.json."""
    if outdated := [name for name in names if name in results]:
        for name in outdated:
            del results[name]
        write_on_rank_zero(out / "results.json", results)


def minutes_keeper(out: Path, results: dict[str, Any], name: str) -> Callable[..., None]:
    """Return a function that writes the minutes of all starts to results.json. It is called at every checkpoint, so
    that a killed run keeps them."""
    before = results.get(name, 0)
    start = time.time()

    def write(*_: Any) -> None:
        results[name] = before + (time.time() - start) / 60
        write_on_rank_zero(out / "results.json", results)

    return write


def pretrain_stage(
    trainer: pl.Trainer, model: SelfSupervisedMethod, resumed: Path | None, out: Path, results: dict, start_name: str
) -> None:
    """Pretrain, and add the encoder's scores before and after to `results`. `start_name` is the name of the
    encoder from which a training without a checkpoint starts."""
    baseline = run_folder.baseline_of(results)
    if resumed is None or baseline is None:  # its scores are the first row of metrics.csv
        results.pop(baseline, None)
        baseline = start_name
        loggers = trainer.loggers
        if resumed is not None and (out / "pretraining/metrics.csv").is_file():
            trainer.loggers = []  # these scores would follow the rows of later steps
        results |= {baseline: validation_scores(trainer, model, baseline), **model.labels_result()}
        trainer.loggers = loggers
        write_on_rank_zero(out / "results.json", results)
    keep_minutes = minutes_keeper(out, results, "pretraining minutes")
    has_begun = False

    def begin(*_: Any) -> None:
        nonlocal has_begun
        if not has_begun:  # at the first step
            delete_outdated(out, results)
        has_begun = True

    trainer.callbacks.append(LambdaCallback(on_train_batch_start=begin, on_save_checkpoint=keep_minutes))
    run_folder.say(f"Pretraining. {dry_run.parts_text(model)}")
    trainer.fit(model, ckpt_path=resumed)
    keep_minutes()
    results |= model.labels_result()
    is_written = partial(earlier_run.is_written, out / "pretrained.ckpt", trainer.global_step)
    if has_begun or not distributed.on_rank_zero(is_written):
        if (out / "pretrained.ckpt").is_file():  # of an earlier encoder
            rank_zero_only(remove)(out / "pretrained.evaluation")
        trainer.save_checkpoint(out / "pretrained.ckpt", weights_only=False)
    # Fewer than max_epochs if max_time ended the training. If no step was trained, the Trainer does not know them.
    results.setdefault("epochs", begun_epochs(trainer))
    if "trained encoder" not in results:  # it is if the resumed run was complete (see delete_outdated)
        results["trained encoder"] = validation_scores(trainer, model, "trained encoder")
    write_on_rank_zero(out / "results.json", results)  # the test may end the run, at an unreadable image
    scores = results[baseline], results["trained encoder"]
    obstacle = obstacle_to(trainer, model, all(scores))  # now: the test replaces the loaders
    if model.params.dataset.is_custom and model.params.is_evaluated:  # other data sets are validated on the test set
        results["test set"] = next(iter(trainer.test(model, verbose=False)), {})
    results["verdict"] = verdict(baseline, *scores, obstacle)
    write_on_rank_zero(out / "results.json", results)


def forget_linear_classifier(results: dict[str, Any], out: Path) -> None:
    """Delete the scores and the file of a classifier whose training starts over."""
    delete_results(("linear classifier", "linear epochs", "linear minutes"), out, results)
    rank_zero_only(remove)(out / "linear.ckpt")


def linear_stage(
    out: Path, options: RunOptions, params: ModelParams, results: dict, encoder: nn.Module | None, settings: dict
) -> None:
    """Train a linear classifier, and add its scores to `results`. `settings` override those of
    `preflight.linear_settings`."""
    settings = preflight.linear_settings(options, params) | settings
    linear = LinearClassifierMethod.from_moco_checkpoint(out / "pretrained.ckpt", encoder, **settings)
    linear.first_epoch = run_folder.first_epoch(out)
    linear.about_labels = results.get("labels", "")  # the pretraining has logged them
    trainer = trainers.trainer_of_stage(out, "linear", options.linear_epochs, options)
    given = "auto" if options.resume else None
    resumed, step = earlier_run.resume_point(given, out, "linear", linear, trainer, options)
    if resumed is None:
        forget_linear_classifier(results, out)
    trainer.loggers = trackers.get_loggers(out, "linear", options, step)
    run_folder.say(f"Training LinearClassifierMethod on the frozen encoder. {dry_run.parts_text(linear)}")
    keep_minutes = minutes_keeper(out, results, "linear minutes")
    trainer.callbacks.append(LambdaCallback(on_save_checkpoint=keep_minutes))
    trainer.fit(linear, ckpt_path=resumed)
    keep_minutes()
    results["linear classifier"] = validation_scores(trainer, linear)
    results["linear epochs"] = epochs = begun_epochs(trainer)
    if epochs < options.linear_epochs or is_cut_short(trainer):
        run_folder.say(f"The linear stage ended in epoch {epochs} of {options.linear_epochs}: max_time is up.")
    trainer.save_checkpoint(out / "linear.ckpt", weights_only=False)
    write_on_rank_zero(out / "results.json", results)


def run_or_resume(
    out: Path,
    preset: str,
    options: RunOptions,
    params: ModelParams,
    encoder: nn.Module | None = None,
    **linear_settings: Any,
) -> dict[str, Any]:
    """Carry out a run, or the rest of an interrupted one, and return the content of results.json.

    Args:
        encoder: your own module, instead of the one that `params.encoder_arch` names; it is trained in place.
        linear_settings: fields of LinearClassifierMethodParams for the linear stage, such as batch_size.
    """
    results = {"preset": preset}
    earlier = run_folder.settings_of_run(out)  # read now: the first process writes others
    if options.resume:
        results = run_folder.results_of(out) | results
    params = earlier_run.with_lists(params, out, options.resume)
    model = SelfSupervisedMethod(params, encoder=encoder)
    model.first_epoch = run_folder.first_epoch(out)
    model.is_recorded = False  # but here
    with run_folder.logged(out / "log.txt"):
        use_free_cores()
        options = trainers.with_precision(options, model, out)
        for line in options.without_effect():
            run_folder.say(f"warning: {line}")
        trainer = trainers.trainer_of_stage(out, "pretraining", params.max_epochs, options)
        start_name = model.starting_point()  # now: resume_point reads where the checkpoint's training started
        # Nothing is written before this line, so a run that cannot be resumed stays unchanged.
        resumed, step = earlier_run.resume_point(options.resume, out, "pretraining", model, trainer, options)
        forget_other_scores(results, out, start_name, earlier, attrs.asdict(options) | attrs.asdict(params))
        of_start = earlier_run.weights_of_start(out, options.resume) if resumed else None
        weights = earlier_run.absolute(model.params.encoder_weights or of_start)
        shown = attrs.evolve(model.params, encoder_weights=weights)
        config = effective.config_text(preset, options, shown)
        run_folder.begin_run_folder(out, config, sys.argv, resumes=resumed is not None)

        def write_plan(*_: Any) -> None:
            write_on_rank_zero(out / "config.yaml", effective.config_text(preset, options, shown, model.plan))

        trainer.callbacks.append(LambdaCallback(on_train_start=write_plan))
        trainer.loggers = trackers.get_loggers(out, "pretraining", options, step)
        table = parameter_groups.printed(model.parameter_table(), params.optimizer_name, params.lr_scaling)
        write_on_rank_zero(out / "parameters.txt", table)
        pretrain_stage(trainer, model, resumed, out, results, start_name)
        write_plan()  # of a training that was complete
        if options.linear_epochs:
            linear_stage(out, options, model.params, results, encoder, linear_settings)
    return results


# ---- The command ----


@one_line_errors()
def main(arguments: Sequence[str] | None = None) -> None:
    preset, options, params = command_line.parse(sys.argv[1:] if arguments is None else arguments)
    if options.print_config:
        print(effective.config_text(preset, options, params), end="")
    elif options.preview or options.dry_run:
        with earlier_run.temporary_lists(params) as params:
            without_run(options, params)
    else:
        out = Path(options.out or f"runs/{preset}_{params.dataset_name}")
        check_folder("out", out)
        if not distributed.is_first_process():  # it has the lock for all processes of a run
            return start(out, preset, options, params)
        with locked(out), nothing_left_if_refused(out):
            start(out, preset, options, params)


def without_run(options: RunOptions, params: ModelParams) -> None:
    """Carry out what --preview, --fit_memory and --dry_run ask for instead of a run. No lists and no packs are kept."""
    for line in options.without_effect():
        print(f"warning: {line}")
    if options.preview:
        print(preview.write_preview(params, options.preview))
    if options.fit_memory:
        preflight.check_run(options, params)
        memory_plan.print_memory_plan(params, options)
    elif options.dry_run:
        preflight.check_run(options, params, decode=True)
        dry_run.run_two_steps(params, options)


@contextmanager
def nothing_left_if_refused(out: Path) -> Iterator[None]:
    """Delete what the block wrote to a directory in which no run has begun; not the files of other programs."""
    written = [path for path in (out / "log.txt", out / "splits") if not path.exists()]  # before config.yaml
    try:
        yield
    finally:
        if not (out / "config.yaml").exists():
            for path in written:
                remove(path)


def start(out: Path, preset: str, options: RunOptions, params: ModelParams) -> None:
    """Start a run, or resume an earlier one.

    Raises:
        ValueError: `out` has an earlier run that is not resumed, or the run cannot work.
    """
    resumed = None if options.resume in (None, "auto") else Path(options.resume).resolve()
    resumes_itself = options.resume == "auto" or (resumed and out.resolve() in (resumed, *resumed.parents))
    if not resumes_itself and earlier_run.has_checkpoints(out):
        raise ValueError(f"out={out}: holds an earlier run. Pass --resume auto to resume it, or another --out.")
    if options.resume:
        before = run_folder.settings_of_run(out)
        if (earlier := before.get("preset", preset)) != preset:
            raise ValueError(
                f"preset={preset!r}: {out} holds a run with preset={earlier!r}. Pass that value, or choose another "
                "--out."
            )
        if params.seed is None:
            other = {} if resumes_itself else config_of(resumed if resumed.is_dir() else run_of(resumed))
            params = attrs.evolve(params, seed=(other or before).get("seed"))  # of the resumed run
        params = earlier_run.with_resumed_lists(params, out, options.resume)
    preflight.check_run(options, params)
    if options.resume:
        earlier_run.refuse_new_lists(params, out, options.resume)
    results = run_or_resume(out, preset, options, params)
    with run_folder.logged(out / "log.txt"):
        run_folder.say(ending(out, results, options.recipe))


def ending(out: Path, results: dict[str, Any], recipe: str | None) -> str:
    """Return what a run prints at its end: results, files, and the commands that read them."""
    options = recipes.KINDS[recipe].reading_options if recipe else []
    encoder = out / "pretrained.ckpt"
    shown = {name: scores_line(value) if isinstance(value, dict) else value for name, value in results.items()}
    lines = [
        *(f"{name}: {significant(value)}" for name, value in shown.items() if value != "" and name != "labels"),
        "",
        f"encoder: {encoder}",
        f"results: {out / 'results.json'}",
        f"log: {out / 'log.txt'}",
        shlex.join(["next:", "self-supervised", "evaluate", str(encoder), *options]),
        f"      self-supervised report {shlex.quote(str(out))}  (writes {out / 'report.html'})",
    ]
    return "\n".join(lines)
