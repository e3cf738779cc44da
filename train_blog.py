"""Does BYOL need batch norm? The six configurations of the blog post, and the encoder that they start from.

    python train_blog.py                    # as in the post: STL-10, 10 epochs of a schedule of 320, seeds 0 1 2
    python train_blog.py --size laptop      # CIFAR-10, a small encoder, seeds 0 1 2: about four hours of one core
    python train_blog.py --quick            # digits, 20 epochs, seed 0
    python train_blog.py --size laptop --configs base no_norm --seeds 0 --set lr=0.2 m=0.99

https://untitled-ai.github.io/understanding-self-supervised-contrastive-learning.html

m and K follow from the number of optimizer steps, and lr from the batch size (`at_length`); each run prints them first.
Finished runs are not repeated, and the same command resumes an interrupted one. The directory --out gets results.csv
(one row per run), results.md (mean and standard deviation next to the post's numbers), cosines.png (step_pos_cos and
step_neg_cos of each configuration), and one directory of metrics per run.
"""

import argparse
import csv
import logging
import math
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pytorch_lightning as pl
from attrs import evolve, frozen
from pytorch_lightning.callbacks import LambdaCallback, RichProgressBar, Timer
from pytorch_lightning.loggers import TensorBoardLogger

from moco import SelfSupervisedMethod
from model_params import ModelParams
from self_supervised.catalogue import DATASETS
from self_supervised.data import data_sets, loading
from self_supervised.evaluation.results import markdown_table
from self_supervised.fields import as_path, suggestion
from self_supervised.folder_lock import locked
from self_supervised.program import one_line_errors
from self_supervised.report import curves
from self_supervised.runs import preflight
from self_supervised.runs.command_line import CommandParser
from self_supervised.runs.run_options import PRECISIONS
from self_supervised.runs.values import ListOption, items, reader
from self_supervised.safe_files import atomic_write, check_folder, write_rows
from self_supervised.training import checkpoints
from self_supervised.training.plan import epochs_text
from self_supervised.training.precision import choose
from self_supervised.training.run_folder import csv_logger, logged
from self_supervised.training.verdict import scores_at_end

BASE = ModelParams(
    lr=0.8,
    loss_type="ip",
    use_negative_examples_from_queue=False,
    use_both_augmentations_as_queries=True,
    mlp_normalization="bn",
    prediction_mlp_layers=2,
    use_momentum_schedule=True,
)
CONFIGS = {
    "base": BASE,
    "proj_only": evolve(BASE, prediction_mlp_normalization=None),
    "pred_only": evolve(BASE, mlp_normalization=None, prediction_mlp_normalization="bn"),
    "no_norm": evolve(BASE, mlp_normalization=None),
    "layer_norm": evolve(BASE, mlp_normalization="ln"),
    "xent": evolve(BASE, use_negative_examples_from_queue=True, loss_type="ce", mlp_normalization=None, lr=0.02),
}
UNTRAINED = "untrained"
# accuracies of the post in percent: valid_class_acc on STL-10 after 10 epochs
POST = {
    UNTRAINED: 28.8, "base": 57.7, "proj_only": 55.3, "pred_only": 48.0,
    "no_norm": 28.3, "layer_norm": 29.4, "xent": 44.1,
}  # fmt: skip
POST_BATCH, POST_STEPS = 256, 4100  # images per batch and optimizer steps of the post


@frozen
class Size:
    """Size of the experiment: length, default seeds, and settings that all configurations share."""

    epochs: int
    seeds: list[int]
    settings: dict[str, Any]
    warmup: float = 0.1  # fraction of the epochs: the small encoder does not stand the full lr at once


SMALL = {"encoder_arch": "shufflenet_v2_x0_5", "transform_apply_blur": False}
DIGITS = {"dataset_name": "digits", "transform_crop_size": 32}  # a deep encoder would shrink 8 x 8 pixels to nothing
SIZES = {
    "post": Size(10, [0, 1, 2], {"dataset_name": "stl10", "batch_size": POST_BATCH, "max_epochs": 320}, warmup=0),
    "laptop": Size(10, [0, 1, 2], {"dataset_name": "cifar10", "batch_size": 128, **SMALL}),
    "quick": Size(20, [0], {"batch_size": 64, **DIGITS, **SMALL}),
}
# columns that all rows of an experiment share; "changes": settings that differ from those of its size
SHARED_COLUMNS = ("size", "epochs", "changes", "precision")
ROW_COLUMNS = ["config", "seed", *SHARED_COLUMNS, "steps", "m", "K", "accuracy", "pos_cos", "neg_cos", "minutes"]


# ---- Options ----


