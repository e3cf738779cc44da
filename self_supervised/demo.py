"""Pretrain on scans of digits without their labels, and score what the encoder has learned: a minute on a laptop.

    self-supervised demo            (or `make demo`, which also installs)

The run is written to runs/demo, as by `self-supervised train`, together with results.md and the page report.html.
"""

import itertools
import re
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from moco import SelfSupervisedMethod
from model_params import ModelParams
from self_supervised import recipes, train
from self_supervised.data import data_sets, loading
from self_supervised.evaluation import validation
from self_supervised.evaluation.results import markdown_table
from self_supervised.folder_lock import locked
from self_supervised.networks import modules
from self_supervised.networks.pretrained import load_encoder
from self_supervised.program import one_line_errors
from self_supervised.report import report
from self_supervised.runs.command_line import parser_of
from self_supervised.runs.run_options import RunOptions
from self_supervised.safe_files import atomic_write, remove, to_json
from self_supervised.training import run_folder
from self_supervised.training.plan import epochs_text
from self_supervised.views import augmentations

OUT = Path("runs/demo")
COMMAND = re.compile(r"\S+ (-m self_supervised )?demo\b|demo\.py\b")  # how command.txt begins
LABELS_PER_CLASS = 5
LABEL_DRAWS = 5  # random draws of the labels, over which accuracies are averaged


@torch.no_grad()
def features_of(encoder: nn.Module, params: ModelParams, dataset: Dataset) -> tuple[Tensor, Tensor]:
    """Return (features, labels) of the images of a data set, with the encoder in eval mode."""
    loader = loading.get_loader(params, dataset, training=False)
    images, labels = (torch.cat(part) for part in zip(*loader, strict=True))
    views = augmentations.evaluation_view(images, params).split(256)
    with modules.in_eval_mode(encoder):
        return torch.cat([encoder(view) for view in views]), labels


def features(encoder: nn.Module, params: ModelParams) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (training features, labels, test features, labels) of an encoder in eval mode."""
    sets = (params.dataset.train_splits, params.dataset.test_splits)
    pairs = (features_of(encoder, params, data_sets.get_dataset(params, splits)) for splits in sets)
    return tuple(itertools.chain(*pairs))


def with_few_labels(train_x: Tensor, train_y: Tensor, test_x: Tensor, test_y: Tensor) -> float:
    """Return the accuracy (%) of a linear probe fitted to LABELS_PER_CLASS labels of each class, averaged over
    LABEL_DRAWS draws."""
    accuracies = []
    for draw in range(LABEL_DRAWS):
        rng = np.random.default_rng(draw)
        classes = [np.flatnonzero(train_y == label) for label in train_y.unique()]
        chosen = np.concatenate([rng.choice(members, LABELS_PER_CLASS, replace=False) for members in classes])
        scores = validation.linear_probe(train_x[chosen], train_y[chosen], test_x, test_y)
        accuracies.append(scores["valid_class_acc"])
    return float(np.mean(accuracies))


def encoder_scores(encoder: nn.Module, params: ModelParams) -> dict[str, float]:
    sets = features(encoder, params)
    return {
        f"linear, {LABELS_PER_CLASS * params.dataset.n_classes} labels (%)": with_few_labels(*sets),
        "linear, all labels (%)": validation.linear_probe(*sets)["valid_class_acc"],
        "kNN, k = 20 (%)": validation.knn(*sets)["valid_knn20_acc"],
        "RankMe": validation.rank_me(*sets)["valid_rank_me"],
    }


def scores_table(random: dict[str, float], trained: dict[str, float]) -> str:
    rows = [[name, f"{random[name]:.1f}", f"{trained[name]:.1f}"] for name in random]
    return markdown_table(["test set", "random encoder", "trained encoder"], rows)


@one_line_errors()
def main(arguments: Sequence[str] | None = None) -> None:
    parser = parser_of("demo", __doc__)
    parser.add_argument(
        "--max_epochs", "--epochs", type=int, metavar="N", default=20, help="epochs of pretraining (default: 20)"
    )
    parser.add_argument(
        "--linear_epochs", type=int, metavar="N", default=10, help="epochs of the linear classifier (default: 10)"
    )
    args = parser.parse_args(arguments)
    with locked(OUT):
        run_demo(args.max_epochs, args.linear_epochs)


def run_demo(epochs: int, linear_epochs: int) -> None:
    start = time.time()
    refuse_other_run()
    params = recipes.recipe("vicreg", "digits", max_epochs=epochs, seed=0, evaluations=["linear_probe", "knn"])
    linear = {"linear_epochs": linear_epochs, "linear_lr": 4.0} if linear_epochs else {}
    options = RunOptions(out=str(OUT), logger=["csv"], log_every_n_steps=1, **linear)
    random = encoder_scores(SelfSupervisedMethod(params).model, params)
    delete_earlier_demo()
    print(f"Pretraining a small convolutional network with VICReg on {params.dataset_name}, without labels:")
    results = train.run_or_resume(OUT, "vicreg", options, params, batch_size=64)
    trained = encoder_scores(load_encoder(OUT / "pretrained.ckpt").model, params)
    result = scores_table(random, trained)
    if linear_epochs:
        accuracy = results["linear classifier"]["valid_acc1"]
        result += f"\n\nLinearClassifierMethod after {epochs_text(linear_epochs)}: {accuracy:.1f} % of the test set."
    atomic_write(OUT / "results.md", result + "\n")
    results[run_folder.baseline_of(results)] |= random
    results["trained encoder"] |= trained
    atomic_write(OUT / "results.json", to_json(results, indent=2))
    page = report.write_report([OUT])
    print(f"\n{result}\n\nverdict: {results['verdict']}\nencoder: {OUT / 'pretrained.ckpt'}\nlog: {OUT / 'log.txt'}")
    print(f"{time.time() - start:.0f} seconds. Curves, neighbors and a map, in a browser: {page}")


def refuse_other_run() -> None:
    """Raise ValueError if OUT holds a run, and another command than the demo has begun or resumed it."""
    file = OUT / "command.txt"
    commands = file.read_text().splitlines() if file.is_file() else [""]
    if (OUT / "config.yaml").exists() and not all(map(COMMAND.match, commands)):
        raise ValueError(f"{OUT}: holds a run that is not a demo, which a demo would overwrite. Move {OUT} away.")


def delete_earlier_demo() -> None:
    """Delete the files that a new run would append to or resume from, and those about the earlier encoder."""
    remove(OUT / "config.yaml")  # first: without command.txt, it would be that of another run
    for name in ("command.txt", "run.json", "linear.ckpt", "pretraining", "linear", "pretrained.evaluation"):
        remove(OUT / name)
