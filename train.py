"""Pretrain, then score: the encoder before and after, and a linear classifier on it.

    python train.py simclr --dataset_name cifar10 --low_resolution_stem false --max_epochs 3 --linear_epochs 5

The first argument is a preset; every field of ModelParams is an option. DATA_PATH says where data sets are. With
--resume auto, the same command started again goes on where it was interrupted. Several processes: docs/distributed.md.
"""

import argparse
import ast
import csv
import json
import time
import warnings
from pathlib import Path

import attrs
import pytorch_lightning as pl
from pytorch_lightning.callbacks import RichProgressBar
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from pytorch_lightning.utilities import rank_zero_only

import checkpoints
from linear_classifier import LinearClassifierMethod
from moco import SelfSupervisedMethod
from model_params import PRESETS, ModelParams

TRAINER_OPTIONS = ("precision", "devices", "num_nodes", "strategy", "accumulate_grad_batches", "sync_batchnorm")


def value(text: str):
    """3 -> int, 0.3 -> float, true -> bool, none -> None, [1, 0.1] -> list, everything else a string."""
    try:
        return ast.literal_eval({"true": "True", "false": "False", "none": "None"}.get(text.lower(), text))
    except (ValueError, SyntaxError):
        return text


def arguments() -> argparse.Namespace:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter, allow_abbrev=False)
    parser.add_argument("preset", choices=PRESETS)
    parser.add_argument("--out", type=Path, help="folder of the run; default: runs/PRESET_DATASET")
    parser.add_argument(
        "--linear_epochs", type=int, default=0, help="train LinearClassifierMethod this long afterwards"
    )
    parser.add_argument("--linear_lr", type=float, default=30.0)
    parser.add_argument("--resume", metavar="auto|FILE", help="auto: from the newest good checkpoint of --out, if any")
    parser.add_argument("--checkpoint_every_n_steps", type=int, default=1000, metavar="N", help="and after every epoch")
    run = parser.add_argument_group("the Trainer")
    run.add_argument("--precision", choices=["32-true", "16-mixed", "bf16-mixed"], default="32-true")
    run.add_argument("--devices", type=value, default="auto", metavar="N")
    run.add_argument("--num_nodes", type=int, default=1)
    run.add_argument("--strategy", default="auto")
    run.add_argument("--accumulate_grad_batches", type=int, default=1)
    run.add_argument("--sync_batchnorm", action="store_true")
    fields = parser.add_argument_group("fields of ModelParams (see model_params.py)")
    for field in attrs.fields(ModelParams):
        fields.add_argument(f"--{field.name}", type=value, default=argparse.SUPPRESS, metavar="VALUE")
    return parser.parse_args()


def csv_logger(out: Path, name: str, first_step: int) -> CSVLogger:
    """metrics.csv goes on at `first_step`: Lightning's logger would delete the rows before it."""
    path, kept = out / name / "metrics.csv", out / name / "metrics.kept.csv"
    logger, header = CSVLogger(out, name=name, version=""), []
    if rank_zero_only.rank != 0:
        return logger
    if kept.is_file() and not path.is_file():  # we were killed here
        kept.replace(path)
    if first_step > 0 and path.is_file():
        with path.open(newline="") as old, kept.open("w", newline="") as new:
            reader = csv.DictReader(old)
            header = list(reader.fieldnames or [])
            writer = csv.DictWriter(new, header)
            writer.writeheader()
            writer.writerows(row for row in reader if int(row["step"]) < first_step)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*logs directory .* exists")
        experiment = logger.experiment
    if header:
        kept.replace(path)
        experiment.metrics_keys = header
    return logger


def trainer(out: Path, name: str, epochs: int, every_n_steps: int, resumed: Path | None, options: dict) -> pl.Trainer:
    first_step = 0 if resumed is None else checkpoints.read(resumed)["global_step"]
    return pl.Trainer(
        max_epochs=epochs,
        logger=[csv_logger(out, name, first_step), TensorBoardLogger(out, name=name, version="")],
        enable_checkpointing=False,
        callbacks=[RichProgressBar(), checkpoints.Checkpoints(out / name / "checkpoints", every_n_steps)],
        num_sanity_val_steps=0,
        **options,
    )


def resumed_from(given: str | None, out: Path, name: str) -> Path | None:
    return checkpoints.newest(out / name / "checkpoints") if given == "auto" else Path(given) if given else None


def score(fit: pl.Trainer, method: pl.LightningModule) -> dict:
    return next(iter(fit.validate(method, verbose=False)), {})  # nothing where `evaluations` is empty


@rank_zero_only
def write(out: Path, results: dict) -> None:
    (out / "results.json").write_text(json.dumps(results, indent=2))


def pretrain(model: SelfSupervisedMethod, out: Path, resume: str | None, results: dict, every: int, options: dict):
    """Fills in `results`: the encoder's scores before and after."""
    resumed = resumed_from(resume, out, "pretraining")
    fit = trainer(out, "pretraining", model.params.max_epochs, every, resumed, options)
    if "random encoder" not in results:
        results["random encoder"] = score(fit, model)
        write(out, results)
    start = time.time()
    fit.fit(model, ckpt_path=resumed)
    results["pretraining minutes"] = results.get("pretraining minutes", 0) + (time.time() - start) / 60
    fit.save_checkpoint(out / "pretrained.ckpt", weights_only=False)
    results["trained encoder"] = score(fit, model)
    write(out, results)


def train_classifier(
    out: Path, epochs: int, settings: dict, resume: str | None, results: dict, every: int, options: dict
):
    linear = LinearClassifierMethod.from_moco_checkpoint(out / "pretrained.ckpt", **settings)
    resumed = resumed_from("auto", out, "linear") if resume else None
    fit = trainer(out, "linear", epochs, every, resumed, options)
    start = time.time()
    fit.fit(linear, ckpt_path=resumed)
    results["linear minutes"] = results.get("linear minutes", 0) + (time.time() - start) / 60
    results["linear classifier"] = score(fit, linear)
    fit.save_checkpoint(out / "linear.ckpt", weights_only=False)
    write(out, results)


def main() -> None:
    args = vars(arguments())
    preset, out, resume = args.pop("preset"), args.pop("out"), args.pop("resume")
    linear_epochs, linear_lr = args.pop("linear_epochs"), args.pop("linear_lr")
    every = args.pop("checkpoint_every_n_steps")
    options = {name: args.pop(name) for name in TRAINER_OPTIONS}
    params = PRESETS[preset](**args)
    out = out or Path("runs") / f"{preset}_{params.dataset_name}"
    results = {"preset": preset, "epochs": params.max_epochs}
    if resume and (out / "results.json").is_file():
        results = json.loads((out / "results.json").read_text()) | results
    if not resume and any(out.glob("*/checkpoints/step_*.ckpt")):
        raise SystemExit(f"{out} holds an earlier run: --resume auto to go on with it, or another --out")
    out.mkdir(parents=True, exist_ok=True)
    pretrain(SelfSupervisedMethod(params), out, resume, results, every, options)
    if linear_epochs:
        settings = {"lr": linear_lr, "lr_scaling": "linear", "seed": params.seed}
        train_classifier(out, linear_epochs, settings, resume, results, every, options)
    if rank_zero_only.rank == 0:
        print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
