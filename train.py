"""Pretrain, then score: the encoder before and after, and a linear classifier on it.

    python train.py simclr --dataset_name cifar10 --low_resolution_stem false --max_epochs 3 --linear_epochs 5

The first argument is a preset; every field of ModelParams and of RunOptions is an option: docs/command_line.md.
DATA_PATH says where data sets are. With --resume auto, the same command started again goes on where it was interrupted.
Several processes: docs/distributed.md.
"""

import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import attrs
import pytorch_lightning as pl
from pytorch_lightning.callbacks import LambdaCallback
from pytorch_lightning.utilities import rank_zero_only
from pytorch_lightning.utilities.exceptions import MisconfigurationException

import checkpoints
import command_line
import dry_run
import image_folders
import own_images
import parameter_options
import preflight
import preview
import run_folder
from gradient_norms import GradientNorms
from learning_rate import LearningRate
from linear_classifier import LinearClassifierMethod
from milestones import Best, EveryNEpochs, refuse_unknown
from moco import SelfSupervisedMethod
from model_params import ModelParams
from progress import Progress
from run_options import RunOptions
from whole_files import check_folder, write_whole

OF_THE_ENCODER = ("epochs", "trained encoder", "test set", "linear minutes", "linear classifier")  # of results.json


def trainer(out: Path, name: str, epochs: int, options: RunOptions) -> pl.Trainer:
    """Of one stage, without its loggers. The milestones are made before `Checkpoints` saves what they know."""
    folder, pretraining = out / name / "checkpoints", name == "pretraining"
    milestones = [Best(folder, wanted) for wanted in options.save_best if pretraining]
    if options.save_every_n_epochs and pretraining:
        milestones.append(EveryNEpochs(folder, options.save_every_n_epochs))
    saving = checkpoints.Checkpoints(folder, options.checkpoint_every_n_steps)
    callbacks = [Progress(out / name / "throughput.csv"), *figures(options), *milestones, saving]
    return lightning(options, max_epochs=epochs, callbacks=callbacks)


def trainer_of_dry_run(params: ModelParams, options: RunOptions, callbacks: list[pl.Callback]) -> pl.Trainer:
    quiet = {"enable_model_summary": False, "enable_progress_bar": False, "limit_val_batches": 1}
    return lightning(options, max_epochs=params.max_epochs, callbacks=[*figures(options), *callbacks], **quiet)


def figures(options: RunOptions) -> list[pl.Callback]:
    """What is logged beside the method's own figures."""
    return [LearningRate(), *[GradientNorms()] * options.log_gradient_norms]


def lightning(options: RunOptions, **more: Any) -> pl.Trainer:
    """Its Trainer. What it refuses is said in one line."""
    given, plain = options.of_the_trainer(), RunOptions().of_the_trainer()
    try:
        return pl.Trainer(logger=False, enable_checkpointing=False, num_sanity_val_steps=0, **given, **more)
    except (TypeError, ValueError, MisconfigurationException) as error:
        refused = ", ".join(f"{name}={value!r}" for name, value in given.items() if value != plain[name])
        raise ValueError(f"Lightning refuses {refused}: {' '.join(str(error).split())}") from error


def beginning(given: str | None, out: Path, name: str, method: pl.LightningModule) -> tuple[Path | None, int]:
    """The checkpoint from which a stage goes on, if there is one, and its optimizer steps.

    Raises:
        ValueError: it is of another model.
    """
    path = checkpoints.newest(out / name / "checkpoints") if given == "auto" else Path(given) if given else None
    if path is None:
        return None, 0
    content = checkpoints.read(path)
    method.on_load_checkpoint(content)  # as Lightning does before it loads: other names are translated
    saved, own = ({k: v.shape for k, v in state.items()} for state in (content["state_dict"], method.state_dict()))
    differing = [key for key in {**own, **saved} if own.get(key) != saved.get(key)]
    if differing:
        raise ValueError(
            f"resume={given!r}: {path} is of another model, in which {', '.join(differing[:3])} "
            f"{'and others ' * (len(differing) > 3)}differ: give the settings of its run, or choose another --out"
        )
    return path, content["global_step"]


def score(fit: pl.Trainer, method: pl.LightningModule) -> dict[str, float]:
    return next(iter(fit.validate(method, verbose=False)), {})  # nothing where `evaluations` is empty


@rank_zero_only
def write(path: Path, content: str | dict[str, Any]) -> None:
    write_whole(path, content if isinstance(content, str) else json.dumps(content, indent=2))


@rank_zero_only
def forget(out: Path, results: dict[str, Any]) -> None:
    """The encoder is trained further: what was scored, and the linear stage, are of the one before."""
    if outdated := [name for name in OF_THE_ENCODER if name in results]:
        for name in outdated:
            del results[name]
        shutil.rmtree(out / "linear", ignore_errors=True)
        write(out / "results.json", results)


