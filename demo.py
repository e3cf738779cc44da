"""Two minutes on a laptop: pretrain on scans of digits without their labels, then see what the encoder has learned.

    python demo.py            (or `make demo`, which also installs)

Leaves a run in runs/demo, like those of train.py, with results.md and a page about it: report.html.
"""

import argparse
import logging
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import CSVLogger
from torch import Tensor, nn

import augmentations
import command_line
import data
import evaluation
import layers
import run_folder
from folder_lock import locked
from learning_rate import LearningRate
from linear_classifier import LinearClassifierMethod
from moco import SelfSupervisedMethod
from model_params import ModelParams, VICRegParams
from program import one_line_errors
from progress import Progress
from run_options import RunOptions
from tools import report
from whole_files import to_json, write_whole

OUT = Path("runs/demo")
LABELS_PER_CLASS = 5
DRAWS = 5  # of the few labels; the mean is reported


def small_encoder() -> nn.Module:
    """[N, 1, 8, 8] -> [N, 256]: any module may be the encoder, and 8 x 8 scans do not need a ResNet."""

    def block(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
        convolution = nn.Conv2d(inputs, outputs, kernel_size=3, stride=stride, padding=1, bias=False)
        return [convolution, nn.BatchNorm2d(outputs), nn.ReLU()]

    widths = [
        block(1, 64, 1),
        block(64, 64, 1),
        block(64, 128, 2),
        block(128, 128, 1),
        block(128, 256, 2),
        block(256, 256, 1),
    ]
    return nn.Sequential(*sum(widths, []), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def quiet_trainer(epochs: int, name: str) -> pl.Trainer:
    return pl.Trainer(
        max_epochs=epochs,
        accelerator="auto",
        callbacks=[Progress(OUT / name / "throughput.csv"), LearningRate()],
        enable_checkpointing=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        logger=CSVLogger(OUT, name=name, version=""),
        num_sanity_val_steps=0,
    )


@torch.no_grad()
def features(encoder: nn.Module, params: ModelParams) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(train features, labels, test features, labels) of an encoder in eval mode."""
    result = []
    for splits in (params.dataset.train_splits, params.dataset.test_splits):
        images, labels = (torch.cat(part) for part in zip(*loader(params, splits), strict=True))
        views = augmentations.evaluation_view(images, params).split(256)
        with layers.in_eval_mode(encoder):
            result += [torch.cat([encoder(view) for view in views]), labels]
    return tuple(result)


def loader(params: ModelParams, splits: tuple[str, ...]):
    return data.get_loader(params, data.get_dataset(params, splits), training=False)


def with_few_labels(train_x: Tensor, train_y: Tensor, test_x: Tensor, test_y: Tensor) -> float:
    """Accuracy of the linear probe with LABELS_PER_CLASS labels of each class, mean over DRAWS draws of them."""
    accuracies = []
    for draw in range(DRAWS):
        rng = np.random.default_rng(draw)
        classes = [np.flatnonzero(train_y == label) for label in train_y.unique()]
        chosen = np.concatenate([rng.choice(members, LABELS_PER_CLASS, replace=False) for members in classes])
        scores = evaluation.linear_probe(train_x[chosen], train_y[chosen], test_x, test_y)
        accuracies.append(scores["valid_class_acc"])
    return float(np.mean(accuracies))


def score(encoder: nn.Module, params: ModelParams) -> dict[str, float]:
    sets = features(encoder, params)
    return {
        f"linear, {LABELS_PER_CLASS * params.dataset.n_classes} labels (%)": with_few_labels(*sets),
        "linear, all labels (%)": evaluation.linear_probe(*sets)["valid_class_acc"],
        "kNN, k = 20 (%)": evaluation.knn(*sets)["valid_knn20_acc"],
        "RankMe": evaluation.rank_me(*sets)["valid_rank_me"],
    }


def table(random: dict[str, float], trained: dict[str, float]) -> str:
    rows = [f"| {name} | {random[name]:.1f} | {trained[name]:.1f} |" for name in random]
    return "\n".join(["| test set | random encoder | trained encoder |", "|---|---|---|", *rows])


def begin(params: ModelParams) -> None:
    """Leave what train.py leaves of a run, for the report."""
    for name in ("command.txt", "run.json"):  # of an earlier demo
        (OUT / name).unlink(missing_ok=True)
    options = RunOptions(out=str(OUT), logger=["csv"], log_every_n_steps=1)
    run_folder.begin(OUT, command_line.to_yaml("vicreg", options, params), sys.argv)


def pretrain(params: ModelParams, epochs: int) -> tuple[dict[str, float], dict[str, float]]:
    """Scores of the random and of the trained encoder; leaves pretrained.ckpt."""
    torch.manual_seed(0)  # the weights of an encoder of one's own are one's own business
    model = SelfSupervisedMethod(params, encoder=small_encoder())
    begin(model.params)
    random = score(model.model, params)
    print(f"Pretraining a small convolutional network with VICReg on {params.dataset_name}, without labels:")
    trainer = quiet_trainer(epochs, "pretraining")
    trainer.fit(model)
    trainer.save_checkpoint(OUT / "pretrained.ckpt")
    return random, score(model.model, params)


def train_classifier(epochs: int) -> float:
    """Accuracy of LinearClassifierMethod on the test set."""
    print("Training LinearClassifierMethod on its frozen encoder:")
    linear = LinearClassifierMethod.from_moco_checkpoint(
        OUT / "pretrained.ckpt", encoder=small_encoder(), batch_size=64, lr=1.0, seed=0
    )
    trainer = quiet_trainer(epochs, "linear")
    trainer.fit(linear)
    return trainer.callback_metrics["valid_acc1"].item()


@one_line_errors()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--linear_epochs", type=int, default=10)
    args = parser.parse_args()
    warnings.filterwarnings("ignore", module="pytorch_lightning")  # of our deliberately small numbers
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    with locked(OUT):
        run(args.epochs, args.linear_epochs)


def run(epochs: int, linear_epochs: int) -> None:
    start, evaluations = time.time(), ["linear_probe", "knn"]

    recipe = {"batch_size": 64, "lars_eta": 0.005, "lars_warmup_epochs": 2, "seed": 0, "evaluations": evaluations}
    params = VICRegParams(dataset_name="digits", max_epochs=epochs, **recipe)
    with run_folder.logged(OUT / "log.txt"):
        random, trained = pretrain(params, epochs)
        accuracy = train_classifier(linear_epochs)
    result = table(random, trained)
    result += f"\n\nLinearClassifierMethod after {linear_epochs} epochs: {accuracy:.1f} % of the test set."
    write_whole(OUT / "results.md", result + "\n")
    results = {"random encoder": random, "trained encoder": trained, "linear classifier": {"valid_acc1": accuracy}}
    write_whole(OUT / "results.json", to_json(results, indent=2))
    page = report.write([OUT], encoder=small_encoder())
    print(f"\n{result}\n\n{time.time() - start:.0f} seconds. Curves, neighbours and a map, in a browser: {page}")


if __name__ == "__main__":
    main()
