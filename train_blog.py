"""Does BYOL need batch norm? The six configurations of the blog post, with multiple seeds each.

    python train_blog.py                      # as in the post: STL-10, 10 epochs, seeds 0 1 2
    python train_blog.py --quick              # the same on digits, in minutes
    python train_blog.py --configs base no_norm --seeds 0 --dataset_name cifar10

https://untitled-ai.github.io/understanding-self-supervised-contrastive-learning.html

Finished runs are not repeated. The directory --out gets results.csv (one row per run), results.md (mean and standard
deviation next to the post's numbers), cosines.png (step_pos_cos and step_neg_cos of each configuration), and one
directory of metrics per run. The post trained for 10 epochs of a schedule of 320; here the schedule ends with --epochs.
"""

import argparse
import csv
import logging
import time
import warnings
from pathlib import Path

import numpy as np
import pytorch_lightning as pl
from attr import evolve
from pytorch_lightning.callbacks import RichProgressBar
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger

from moco import SelfSupervisedMethod
from model_params import ModelParams
from self_supervised.catalogue import DATASETS
from self_supervised.fields import as_path
from self_supervised.folder_lock import locked
from self_supervised.program import one_line_errors
from self_supervised.report import curves
from self_supervised.runs import preflight
from self_supervised.runs.command_line import PRECISIONS
from self_supervised.runs.values import ListOption, items
from self_supervised.safe_files import atomic_file, atomic_write, check_folder
from self_supervised.training.precision import choose
from self_supervised.training.run_folder import logged

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
# accuracies of the post in percent: valid_class_acc on STL-10 after 10 epochs
POST = {"base": 57.7, "proj_only": 55.3, "pred_only": 48.0, "no_norm": 28.3, "layer_norm": 29.4, "xent": 44.1}
SHARED_COLUMNS = ("dataset", "epochs", "encoder", "quick", "precision")  # of an experiment, which all its rows share
ROW_COLUMNS = ["config", "seed", *SHARED_COLUMNS, "accuracy", "pos_cos", "neg_cos", "minutes"]


def blog_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    about = "data set; default: stl10, with --quick digits"
    parser.add_argument("--dataset_name", "--dataset", dest="dataset", choices=DATASETS, metavar="NAME", help=about)
    parser.add_argument(
        "--encoder_arch",
        "--encoder",
        dest="encoder",
        metavar="NAME",
        help="encoder; default: resnet18, with --quick shufflenet_v2_x0_5",
    )
    parser.add_argument(
        "--max_epochs", "--epochs", dest="epochs", type=int, metavar="N", help="epochs; default: 10, with --quick 4"
    )
    parser.add_argument("--out", type=as_path, default=Path("runs/blog"), help="results directory (default: runs/blog)")
    parser.add_argument(
        "--configs",
        action=ListOption,
        type=items(config_name),
        default=list(CONFIGS),
        metavar="NAME",
        help=f"configurations to train; default: {', '.join(CONFIGS)}",
    )
    parser.add_argument(
        "--seeds",
        action=ListOption,
        type=items(int),
        default=[0, 1, 2],
        metavar="SEED",
        help="random seeds (default: 0 1 2)",
    )
    about = f"floating point: {', '.join(PRECISIONS)}; auto (default): the faster one, or as finished runs"
    parser.add_argument("--precision", choices=PRECISIONS, default="auto", metavar="NAME", help=about)
    parser.add_argument("--quick", action="store_true", help="use digits, small batches and a small encoder")
    return parser


def blog_arguments() -> argparse.Namespace:
    args = blog_parser().parse_args()
    args.dataset = args.dataset or ("digits" if args.quick else "stl10")
    args.epochs = args.epochs or (4 if args.quick else 10)
    args.encoder = args.encoder or ("shufflenet_v2_x0_5" if args.quick else "resnet18")
    return args


def config_name(name: str) -> str:
    if name not in CONFIGS:
        raise ValueError(f"configs={name!r} is unknown: choose one of {', '.join(CONFIGS)}")
    return name


def finished_runs(results: Path) -> list[dict[str, str]]:
    """Return the rows of results.csv, without incomplete ones, which a power failure may leave."""
    if not results.exists():
        return []
    with results.open() as file:
        rows = [row for row in csv.DictReader(file) if None not in row and None not in row.values()]
    return [{"quick": "False", "precision": "32-true", **row} for row in rows]  # earlier versions lack these columns


def write_rows(results: Path, rows: list[dict]) -> None:
    with atomic_file(results) as unfinished, unfinished.open("w", newline="") as file:
        writer = csv.DictWriter(file, ROW_COLUMNS)
        writer.writeheader()
        writer.writerows(rows)


def experiment_facts(args: argparse.Namespace) -> dict:
    """Return what the numbers of a row depend on, in addition to configuration and seed."""
    return {name: getattr(args, name) for name in SHARED_COLUMNS}


def precision_of(args: argparse.Namespace, rows: list[dict[str, str]]) -> str:
    """Return the precision of the experiment's finished runs, or the one that is best on this machine."""
    same = {column: str(value) for column, value in experiment_facts(args).items() if column != "precision"}
    found = [row["precision"] for row in rows if same.items() <= row.items()]
    model = SelfSupervisedMethod(experiment_settings(args.configs[0], args.seeds[0], args))
    precision, reason = (found[0], "as before") if found else choose(model)
    print(f"precision: {precision} ({reason})")
    return precision