def pretrain(fit: pl.Trainer, model: SelfSupervisedMethod, resumed: Path | None, out: Path, results: dict) -> None:
    """Fills in `results`: the encoder's scores before and after."""
    if resumed is None or "random encoder" not in results:  # its row begins metrics.csv
        results["random encoder"] = score(fit, model)
        write(out / "results.json", results)
        for callback in fit.callbacks:
            if isinstance(callback, Best):
                callback.scores = set(results["random encoder"])
    fit.callbacks.append(LambdaCallback(on_train_batch_start=lambda *_: forget(out, results)))
    start = time.time()
    fit.fit(model, ckpt_path=resumed)
    results["pretraining minutes"] = results.get("pretraining minutes", 0) + (time.time() - start) / 60
    results["epochs"] = fit.current_epoch  # fewer than max_epochs where max_time was up
    fit.save_checkpoint(out / "pretrained.ckpt", weights_only=False)
    results["trained encoder"] = score(fit, model)
    if model.params.dataset.own and model.params.is_evaluated:  # elsewhere the validation set is the test set
        results["test set"] = next(iter(fit.test(model, verbose=False)), {})
    write(out / "results.json", results)


def train_classifier(out: Path, options: RunOptions, params: ModelParams, results: dict[str, Any]) -> None:
    settings = preflight.linear_settings(options, params)
    linear = LinearClassifierMethod.from_moco_checkpoint(out / "pretrained.ckpt", **settings)
    resumed, step = beginning("auto" if options.resume else None, out, "linear", linear)
    fit = trainer(out, "linear", options.linear_epochs, options)
    fit.loggers = run_folder.get_loggers(out, "linear", options.logger, step)
    start = time.time()
    fit.fit(linear, ckpt_path=resumed)
    results["linear minutes"] = results.get("linear minutes", 0) + (time.time() - start) / 60
    results["linear classifier"] = score(fit, linear)
    fit.save_checkpoint(out / "linear.ckpt", weights_only=False)
    write(out / "results.json", results)


def run(out: Path, preset: str, options: RunOptions, params: ModelParams) -> None:
    """One run, or the rest of one."""
    results = {"preset": preset}
    if options.resume and (out / "results.json").is_file():
        results = json.loads((out / "results.json").read_text()) | results
    if params.dataset.own:
        lists = params.splits_path or str((out / "splits").resolve())
        params = attrs.evolve(params, splits_path=image_folders.taken_along(lists, out) if options.resume else lists)
        own_images.has_written(params)  # refuses other settings than the lists' before config.yaml says them
    model = SelfSupervisedMethod(params)
    with run_folder.logged(out / "log.txt"):
        fit = trainer(out, "pretraining", params.max_epochs, options)
        resumed, step = beginning(options.resume, out, "pretraining", model)  # what is refused leaves a run as it was
        run_folder.begin(out, command_line.to_yaml(preset, options, model.params), sys.argv)
        fit.loggers = run_folder.get_loggers(out, "pretraining", options.logger, step)
        table = parameter_options.printed(model.parameter_table(), params.optimizer_name)
        write(out / "parameters.txt", table)
        pretrain(fit, model, resumed, out, results)
        if options.linear_epochs:
            train_classifier(out, options, params, results)
        run_folder.say(json.dumps(results, indent=2))


def main() -> None:
    try:
        do(*command_line.parse(sys.argv[1:]))
    except (ValueError, OSError) as error:  # the user's doing; of a run, log.txt says where it came up
        raise SystemExit(f"error: {error}") from error


def do(preset: str, options: RunOptions, params: ModelParams) -> None:
    """What the command asks for."""
    if options.print_config:
        print(command_line.to_yaml(preset, options, params), end="")
    elif options.preview:
        print(preview.write(params, options.preview))
    elif options.dry_run:
        preflight.check_run(options, params)
        model = dry_run.run(params, lambda callbacks: trainer_of_dry_run(params, options, callbacks))
        for wanted in options.save_best:
            refuse_unknown(wanted, dry_run.figures(model))
    else:
        out = Path(options.out or f"runs/{preset}_{params.dataset_name}")
        if not options.resume and any(out.glob("*/checkpoints/step_*.ckpt")):
            raise SystemExit(f"{out} holds an earlier run: --resume auto to go on with it, or another --out")
        if options.resume:
            before = run_folder.settings(out)
            run_folder.refuse_another(out, before, {"preset": preset, **attrs.asdict(params)})
            if params.seed is None:  # that of the run that we go on with
                params = attrs.evolve(params, seed=before.get("seed"))
        check_folder("out", out)
        preflight.check_run(options, params)
        run(out, preset, options, params)


if __name__ == "__main__":
    main()
