"""Two minutes on a laptop: pretrain on scans of digits without their labels, then see what the encoder has learned.

    python demo.py            (or `make demo`, which also installs)

Writes pretrained.ckpt, results.md and curves.png into runs/demo.
"""

import argparse
import logging
import time
import warnings
from pathlib import Path

import matplotlib
import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import RichProgressBar
from pytorch_lightning.loggers import CSVLogger
from torch import Tensor, nn

import augmentations
import data
import evaluation
from linear_classifier import LinearClassifierMethod
from moco import SelfSupervisedMethod
from model_params import ModelParams, VICRegParams

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (the backend must be chosen first)

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
        callbacks=[RichProgressBar()],
        enable_checkpointing=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        logger=CSVLogger(OUT, name=name, version=""),
        num_sanity_val_steps=0,
    )


@torch.no_grad()
def features(encoder: nn.Module, params: ModelParams) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(train features, labels, test features, labels) of an encoder in eval mode."""
    result, was_training = [], encoder.training
    encoder.eval()
    for splits in (params.dataset.train_splits, params.dataset.test_splits):
        images, labels = (torch.cat(part) for part in zip(*loader(params, splits), strict=True))
        views = augmentations.evaluation_view(images, params).split(256)
        result += [torch.cat([encoder(view) for view in views]), labels]
    encoder.train(was_training)
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


def draw_curves(metrics: Path, file: Path) -> None:
    steps = np.genfromtxt(metrics, delimiter=",", names=True)
    panels = {
        "loss": ["step_train_loss"],
        "cosine of two views": ["step_pos_cos", "step_neg_cos"],
        "probe accuracy (%)": ["valid_class_acc", "valid_knn20_acc"],
    }
    labels = {
        "step_pos_cos": "same image",
        "step_neg_cos": "different images",
        "valid_class_acc": "linear",
        "valid_knn20_acc": "kNN, k = 20",
    }
    figure, axes = plt.subplots(1, len(panels), figsize=(12, 3.4), layout="constrained")
    for axis, (title, names) in zip(axes, panels.items(), strict=True):
        for name in names:
            there = ~np.isnan(steps[name])
            marker = "o" if name.startswith("valid") else None
            axis.plot(steps["step"][there], steps[name][there], marker=marker, label=labels.get(name))
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.3)
        if len(names) > 1:
            axis.legend(frameon=False)
    figure.savefig(file, dpi=120)
    plt.close(figure)


def pretrain(params: ModelParams, epochs: int) -> tuple[dict[str, float], dict[str, float]]:
    """Scores of the random and of the trained encoder; leaves pretrained.ckpt."""
    torch.manual_seed(0)  # the weights of an encoder of one's own are one's own business
    model = SelfSupervisedMethod(params, encoder=small_encoder())
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--linear_epochs", type=int, default=10)
    args = parser.parse_args()
    warnings.filterwarnings("ignore", module="pytorch_lightning")  # of our deliberately small numbers
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    start, evaluations = time.time(), ["linear_probe", "knn"]

    recipe = {"batch_size": 64, "lars_eta": 0.005, "lars_warmup_epochs": 2, "seed": 0, "evaluations": evaluations}
    result = table(*pretrain(VICRegParams(dataset_name="digits", **recipe), args.epochs))
    accuracy = train_classifier(args.linear_epochs)
    result += f"\n\nLinearClassifierMethod after {args.linear_epochs} epochs: {accuracy:.1f} % of the test set."
    (OUT / "results.md").write_text(result + "\n")
    draw_curves(OUT / "pretraining" / "metrics.csv", OUT / "curves.png")
    print(f"\n{result}\n\n{time.time() - start:.0f} seconds. Curves: {OUT / 'curves.png'}")


if __name__ == "__main__":
    main()
