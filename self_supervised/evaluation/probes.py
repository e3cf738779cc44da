"""Protocols on frozen features: (train features [N, E], labels, test features, labels) -> dict of scalars.

Accuracies are in percent. Hyperparameters are chosen on parts of the training set; test labels are only used for
scoring.
"""

from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from rich.progress import track
from torch import Tensor

from self_supervised.data import subsets
from self_supervised.evaluation import validation
from self_supervised.evaluation.linear_models import (
    Regressions,
    accuracy,
    few_presences,
    hits,
    linear_logits,
    percentage,
    standardized,
    svm,
)
from self_supervised.numerics import Scores, finite

KS = (1, 5, 20, 200)  # neighbors of kNN
RETRIEVED = (1, 5, 10, 20)  # training samples retrieved
VOC_SHOTS = (1, 2, 4, 8, 16, 32, 64, 96)  # images per class
VOC_DRAWS = 5
FEW_LABELS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000)  # images per class
FEW_DRAWS = 3
DECAYS = tuple(10.0**i for i in range(5, -7, -1))
HELD_OUT = 0.2  # fraction of the training set
FEWEST_TO_HOLD_OUT = 5  # images per class; if most images are of smaller classes, DECAY_OF_FEW is used
PRECISION = 1e-4  # of logits; with less, another L2 may be chosen
IMBALANCE = 2  # images of the largest test class, relative to the smallest, from which classes are averaged
DECAY_OF_FEW = validation.PROBE_DECAY  # that of the linear probe during pretraining


def knn_protocol(train_x: Tensor, train_y: Tensor, test_x: Tensor, test_y: Tensor) -> Scores:
    found_by = validation.knn_hits(train_x, train_y, test_x, test_y, KS)
    accuracies = {f"knn{k}_acc1": percentage(found) for k, found in found_by.items()}
    return accuracies | balanced_accuracy("knn20_class_mean_acc1", found_by[20], test_y)


def balanced_accuracy(name: str, found: Tensor, test_y: Tensor) -> Scores:
    """Return {name: mean of the accuracies of the classes}, the balanced accuracy, for imbalanced test images. If no
    class has IMBALANCE times as many images as another, the accuracy says enough."""
    _, target, images_of = test_y.unique(return_inverse=True, return_counts=True)
    if images_of.max() < IMBALANCE * images_of.min():
        return {}
    found_of = target[found].bincount(minlength=len(images_of))
    return {name: 100.0 * float((found_of / images_of).mean())}


def retrieval(train_x: Tensor, train_y: Tensor, test_x: Tensor, test_y: Tensor) -> Scores:
    """Return recall at k: the percentage of test samples with at least one sample of their class among the k nearest
    training samples by cosine. With fewer than k training samples, all of them count."""
    hits = {k: 0 for k in RETRIEVED}
    for _, nearest, y in validation.nearest_by_cosine(train_x, test_x, test_y, max(RETRIEVED)):
        same = train_y[nearest] == y[:, None]
        hits = {k: n + int(same[:, :k].any(1).sum()) for k, n in hits.items()}
    return {f"recall{k}": 100.0 * n / len(test_y) for k, n in hits.items()}


def linear(train_x: Tensor, train_y: Tensor, test_x: Tensor, test_y: Tensor, seed: int = 0) -> Scores:
    """Score logistic regression on standardized features, with the L2 of `choose_decay`, fitted to the whole training
    set."""
    first, first_five, decay = linear_hits(train_x, train_y, test_x, test_y, seed)
    accuracies = {"acc1": percentage(first), "acc5": percentage(first_five)}
    return {**accuracies, **balanced_accuracy("class_mean_acc1", first, test_y), "l2": decay}


def linear_classes(train_x: Tensor, train_y: Tensor, test_x: Tensor, test_y: Tensor, seed: int = 0) -> dict[int, float]:
    """Return the accuracy of `linear` on the test images of each class, by the class's number."""
    first, _, _ = linear_hits(train_x, train_y, test_x, test_y, seed)
    return {number: percentage(first[test_y == number]) for number in test_y.unique().tolist()}


def linear_hits(
    train_x: Tensor, train_y: Tensor, test_x: Tensor, test_y: Tensor, seed: int
) -> tuple[Tensor, Tensor, float]:
    """Return whether the class of each test image is the first one of `linear`, and whether it is among the first five,
    bool [N] each; and the L2."""
    classes, target = train_y.unique(return_inverse=True)
    train_x, test_x = standardized(train_x, test_x)
    decay = choose_decay(train_x, target, seed)
    _, logits = linear_logits(train_x, test_x, target, decay, PRECISION)
    return hits(logits, classes, test_y, 1), hits(logits, classes, test_y, 5), decay