def blog_parser() -> argparse.ArgumentParser:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = CommandParser(description=__doc__, formatter_class=formatter, allow_abbrev=False)
    about = "post, laptop (CIFAR-10, 10 to 17 minutes of one core per run) or quick (digits); default: post"
    parser.add_argument("--size", choices=SIZES, default="post", metavar="NAME", help=about)
    about = "the same as --size quick"
    parser.add_argument("--quick", dest="size", action="store_const", const="quick", help=about)
    about = "data set; default: that of the size"
    parser.add_argument("--dataset_name", "--dataset", dest="dataset", choices=DATASETS, metavar="NAME", help=about)
    about = "encoder; default: that of the size"
    parser.add_argument("--encoder_arch", "--encoder", dest="encoder", metavar="NAME", help=about)
    about = "images in a batch, to which lr is proportional; default: that of the size"
    parser.add_argument("--batch_size", type=int, metavar="N", help=about)
    about = "epochs to train; with --size post, of a schedule of 320; default: that of the size"
    parser.add_argument("--max_epochs", "--epochs", dest="epochs", type=int, metavar="N", help=about)
    about = "any fields of ModelParams, for all configurations, with values as in self-supervised train"
    parser.add_argument(
        "--set", nargs="+", action="extend", type=field_and_value, default=[], metavar="FIELD=VALUE", help=about
    )
    parser.add_argument("--out", type=as_path, default=Path("runs/blog"), help="results directory (default: runs/blog)")
    about = f"configurations to train; default: {', '.join(POST)}"
    known = items(config_name)
    parser.add_argument("--configs", action=ListOption, type=known, default=list(POST), metavar="NAME", help=about)
    about = "random seeds; default: 0 1 2, with --quick 0"
    parser.add_argument("--seeds", action=ListOption, type=items(int), metavar="SEED", help=about)
    about = f"floating point: {', '.join(PRECISIONS)}; auto (default): the faster one, or as earlier runs"
    parser.add_argument("--precision", choices=PRECISIONS, default="auto", metavar="NAME", help=about)
    return parser


def config_name(name: str) -> str:
    if name not in POST:
        raise ValueError(f"configs={name!r} is unknown: choose one of {', '.join(POST)}")
    return name


def field_and_value(given: str) -> tuple[str, Any]:
    """Return (field, value) of field=value."""
    name, _, value = given.partition("=")
    fields = attrs.fields_dict(ModelParams)
    if "=" not in given or name not in fields:
        near = suggestion(name, fields)
        raise argparse.ArgumentTypeError(f"{given!r} is not FIELD=VALUE with a field of ModelParams.{near}")
    if name == "seed":
        raise argparse.ArgumentTypeError(f"{given}: each run has a seed of --seeds. Pass it there.")
    return name, reader(fields[name].type)(value)


def blog_arguments() -> argparse.Namespace:
    """Return the options, with `settings`: the fields that all configurations share."""
    args = blog_parser().parse_args()
    size = SIZES[args.size]
    args.epochs = size.epochs if args.epochs is None else args.epochs
    if args.epochs < 1:
        raise ValueError(f"epochs={args.epochs}: must be at least 1.")
    args.seeds = args.seeds or size.seeds
    named = {"dataset_name": args.dataset, "encoder_arch": args.encoder, "batch_size": args.batch_size}
    changes = {name: value for name, value in named.items() if value is not None} | dict(args.set)
    length = {"max_epochs": args.epochs, "warmup_epochs": size.warmup * args.epochs}
    args.settings = {**length, "low_resolution_stem": False, **size.settings, **changes}
    args.changes = " ".join(f"{name}={value}" for name, value in sorted(changes.items()))
    return args


# ---- Settings of a run ----


def at_length(config: ModelParams, steps: int, batch_size: int) -> ModelParams:
    """Return a configuration of the post for another number of optimizer steps and another batch size.

    With the post's m = 0.996, the lagging model would hardly move in a shorter training, and the network would learn to
    predict a random one. So 1 - m is inversely proportional to the steps, except for cross entropy, whose queue needs
    keys of similar networks. The queue holds a sixteenth of all keys, as in the post, rounded down to a power of two.
    """
    m = max(0.0, 1 - (1 - config.m) * POST_STEPS / steps) if config.loss_type == "ip" else config.m
    K = 2 ** int(math.log2(max(1, steps * batch_size / 16)))
    return evolve(config, lr=config.lr * batch_size / POST_BATCH, m=m, K=K)


def n_steps(params: ModelParams, epochs: int) -> int:
    dataset = data_sets.get_dataset(params, params.dataset.pretraining_splits)
    return epochs * len(loading.get_loader(params, dataset, training=True))


