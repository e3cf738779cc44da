"""Train presets on CIFAR-10 with one kind of recipe and evaluate the encoders: the rows of docs/results.md.

    python -m benchmarks.cifar10 cifar10_laptop                      # every preset but distill with 3 seeds, in turns
    python -m benchmarks.cifar10 cifar10_laptop --presets vicreg byol --seeds 0
    python -m benchmarks.cifar10 cifar10_quick
    python -m benchmarks.cifar10 cifar10_gpu --at_once 6 --set torch_compile=reduce-overhead

A run has the commands of a user: `self-supervised train PRESET --recipe KIND`, then `self-supervised evaluate`. If this
command is repeated, it skips rows that are in the CSV file with the recipe's learning rate of today and the settings of
--set, and resumes interrupted runs from their last checkpoint.
Two rows have no training: an encoder with random weights, and the pixels themselves.

KIND.csv has one row for each preset and seed, with accuracies on the test images in percent. The logistic regression is
fitted to all training images, and kNN finds its neighbors among them. KIND_curves.csv has kNN accuracies (k = 20)
during training: one half of the test images is scored with the other half as neighbors, in the size of the views. With
--at_once, minutes and images/s are not those of a run alone.
"""

import argparse
import csv
import itertools
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock

from attrs import evolve, frozen
from torch import Tensor, nn

from benchmarks import harness
from model_params import PRESETS
from self_supervised import demo, recipes
from self_supervised.evaluation import probes
from self_supervised.fields import as_path
from self_supervised.training import run_folder

NO_TRAINING = ("random encoder", "pixels")
MONITOR = ("--evaluations", "knn", "--evaluate_every_n_epochs", "5")  # for the curves
PROTOCOLS = ("linear", "knn")
QUICK = ("dataset_name=digits", "encoder_arch=small_cnn", "max_epochs=1", "warmup_epochs=0", "dim=16", "K=64")