def run_folder(name: str, seed: int, args: argparse.Namespace) -> Path:
    quick = "_quick" if args.quick else ""
    return args.out / f"{args.dataset}_{args.encoder}_{args.epochs}epochs{quick}" / f"{name}_{seed}"


def experiment_settings(name: str, seed: int, args: argparse.Namespace) -> ModelParams:
    return evolve(
        CONFIGS[name],
        seed=seed,
        dataset_name=args.dataset,
        encoder_arch=args.encoder,
        batch_size=64 if args.quick else 256,
        transform_crop_size=32 if args.quick else None,  # a deep encoder would shrink 8 x 8 digits to nothing
        lr=CONFIGS[name].lr / (4 if args.quick else 1),  # in proportion to the batch size
        max_epochs=args.epochs,
        evaluate_every_n_epochs=args.epochs,  # the post reports the last epoch
    )


def train(name: str, seed: int, args: argparse.Namespace) -> dict:
    """Run one configuration with one seed. Return its row."""
    logs = {"save_dir": run_folder(name, seed, args), "name": "", "version": ""}
    trainer = pl.Trainer(
        max_epochs=args.epochs,
        callbacks=[RichProgressBar()],
        enable_checkpointing=False,
        enable_model_summary=False,
        precision=args.precision,
        log_every_n_steps=1 if args.quick else 10,
        logger=[CSVLogger(**logs), TensorBoardLogger(**logs)],
        num_sanity_val_steps=0,
    )
    start = time.time()
    trainer.fit(SelfSupervisedMethod(experiment_settings(name, seed, args)))
    row = {"config": name, "seed": seed, **experiment_facts(args)}
    metrics = {"accuracy": "valid_class_acc", "pos_cos": "step_pos_cos", "neg_cos": "step_neg_cos"}
    row |= {column: round(trainer.callback_metrics[metric].item(), 4) for column, metric in metrics.items()}
    return row | {"minutes": round((time.time() - start) / 60, 2)}


def results_table(rows: list[dict]) -> str:
    """Return a Markdown table with one line per configuration: mean ± sample standard deviation over seeds."""

    def mean_and_deviation(group: list[dict], column: str, digits: int) -> str:
        values = np.array([float(row[column]) for row in group])
        deviation = f" ± {values.std(ddof=1):.{digits}f}" if len(values) > 1 else ""
        return f"{values.mean():.{digits}f}{deviation}"

    lines = [
        "| configuration | accuracy (%) | post, STL-10 (%) | cosine, same image | cosine, different images | seeds |",
        "|---|---|---|---|---|---|",
    ]
    for name in CONFIGS:
        if group := [row for row in rows if row["config"] == name]:
            cells = [mean_and_deviation(group, "accuracy", 1), str(POST[name])]
            cells += [mean_and_deviation(group, column, 3) for column in ("pos_cos", "neg_cos")]
            lines.append(f"| {name} | {' | '.join(cells)} | {len(group)} |")
    return "\n".join(lines) + "\n"


def draw_cosines(rows: list[dict], args: argparse.Namespace, file: Path) -> None:
    runs: dict[str, list[curves.Curves]] = {}
    for row in rows:
        runs.setdefault(row["config"], []).append(curves.read_curves(run_folder(row["config"], row["seed"], args)))
    in_order = {name: runs[name] for name in CONFIGS if name in runs}
    curves.draw_curves(in_order, file, ["step_pos_cos", "step_neg_cos"], figsize=(14, 5), sharey=True)


@one_line_errors()
def main() -> None:
    args = blog_arguments()
    warnings.filterwarnings("ignore", module="pytorch_lightning")
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    check_folder("out", args.out)
    settings = experiment_settings(args.configs[0], args.seeds[0], args)
    preflight.check_images(settings)
    preflight.check_labels(settings)  # accuracies need labels
    with locked(args.out):
        run_experiments(args)


def run_experiments(args: argparse.Namespace) -> None:
    results = args.out / "results.csv"
    if args.precision == "auto":
        args.precision = precision_of(args, finished_runs(results))
    same = {column: str(value) for column, value in experiment_facts(args).items()}
    for seed in args.seeds:
        for name in args.configs:
            key = {"config": name, "seed": str(seed), **same}
            if any(key.items() <= row.items() for row in finished_runs(results)):
                print(f"{name}, seed {seed}: finished before")
                continue
            print(f"{name}, seed {seed}:")
            with logged(args.out / "log.txt"):
                row = train(name, seed, args)
            write_rows(results, [*finished_runs(results), row])
    rows = [row for row in finished_runs(results) if same.items() <= row.items()]
    markdown = f"{args.encoder} on {args.dataset}, {args.epochs} epochs, linear probe on half of the test set\n\n"
    markdown += results_table(rows)
    atomic_write(args.out / "results.md", markdown)
    draw_cosines(rows, args, args.out / "cosines.png")
    print(f"\n{markdown}\n{results}, {args.out / 'results.md'}, {args.out / 'cosines.png'}")


if __name__ == "__main__":
    main()