def experiment_settings(name: str, seed: int, args: argparse.Namespace) -> ModelParams:
    shared = {"seed": seed, **args.settings}
    params = evolve(CONFIGS.get(name, BASE), **shared)
    if args.epochs > params.max_epochs:
        raise ValueError(f"epochs={args.epochs}: the schedule has {params.max_epochs} epochs. Choose at most as many.")
    if "linear_probe" not in params.evaluations:
        raise ValueError(f"evaluations={params.evaluations}: the table needs 'linear_probe'. Add it.")
    steps = n_steps(params, args.epochs)
    shared = {"evaluate_every_n_epochs": args.epochs, **shared}  # the post reports the last epoch
    return evolve(at_length(CONFIGS.get(name, BASE), steps, params.global_batch_size or params.batch_size), **shared)


# ---- Rows ----


def finished_runs(results: Path) -> list[dict[str, str]]:
    """Return the rows of results.csv, without incomplete ones, which a power failure may leave.

    Rows of earlier versions have other columns. They are kept, but no experiment of this version has them.

    Raises:
        ValueError: another program wrote the file.
    """
    if not results.exists():
        return []
    with results.open() as file:
        reader = csv.DictReader(file)
        if not {"config", "seed"} <= set(reader.fieldnames or ("config", "seed")):
            raise ValueError(f"{results} was not written by train_blog.py. Move it away, or choose another --out.")
        rows = [row for row in reader if None not in row and None not in row.values()]
    return [{column: row.get(column, "") for column in ROW_COLUMNS} for row in rows]


def experiment_facts(args: argparse.Namespace) -> dict[str, str]:
    """Return what the numbers of a row depend on, in addition to configuration and seed."""
    return {name: str(getattr(args, name)) for name in SHARED_COLUMNS}


def experiment_folder(args: argparse.Namespace, precision: str) -> Path:
    facts = experiment_facts(args) | {"epochs": f"{args.epochs}epochs", "precision": precision}
    return args.out / re.sub(r"[^\w=.-]+", "_", "_".join(filter(None, facts.values())))


def precision_of(args: argparse.Namespace) -> str:
    """Return the precision with which the experiment was begun, or else the one that is best on this machine."""
    earlier = next((one for one in PRECISIONS if experiment_folder(args, one).is_dir()), None)
    model = SelfSupervisedMethod(experiment_settings(args.configs[0], args.seeds[0], args))
    precision, reason = (earlier, "as before") if earlier else choose(model)
    print(f"precision: {precision} ({reason})")
    return precision


# ---- Runs ----


def run_folder(name: str, seed: int, args: argparse.Namespace) -> Path:
    return experiment_folder(args, args.precision) / f"{name}_{seed}"


def stop_after(steps: int) -> LambdaCallback:
    """Return a callback that ends a training before its schedule does."""

    def stop(trainer: pl.Trainer, _: pl.LightningModule) -> None:
        trainer.should_stop = trainer.global_step >= steps

    return LambdaCallback(on_train_start=stop, on_train_epoch_end=stop)


def train(name: str, seed: int, args: argparse.Namespace) -> dict:
    """Run one configuration with one seed, or resume it. Return its row."""
    params = experiment_settings(name, seed, args)
    steps = n_steps(params, args.epochs)
    queue = {"K": params.K} if params.use_negative_examples_from_queue else {}
    facts = {"steps": steps, "m": round(params.m, 6), **queue}
    print(f"{name}, seed {seed}: {', '.join(f'{key} {value}' for key, value in facts.items())}, lr {params.lr:.4g}")
    folder = run_folder(name, seed, args)
    checkpoint = checkpoints.newest(folder / "checkpoints")
    done = checkpoints.read_checkpoint(checkpoint)["global_step"] if checkpoint else 0
    timer = Timer()  # adds the minutes of all starts
    trainer = pl.Trainer(
        max_epochs=params.max_epochs,
        callbacks=[RichProgressBar(), timer, stop_after(steps), checkpoints.Checkpoints(folder / "checkpoints")],
        default_root_dir=folder,  # otherwise, with SLURM, Lightning looks for a checkpoint in the current directory
        devices=1,
        enable_checkpointing=False,
        enable_model_summary=False,
        precision=args.precision,
        log_every_n_steps=1 if steps < 1000 else 10,
        logger=[csv_logger(folder, "", done), TensorBoardLogger(folder, name="", version="")],
        num_sanity_val_steps=0,
    )
    method = SelfSupervisedMethod(params)
    trainer.fit(method, ckpt_path=checkpoint)
    scores = scores_at_end(method) or trainer.validate(method, verbose=False)[0]
    logged_last = {key: values[-1] for key, (_, values) in curves.read_curves(folder).items()}
    cosines = {"pos_cos": logged_last["step_pos_cos"], "neg_cos": logged_last["step_neg_cos"]}
    minutes = round(timer.time_elapsed() / 60, 2)
    return facts | to_four_digits({"accuracy": scores["valid_class_acc"], **cosines}) | {"minutes": minutes}


