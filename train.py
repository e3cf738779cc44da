"""Pretrain, then score: the encoder before and after, and a linear classifier on it.

    python train.py simclr --dataset_name cifar10 --low_resolution_stem false --max_epochs 3 --linear_epochs 5

The first argument is a preset; every field of ModelParams and of RunOptions is an option: docs/command_line.md.
DATA_PATH says where data sets are. With --resume auto, the same command started again goes on where it was interrupted.
Several processes: docs/distributed.md.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import attrs
import pytorch_lightning as pl
from pytorch_lightning.utilities import rank_zero_only

import checkpoints
import command_line
import dry_run
import own_images
import parameter_options
import preview
import run_folder
from gradient_norms import GradientNorms
from learning_rate import LearningRate
from linear_classifier import LinearClassifierMethod
from milestones import Best, EveryNEpochs
from moco import SelfSupervisedMethod
from model_params import ModelParams
from progress import Progress
from run_options import RunOptions
from whole_files import write_whole


def trainer(out: Path, name: str, epochs: int, first_step: int, options: RunOptions) -> pl.Trainer:
    """Of one stage. The milestones are made before `Checkpoints` saves what they know."""
    folder, pretraining = out / name / "checkpoints", name == "pretraining"
    milestones = [Best(folder, wanted) for wanted in options.save_best if pretraining]
    if options.save_every_n_epochs and pretraining:
        milestones.append(EveryNEpochs(folder, options.save_every_n_epochs))
    norms = [GradientNorms()] * options.log_gradient_norms
    return pl.Trainer(
        max_epochs=epochs,
        logger=run_folder.get_loggers(out, name, options.logger, first_step),
        enable_checkpointing=False,
        callbacks=[
            Progress(out / name / "throughput.csv"), LearningRate(), *norms, *milestones,
            checkpoints.Checkpoints(folder, options.checkpoint_every_n_steps),
        ],
        num_sanity_val_steps=0,
        **options.of_the_trainer(),
    )  # fmt: skip


def trainer_of_dry_run(params: ModelParams, options: RunOptions, callbacks: list[pl.Callback]) -> pl.Trainer:
    return pl.Trainer(
        max_epochs=params.max_epochs,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        callbacks=callbacks,
        limit_val_batches=1,
        num_sanity_val_steps=0,
        **options.of_the_trainer(),
    )


def resumed_from(given: str | None, out: Path, name: str) -> Path | None:
    return checkpoints.newest(out / name / "checkpoints") if given == "auto" else Path(given) if given else None


def step_of(resumed: Path | None) -> int:
    return 0 if resumed is None else checkpoints.read(resumed)["global_step"]


def score(fit: pl.Trainer, method: pl.LightningModule) -> dict[str, float]:
    return next(iter(fit.validate(method, verbose=False)), {})  # nothing where `evaluations` is empty


@rank_zero_only
def write(path: Path, content: str | dict[str, Any]) -> None:
    write_whole(path, content if isinstance(content, str) else json.dumps(content, indent=2))


def pretrain(model: SelfSupervisedMethod, out: Path, options: RunOptions, results: dict[str, Any]) -> None:
    """Fills in `results`: the encoder's scores before and after."""
    resumed = resumed_from(options.resume, out, "pretraining")
    first_step = step_of(resumed)
    fit = trainer(out, "pretraining", model.params.max_epochs, first_step, options)
    if "random encoder" not in results:
        results["random encoder"] = score(fit, model)
        write(out / "results.json", results)
    start = time.time()
    fit.fit(model, ckpt_path=resumed)
    results["pretraining minutes"] = results.get("pretraining minutes", 0) + (time.time() - start) / 60
    fit.save_checkpoint(out / "pretrained.ckpt", weights_only=False)
    results["trained encoder"] = score(fit, model)
    if fit.global_step > first_step:
        results.pop("linear classifier", None)  # was on an earlier encoder
    if model.params.dataset.own and model.params.is_evaluated:  # elsewhere the validation set is the test set
        results["test set"] = next(iter(fit.test(model, verbose=False)), {})
    write(out / "results.json", results)


def train_classifier(out: Path, options: RunOptions, params: ModelParams, results: dict[str, Any]) -> None:
    settings = {"lr": options.linear_lr, "lr_scaling": "linear", "seed": params.seed}
    if params.dataset.own:
        settings["drop_last_batch"] = None  # there may be fewer images than one batch
    linear = LinearClassifierMethod.from_moco_checkpoint(out / "pretrained.ckpt", **settings)
    resumed = resumed_from("auto", out, "linear") if options.resume else None
    fit = trainer(out, "linear", options.linear_epochs, step_of(resumed), options)
    start = time.time()
    fit.fit(linear, ckpt_path=resumed)
    results["linear minutes"] = results.get("linear minutes", 0) + (time.time() - start) / 60
    results["linear classifier"] = score(fit, linear)
    fit.save_checkpoint(out / "linear.ckpt", weights_only=False)
    write(out / "results.json", results)


def run(out: Path, preset: str, options: RunOptions, params: ModelParams) -> None:
    """One run, or the rest of one."""
    results = {"preset": preset, "epochs": params.max_epochs}
    if options.resume and (out / "results.json").is_file():
        results = json.loads((out / "results.json").read_text()) | results
    if params.dataset.own and params.splits_path is None:
        params = attrs.evolve(params, splits_path=str((out / "splits").resolve()))
    own_images.has_written(params)  # refuses other settings than the lists' before config.yaml says them
    model = SelfSupervisedMethod(params)
    with run_folder.logged(out / "log.txt"):
        run_folder.begin(out, command_line.to_yaml(preset, options, model.params), sys.argv)
        table = parameter_options.printed(model.parameter_table(), params.optimizer_name)
        write(out / "parameters.txt", table)
        pretrain(model, out, options, results)
        if options.linear_epochs:
            train_classifier(out, options, params, results)
        run_folder.say(json.dumps(results, indent=2))


def main() -> None:
    try:
        do(*command_line.parse(sys.argv[1:]))
    except (ValueError, FileNotFoundError) as error:  # the user's doing; of a run, log.txt says where it came up
        raise SystemExit(f"error: {error}") from error


def do(preset: str, options: RunOptions, params: ModelParams) -> None:
    """What the command asks for."""
    if options.print_config:
        print(command_line.to_yaml(preset, options, params), end="")
    elif options.preview:
        print(preview.write(params, options.preview))
    elif options.dry_run:
        dry_run.run(params, lambda callbacks: trainer_of_dry_run(params, options, callbacks))
    else:
        out = Path(options.out or f"runs/{preset}_{params.dataset_name}")
        if not options.resume and any(out.glob("*/checkpoints/step_*.ckpt")):
            raise SystemExit(f"{out} holds an earlier run: --resume auto to go on with it, or another --out")
        if options.resume and params.seed is None:  # that of the run that we go on with
            params = attrs.evolve(params, seed=run_folder.settings(out).get("seed"))
        run(out, preset, options, params)


if __name__ == "__main__":
    main()