def choose_decay(x: Tensor, target: Tensor, seed: int) -> float:
    """Return the L2 with the best accuracy on a held-out part; among equally good ones, that with the lowest cross
    entropy, because on few images most are equally good, even one so strong that only the bias decides.

    12 values are tried, a decade apart, then quarters of a decade around the best; all are of the grid of
    https://arxiv.org/abs/1805.08974, appendix. If most images are of classes with fewer than 5, it is DECAY_OF_FEW.
    """
    images_of = target.bincount()
    if 2 * int(images_of[images_of < FEWEST_TO_HOLD_OUT].sum()) > len(target):
        return DECAY_OF_FEW
    fit, score = (torch.from_numpy(rows) for rows in subsets.held_out(target.cpu().numpy(), HELD_OUT, seed))
    regressions = Regressions(x[fit], x[score], target[fit], PRECISION)
    classes = torch.arange(int(target.max()) + 1, device=x.device)

    @cache  # the best decade is also the middle of its quarters
    def quality(decay: float) -> tuple[float, float]:
        _, logits = regressions(decay)
        return accuracy(logits, classes, target[score], 1), -float(F.cross_entropy(logits, target[score]))

    coarse = max(DECAYS, key=quality)
    fine = (coarse * 10 ** (i / 4) for i in range(3, -4, -1))
    return max((decay for decay in fine if DECAYS[-1] <= decay <= DECAYS[0]), key=quality)


def few_labels(train_x: Tensor, train_y: Tensor, test_x: Tensor, test_y: Tensor, seed: int = 0) -> Scores:
    """Score `linear` with few labels per class, up to all: mean and standard deviation over draws.

    Features are standardized by all training images, because that needs no labels.
    """
    classes, target = train_y.unique(return_inverse=True)
    train_x, test_x = standardized(train_x, test_x)
    labels = target.cpu().numpy()

    def score(rows: np.ndarray) -> float:
        x, y = train_x[torch.from_numpy(rows)], target[torch.from_numpy(rows)]
        _, logits = linear_logits(x, test_x, y, choose_decay(x, y, seed), PRECISION)
        return accuracy(logits, classes, test_y, 1)

    scores = {}
    for k in track([k for k in FEW_LABELS if k < np.bincount(labels).min()], "few-label curve"):
        draws = [subsets.stratified(labels, per_class=k, seed=seed * FEW_DRAWS + draw) for draw in range(FEW_DRAWS)]
        scores |= mean_and_std(f"labels{k}_acc1", [score(rows) for rows in draws])
    return scores | {"labels_all_acc1": score(np.arange(len(labels)))}


def low_shot_svm(train_x: Tensor, train_y: Tensor, test_x: Tensor, test_y: Tensor, seed: int = 0) -> Scores:
    """Score `svm` on few images per class: mean and standard deviation over draws."""
    train_x = finite(train_x, "training features")
    test_x = finite(test_x, "test features")
    multi_label = train_y.dim() == 2
    present = (train_y > 0).sum(0) if multi_label else train_y.unique(return_counts=True)[1]
    means = {}
    for k in track([k for k in VOC_SHOTS if k <= int(present.min())], "low-shot SVMs"):
        scores = []
        for draw in range(seed * VOC_DRAWS, (seed + 1) * VOC_DRAWS):
            if multi_label:
                labels = few_presences(train_y, k, draw)
                rows = (labels != 0).any(1).cpu().numpy().nonzero()[0]
            else:
                labels = train_y
                rows = subsets.stratified(train_y.cpu().numpy(), per_class=k, seed=draw)
            rows = torch.from_numpy(rows)
            scores.append(svm(train_x[rows], labels[rows], test_x, test_y))
        (name,) = scores[0]
        means |= mean_and_std(f"shot{k}_{name}", [score[name] for score in scores])
    return means


def mean_and_std(name: str, values: list[float]) -> Scores:
    """Return the mean over draws and, if there is more than one, the sample standard deviation (as over seeds)."""
    deviation = {f"{name}_std": float(np.std(values, ddof=1))} if len(values) > 1 else {}
    return {name: float(np.mean(values)), **deviation}