def score_untrained(seed: int, args: argparse.Namespace) -> dict:
    """Return the accuracy of the encoder with which all configurations of a seed start."""
    trainer = pl.Trainer(devices=1, enable_model_summary=False, precision=args.precision, logger=False)
    (scores,) = trainer.validate(SelfSupervisedMethod(experiment_settings(UNTRAINED, seed, args)), verbose=False)
    return {"steps": 0, **to_four_digits({"accuracy": scores["valid_class_acc"]})}


def to_four_digits(values: dict[str, float]) -> dict[str, float]:
    return {name: round(float(value), 4) for name, value in values.items()}


def finish(name: str, seed: int, args: argparse.Namespace, results: Path) -> None:
    """Add the row of one configuration and seed to results.csv, unless it is there."""
    known = {"config": name, "seed": str(seed), **experiment_facts(args)}
    if any(known.items() <= row.items() for row in finished_runs(results)):
        print(f"{name}, seed {seed}: finished before")
        return
    with logged(args.out / "log.txt"):
        measured = score_untrained(seed, args) if name == UNTRAINED else train(name, seed, args)
    write_rows(results, ROW_COLUMNS, [*finished_runs(results), known | measured])
    shutil.rmtree(run_folder(name, seed, args) / "checkpoints", ignore_errors=True)


# ---- Results ----


def results_table(rows: list[dict]) -> str:
    """Return a Markdown table with one line per configuration: mean ± sample standard deviation over seeds."""

    def mean_and_std(group: list[dict], column: str, digits: int) -> str:
        values = np.array([float(row[column]) for row in group if row[column] != ""])
        deviation = f" ± {values.std(ddof=1):.{digits}f}" if len(values) > 1 else ""
        return f"{values.mean():.{digits}f}{deviation}" if len(values) else ""

    header = ["configuration", "accuracy (%)", "post, STL-10 (%)", "cosine, same image", "cosine, different images"]
    table = []
    for name in POST:
        if group := [row for row in rows if row["config"] == name]:
            cosines = [mean_and_std(group, column, 3) for column in ("pos_cos", "neg_cos")]
            table.append([name, mean_and_std(group, "accuracy", 1), str(POST[name]), *cosines, str(len(group))])
    return markdown_table([*header, "seeds"], table) + "\n"


def draw_cosines(rows: list[dict], args: argparse.Namespace, file: Path) -> bool:
    """Draw the cosines of all runs. Return whether there is one that was trained."""
    runs: dict[str, Any] = {}
    for row in rows:
        if row["config"] != UNTRAINED:
            runs.setdefault(row["config"], []).append(curves.read_curves(run_folder(row["config"], row["seed"], args)))
    in_order = {name: runs[name] for name in CONFIGS if name in runs}
    if in_order:
        curves.draw_curves(in_order, file, ["step_pos_cos", "step_neg_cos"], figsize=(14, 5), sharey=True)
    return bool(in_order)


@one_line_errors()
def main() -> None:
    args = blog_arguments()
    warnings.filterwarnings("ignore", module="pytorch_lightning")
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    check_folder("out", args.out)
    settings = [experiment_settings(name, args.seeds[0], args) for name in args.configs]
    preflight.check_images(settings[0])
    preflight.check_labels(settings[0])  # accuracies need labels
    with locked(args.out):
        run_experiments(args)


def run_experiments(args: argparse.Namespace) -> None:
    results = args.out / "results.csv"
    if args.precision == "auto":
        args.precision = precision_of(args)
    experiment_folder(args, args.precision).mkdir(parents=True, exist_ok=True)
    for seed in args.seeds:
        for name in args.configs:
            finish(name, seed, args, results)
    rows = [row for row in finished_runs(results) if experiment_facts(args).items() <= row.items()]
    p = experiment_settings(args.configs[0], args.seeds[0], args)
    size = p.global_batch_size or p.batch_size
    about = f"{p.encoder_arch} on {p.dataset_name}, {epochs_text(args.epochs)} in batches of {size}, {args.precision}"
    about = f"{about}, linear probe on half of the test set" + (f"; {args.changes}" if args.changes else "")
    markdown = f"{about}\n\n{results_table(rows)}"
    atomic_write(args.out / "results.md", markdown)
    picture = ", cosines.png" if draw_cosines(rows, args, args.out / "cosines.png") else ""
    print(f"\n{markdown}\nin {args.out}: results.csv, results.md{picture}")


if __name__ == "__main__":
    main()