@frozen
class Run:
    """One preset, seed, learning rate and further settings, in a directory of its own."""

    kind: str
    preset: str
    seed: int
    root: Path
    settings: Sequence[str] = ()  # field=value

    @property
    def folder(self) -> Path:
        ending = re.sub(r"[^\w.=-]+", "_", self.further and f"_{self.further}")
        return self.root / f"{self.preset}_{self.seed}_lr_{self.lr:g}{ending}"

    @property
    def values(self) -> dict[str, str]:
        return dict(setting.split("=", 1) for setting in self.settings)

    @property
    def lr(self) -> float:
        return float(self.values.get("lr", recipes.recipe(self.preset, self.kind).lr))

    @property
    def further(self) -> str:
        """The settings but lr, as one text."""
        return " ".join(sorted(f"{name}={value}" for name, value in self.values.items() if name != "lr"))

    @property
    def known(self) -> harness.Row:
        """What tells its row from all others."""
        return {"preset": self.preset, "seed": self.seed, "lr": self.lr, "settings": self.further}

    def program(self, *arguments: str) -> None:
        """Run one of the library's programs; its output goes to the run's log."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / "benchmark.log", "a") as log:
            subprocess.run([sys.executable, "-m", "self_supervised", *arguments], stdout=log, stderr=log, check=True)

    def train(self) -> dict:
        """Train, or resume a training, and return its results.json, which has the trained encoder only at the end."""
        path = self.folder / "results.json"
        if not path.exists() or "trained encoder" not in json.loads(path.read_text()):
            changes = [f"--{setting}" for setting in self.settings]
            arguments = ["train", self.preset, "--recipe", self.kind, "--seed", str(self.seed), *MONITOR, *changes]
            self.program(*arguments, "--out", str(self.folder), "--resume", "auto", "--logger", "[]")
        return json.loads(path.read_text())

    def scores(self, encoder: str = "trained") -> dict[str, float]:
        """Accuracies of the encoder with trained, or with random, weights."""
        checkpoint, out = self.folder / "pretrained.ckpt", self.folder / f"{encoder} evaluation"
        seed = self.seed if encoder == "trained" else 0
        options = ["--seeds", str(seed), "--out", str(out)] + ["--no_baselines"] * (encoder == "trained")
        options += recipes.KINDS[self.kind].reading_options
        self.program("evaluate", str(checkpoint), "--protocols", *PROTOCOLS, *options)
        (summary,) = json.loads((out / "results.json").read_text())["summary"].values()
        metrics = {protocol: summary[protocol][encoder] for protocol in PROTOCOLS}
        return accuracies(metrics["linear"]["acc1"]["mean"], metrics["knn"]["knn20_acc1"]["mean"])

    def row(self) -> harness.Row:
        trained = self.train()
        with open(self.folder / "pretraining" / "throughput.csv") as file:
            speed = statistics.median(float(line["images_per_second"]) for line in csv.DictReader(file))
        minutes = round(trained["pretraining minutes"], 1)
        facts = {"epochs": trained["epochs"], "minutes": minutes, "images/s": round(speed)}
        facts["precision"] = run_folder.settings_of_run(self.folder)["precision"]
        (started, *_) = json.loads((self.folder / "run.json").read_text())
        commit = harness.short(started["versions"]["commit"])
        return {**empty(self.preset, self.seed), **self.known, **self.scores(), **facts, "commit": commit}

    def curve(self) -> list[harness.Row]:
        with open(self.folder / "pretraining" / "metrics.csv") as file:
            points = [(line["epoch"], line["valid_knn20_acc"]) for line in csv.DictReader(file)]
        known = {"preset": self.preset, "seed": self.seed}
        return [{**known, "epoch": n, "kNN-20 %": round(float(value), 2)} for n, value in points if value]


def accuracies(linear: float, knn: float) -> dict[str, float]:
    return {"linear %": round(linear, 2), "kNN-20 %": round(knn, 2)}


def accuracies_of(train_x: Tensor, train_y: Tensor, test_x: Tensor, test_y: Tensor) -> dict[str, float]:
    data = (train_x, train_y, test_x, test_y)
    return accuracies(probes.linear(*data)["acc1"], probes.knn_protocol(*data)["knn20_acc1"])


def empty(preset: str, seed: int | str) -> harness.Row:
    """A row without results, whose last columns say where they are from."""
    known = {"preset": preset, "seed": seed}
    names = ("lr", "settings", "linear %", "kNN-20 %", "epochs", "minutes", "images/s", "precision")
    return {**known, **dict.fromkeys(names, ""), "date": time.strftime("%Y-%m-%d"), "commit": harness.commit()}


def pixels(run: Run) -> harness.Row:
    """Scores of the normalized pixels that encoders get, without an encoder."""
    params = recipes.recipe(run.preset, run.kind, dataset_name=run.values.get("dataset_name", "cifar10"))
    size = recipes.KINDS[run.kind].reading.get("transform_crop_size", params.transform_crop_size)
    data = demo.features(nn.Flatten(), evolve(params, transform_crop_size=size))
    return {**empty("pixels", 0), **accuracies_of(*data)}


class Table:
    """The rows that are finished, in a CSV file that is complete after each of them."""

    def __init__(self, path: Path):
        self.path, self.lock, self.rows = path, Lock(), harness.finished(path)

    def has(self, known: harness.Row) -> bool:
        return harness.has(self.rows, known)

    def put(self, rows: Sequence[harness.Row], *names: str) -> None:
        """Add rows in place of those with the same values of these columns."""
        with self.lock:
            if rows:
                known = {name: rows[0][name] for name in names}
                self.rows = [row for row in self.rows if not harness.has([row], known)]
            self.rows += [{name: str(value) for name, value in row.items()} for row in rows]
            order = [*NO_TRAINING, *PRESETS]
            self.rows.sort(key=lambda row: (order.index(row["preset"]), float(row.get("lr") or 0), int(row["seed"])))
            harness.write(self.path, self.rows)


def finish(run: Run, table: Table, curves: Table, first: bool) -> bool:
    """Compute the rows of a run that are missing. Return whether it succeeded."""
    try:
        if not table.has(run.known):
            row = run.row()
            is_usual = run.known == evolve(run, settings=()).known
            if is_usual or not curves.has({"preset": run.preset, "seed": run.seed}):
                curves.put(run.curve(), "preset", "seed")
            table.put([row], *run.known)
            print(", ".join(f"{name} {harness.shown(value)}" for name, value in row.items() if value != ""), flush=True)
        if first and not table.has({"preset": "random encoder"}):  # its weights do not depend on the seed
            table.put([{**empty("random encoder", 0), **run.scores("random")}], "preset")
        if first and not table.has({"preset": "pixels"}):
            table.put([pixels(run)], "preset")
        return True
    except subprocess.CalledProcessError:
        print(f"{run.preset}, seed {run.seed}: failed; see {run.folder / 'benchmark.log'}", file=sys.stderr)
        return False


def arguments(description: str | None) -> argparse.ArgumentParser:
    """The options of benchmarks that train presets with one kind of recipe."""
    kinds = ["cifar10_laptop", "cifar10_quick", "cifar10_gpu"]
    parser = harness.arguments(description, rounds=1)
    parser.add_argument("kind", nargs="?", choices=kinds, default=kinds[0], help=f"kind of recipe ({kinds[0]})")
    help_of_presets = "all with such a recipe but distill, which needs a teacher"
    parser.add_argument("--presets", nargs="+", metavar="PRESET", help=help_of_presets)
    return parser


def chosen_presets(parser: argparse.ArgumentParser, args: argparse.Namespace) -> list[str]:
    """The presets of the command; an error if the kind has no recipe of one."""
    rows = recipes.KINDS[args.kind].rows
    if missing := [name for name in args.presets or () if name not in rows]:
        parser.error(f"{args.kind} has no {', '.join(missing)}: choose from {', '.join(rows)}")
    return args.presets or [name for name in rows if name != "distill"]


def options(argv: list[str] | None) -> argparse.Namespace:
    parser = arguments(__doc__)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="seeds (0 1 2)")
    parser.add_argument("--at_once", type=int, default=1, help="number of runs at the same time (1)")
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="FIELD=VALUE", help="settings of all runs, such as teacher=RUN"
    )
    parser.add_argument("--runs", type=as_path, help="directory in which the runs are kept (OUT/runs)")
    args = parser.parse_args(argv)
    args.presets = chosen_presets(parser, args)
    if args.quick:
        args.presets, args.seeds, args.set = ["simclr"], [0], QUICK
    return args


def main(argv: list[str] | None = None) -> None:
    args = options(argv)
    folder = (args.runs or args.out / "runs") / args.kind
    table, curves = Table(args.out / f"{args.kind}.csv"), Table(args.out / f"{args.kind}_curves.csv")
    running = []
    with ThreadPoolExecutor(args.at_once) as pool:
        for seed, preset in itertools.product(args.seeds, args.presets):
            run = Run(args.kind, preset, seed, folder, args.set)
            running.append(pool.submit(finish, run, table, curves, first=preset == args.presets[0]))
    are_there = [one.result() for one in running]  # raises what a run raised
    if table.rows:
        print(harness.markdown(table.rows))
    if not all(are_there):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
