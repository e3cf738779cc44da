"""Every evaluation protocol in one table: name -> (an encoder with a labelled data set, seed) -> dict of scalars.

Accuracies in percent. Settings are chosen on parts of the labelled training set; test labels only score.
"""

from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from attrs import frozen
from rich.progress import track
from torch import Tensor

import evaluation
import features
import label_free
import subsets
from features import Features
from shared_params import EncoderAndDataParams
from svm import COST_OF_FEW, COSTS, few_presences, svm
from training_protocols import Training, trained
from weights import Encoder

Scores = dict[str, float]

KS = (1, 5, 20, 200)
SHOTS, DRAWS = (1, 2, 4, 8, 16, 32, 64, 96), 5
FEW_LABELS, FEW_DRAWS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000), 3
HELD_OUT, FEWEST_TO_HOLD_OUT = 0.2, 5  # of the training set; images of a class below which nothing is held out
DECAYS = tuple(10.0**i for i in range(5, -7, -1))
DECAY_OF_FEW = 100.0  # that of the probe while pretraining
MOST_IMAGES = 25_600  # for what needs no labels (https://arxiv.org/abs/2210.02885, section 3.3)
VIEWS = {"n": 1000, "n_views": 10, "seed": 0}


class Subject:
    """An encoder, and the data set on which it is evaluated. Features are extracted when they are first asked for.

    Args:
        params: settings to read the data set; see features.data_params.
        cache: folder of the extracted features.
        stages: extract the output of each stage in the same pass.
        training: settings of the protocols that train.
    """

    def __init__(
        self, encoder: Encoder, params: EncoderAndDataParams, cache: Path, stages: bool, training: Training
    ):
        self.encoder, self.params, self.cache = encoder, params, cache
        self.stages, self.training = stages, training

    @cached_property
    def train(self) -> Features:
        return features.extract(self.encoder, self.params, self.params.dataset.train_splits, self.cache, self.stages)

    @cached_property
    def test(self) -> Features:
        return features.extract(self.encoder, self.params, self.params.dataset.test_splits, self.cache, self.stages)

    @cached_property
    def views(self) -> Tensor:
        """[N, V, E] of some training images."""
        splits = self.params.dataset.train_splits
        return self.on_device(features.extract_views(self.encoder, self.params, splits, self.cache, **VIEWS))

    @property
    def sets(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(train features, labels, test features, labels) on the encoder's device."""
        return tuple(map(self.on_device, (self.train.x, self.train.y, self.test.x, self.test.y)))

    @property
    def some(self) -> Tensor:
        """Features of at most MOST_IMAGES training images, always the same ones."""
        chosen = np.random.default_rng(0).permutation(len(self.train.x))[:MOST_IMAGES]
        return self.on_device(self.train.x[np.sort(chosen)])

    def on_device(self, x: Tensor) -> Tensor:
        return x.to(features.device_of(self.encoder))


# ---- on frozen features ----


def knn(train_x: Tensor, train_y: Tensor, test_x: Tensor, test_y: Tensor) -> Scores:
    found = evaluation.knn(train_x, train_y, test_x, test_y, ks=KS)
    return {name.removeprefix("valid_").replace("_acc", "_acc1"): value for name, value in found.items()}


def linear(train_x: Tensor, train_y: Tensor, test_x: Tensor, test_y: Tensor, seed: int = 0) -> Scores:
    """Logistic regression whose L2 is chosen on a held-out part of the training set; then fitted to all of it."""
    classes, target = train_y.unique(return_inverse=True)
    train_x, test_x = evaluation.standardized(train_x.float(), test_x.float())
    decay = choose_decay(train_x, target, seed)
    _, logits = evaluation.linear_logits(train_x, test_x, target, decay)
    return {**{f"acc{k}": evaluation.accuracy(logits, classes, test_y, k) for k in (1, 5)}, "l2": decay}


def choose_decay(x: Tensor, target: Tensor, seed: int) -> float:
    """The best of 12 decays, a decade apart, on the held-out part; then the best of those in quarters of a decade
    around it: the resolution of Kornblith et al.'s 45. Of equal ones the strongest. Few labels: a fixed one."""
    if int(target.bincount().min()) < FEWEST_TO_HOLD_OUT:
        return DECAY_OF_FEW
    fit, score = (torch.from_numpy(rows) for rows in subsets.held_out(target.cpu().numpy(), HELD_OUT, seed))
    sets, classes = (x[fit], x[score], target[fit]), torch.arange(int(target.max()) + 1, device=x.device)

    def best(decays: list[float]) -> float:
        logits = {decay: evaluation.linear_logits(*sets, decay)[1] for decay in sorted(decays, reverse=True)}
        return max(logits, key=lambda decay: evaluation.accuracy(logits[decay], classes, target[score], 1))

    coarse = best(list(DECAYS))
    return best([coarse * 10 ** (i / 4) for i in range(-3, 4)])


def linear_stages(subject: Subject, seed: int) -> Scores:
    """`linear` on the output of each stage of a ResNet, averaged over the image."""
    if not subject.train.stages:
        raise ValueError(f"{subject.params.encoder_arch} has no layer1 to layer4: leave out the protocol linear_stages")
    found = {}
    for name in track(sorted(subject.train.stages), "linear classifiers of the stages"):
        train, test = subject.train, subject.test
        sets = map(subject.on_device, (train.stages[name], train.y, test.stages[name], test.y))
        found[f"{name}_acc1"] = linear(*sets, seed)["acc1"]
    return found


def low_shot_svm(train_x: Tensor, train_y: Tensor, test_x: Tensor, test_y: Tensor, seed: int = 0) -> Scores:
    """`svm` on few images of each class: mean and deviation over draws."""
    found, y = {}, train_y.cpu().numpy()
    most = int((y > 0).sum(0).min()) if y.ndim == 2 else int(np.bincount(y[y >= 0]).min())
    for k in track([k for k in SHOTS if k <= most], "low-shot SVMs"):
        scores = []
        for draw in range(DRAWS):
            if y.ndim == 2:
                labels = few_presences(train_y, k, (seed, draw))
                rows = (labels != 0).any(1)
            else:
                rows = torch.from_numpy(subsets.stratified(y, per_class=k, seed=seed * DRAWS + draw))
                labels = train_y
            scores.append(svm(train_x[rows], labels[rows], test_x, test_y))
        name, values = f"shot{k}_{next(iter(scores[0])).removeprefix('svm_')}", [*map(lambda s: [*s.values()][0], scores)]
        found |= {name: float(np.mean(values)), f"{name}_std": float(np.std(values))}
    return found


def few_labels(train_x: Tensor, train_y: Tensor, test_x: Tensor, test_y: Tensor, seed: int = 0) -> Scores:
    """`linear` on few images of each class, up to all: mean and deviation over draws. Features are standardized by all
    training images, whose labels that takes not."""
    classes, target = train_y.unique(return_inverse=True)
    train_x, test_x = evaluation.standardized(train_x.float(), test_x.float())
    found, labels = {}, target.cpu().numpy()
    fewest = int(np.bincount(labels).min())
    for k in track([*(k for k in FEW_LABELS if k < fewest), None], "few-label curve"):
        scores = []
        for draw in range(FEW_DRAWS if k else 1):
            rows = torch.from_numpy(subsets.stratified(labels, per_class=k, seed=seed * FEW_DRAWS + draw))
            decay = choose_decay(train_x[rows], target[rows], seed)
            _, logits = evaluation.linear_logits(train_x[rows], test_x, target[rows], decay)
            scores.append(evaluation.accuracy(logits, classes, test_y, 1))
        name = f"labels{k or '_all'}_acc1"
        found |= {name: float(np.mean(scores))} | ({f"{name}_std": float(np.std(scores))} if k else {})
    return found


def rank_me(x: Tensor) -> Scores:
    return {"rank_me": evaluation.rank_me(x)["valid_rank_me"]}


# ---- the table ----


@frozen
class Protocol:
    """`definition` is what the number means, in one line."""

    run: Callable[[Subject, int], Scores]
    definition: str
    source: str
    seeded: bool = True  # whether the seed changes anything
    trains: bool = False
    labels: str = "one class an image"  # "presences, too", "none"


def on_sets(function: Callable[..., Scores], seeded: bool = True) -> Callable[[Subject, int], Scores]:
    return lambda subject, seed: function(*subject.sets, **({"seed": seed} if seeded else {}))


LINEAR = (
    "multinomial logistic regression on frozen, standardized features of whole images, L-BFGS to the optimum; L2 of "
    f"{len(DECAYS)} decades, then quarters of one, by accuracy on {HELD_OUT:.0%} of the training set, held out"
)
PROTOCOLS = {
    "knn": Protocol(
        on_sets(knn, seeded=False),
        f"weighted nearest neighbours by cosine, T = 0.07, k = {', '.join(map(str, KS))}",
        "https://arxiv.org/abs/1805.01978, section 3.4",
        seeded=False,
    ),
    "linear": Protocol(
        on_sets(linear), f"{LINEAR}; then refitted to all of it", "https://arxiv.org/abs/1805.08974, A.3; SimCLR, B.8"
    ),
}
