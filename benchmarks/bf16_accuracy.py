"""Accuracy of bf16-mixed, and of Winograd's convolutions, against 32-true: CIFAR-10, 3 epochs, 3 seeds each.

    python -m benchmarks.bf16_accuracy
    python -m benchmarks.bf16_accuracy --methods simclr --lr 0.12 --arithmetic winograd
    python -m benchmarks.bf16_accuracy --methods simclr --seeds 0 --data_fraction 0.1 --encoder_arch small_cnn

Every finished training is a row of bf16_accuracy.csv and is not repeated when the command is started again. Means and
sample standard deviations over seeds are in bf16_accuracy_summary.csv. Minutes are those of the processor.
"""

import itertools
import statistics
import time
from typing import Any

import pytorch_lightning as pl

from benchmarks.harness import QUIET_TRAINER, Row, arguments, finished, has, report, silence
from moco import SelfSupervisedMethod
from self_supervised.recipes import recipe

METHODS = ("simclr", "byol", "vicreg")
FLOAT32, WINOGRAD = "32-true", "winograd"  # the latter in 32-true
ARITHMETIC = (FLOAT32, "bf16-mixed", WINOGRAD)
SCORES = {"linear %": "valid_class_acc", "kNN-20 %": "valid_knn20_acc"}
EXPERIMENT = ("method", "lr", "encoder", "epochs", "fraction")  # trainings that are compared agree in these
SETTINGS = {"evaluations": ["linear_probe", "knn"]}
QUICK = {**SETTINGS, "dataset_name": "digits", "mlp_hidden_dim": 16, "dim": 16}


def trained(key: Row, settings: dict[str, Any]) -> Row:
    """Return the key of a training with its scores and minutes."""
    epochs = key["epochs"]
    params = recipe(
        key["method"],
        "cifar10_laptop",
        **settings,
        lr=key["lr"],
        encoder_arch=key["encoder"],
        data_fraction=key["fraction"],
        seed=key["seed"],
        max_epochs=epochs,
        warmup_epochs=epochs / 10,
        evaluate_every_n_epochs=epochs,
        winograd=key["precision"] == WINOGRAD,
    )
    precision = FLOAT32 if key["precision"] == WINOGRAD else key["precision"]
    trainer = pl.Trainer(max_epochs=epochs, precision=precision, num_sanity_val_steps=0, **QUIET_TRAINER)
    start = time.process_time()
    trainer.fit(SelfSupervisedMethod(params))
    scores = {name: round(float(trainer.callback_metrics[metric]), 3) for name, metric in SCORES.items()}
    return {**key, **scores, "minutes": round((time.process_time() - start) / 60, 2)}


def summary(rows: list[Row]) -> list[Row]:
    """Return one row for each experiment, other arithmetic and score: both, and their difference in deviations."""
    groups: dict[tuple, dict[str, list[Row]]] = {}
    for row in rows:
        experiment = tuple(str(row[name]) for name in EXPERIMENT)
        groups.setdefault(experiment, {}).setdefault(row["precision"], []).append(row)
    comparisons = []
    for (experiment, of), other, score in itertools.product(groups.items(), ARITHMETIC[1:], SCORES):
        if not {FLOAT32, other} <= set(of):
            continue
        float32, values = ([float(row[score]) for row in of[name]] for name in (FLOAT32, other))
        minutes = [statistics.median(float(row["minutes"]) for row in of[name]) for name in (FLOAT32, other)]
        spread = statistics.stdev(float32) if len(float32) > 1 else float("nan")
        difference = statistics.mean(values) - statistics.mean(float32)
        comparisons.append({
            **dict(zip(EXPERIMENT, experiment, strict=True)),
            "score": score,
            FLOAT32: text(float32),
            "arithmetic": other,
            "mean": text(values),
            "difference": round(difference, 2),
            "in standard deviations": f"{difference / spread:.1f}" if spread > 0 else "-",
            "times as fast": round(minutes[0] / max(minutes[1], 0.01), 2),
        })  # fmt: skip
    return comparisons


def text(values: list[float]) -> str:
    deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{deviation} ({len(values)})"


def main(argv: list[str] | None = None) -> None:
    parser = arguments(__doc__, rounds=1)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS, help="presets (all)")
    known = {"nargs": "+", "choices": ARITHMETIC, "default": ARITHMETIC[:2]}
    parser.add_argument("--arithmetic", **known, help="(32-true bf16-mixed)")
    parser.add_argument("--lr", type=float, help="peak learning rate (that of the recipe cifar10_laptop)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="seeds (0 1 2)")
    parser.add_argument("--max_epochs", type=int, default=3, help="epochs (3)")
    parser.add_argument("--encoder_arch", default="resnet18", help="encoder (resnet18)")
    parser.add_argument("--data_fraction", type=float, default=1.0, help="fraction of the training images (1.0)")
    options = parser.parse_args(argv)
    silence()
    if options.quick:
        options.encoder_arch, options.max_epochs, options.seeds, options.methods = "small_cnn", 1, [0], ["vicreg"]
        options.data_fraction = 0.2
    experiment = {"encoder": options.encoder_arch, "epochs": options.max_epochs, "fraction": options.data_fraction}
    for seed, method, precision in itertools.product(options.seeds, options.methods, options.arithmetic):
        lr = options.lr or recipe(method, "cifar10_laptop").lr
        key = {"method": method, "lr": lr, "precision": precision, "seed": seed, **experiment}
        rows = finished(options.out / "bf16_accuracy.csv")
        if not has(rows, key):
            report("bf16_accuracy", [*rows, trained(key, QUICK if options.quick else SETTINGS)], options.out)
    if rows := summary(finished(options.out / "bf16_accuracy.csv")):
        report("bf16_accuracy_summary", rows, options.out)


if __name__ == "__main__":
    main()
