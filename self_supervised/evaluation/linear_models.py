"""Linear models on frozen features, fitted to the optimum: logistic regression and support vector machines (SVMs).

Both minimize a convex loss by `fit_linear`, for all classes at once; SVMs also for all folds of the cross-validation.
"""

import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.model_selection import StratifiedKFold
from torch import Tensor

from self_supervised.numerics import Scores, finite, power_of_two, unit

LossOfScores = Callable[[Tensor], tuple[Tensor, Tensor]]  # scores [N, K] -> (summed loss, its gradient [N, K])
COSTS = (*(2.0**-i for i in range(19, 3, -1)), *(10.0**i for i in range(-7, 3)))  # the 26 of the SVM's source
FOLDS = 3
COST_OF_FEW = 0.5  # of classes with fewer images than there are folds (that of https://arxiv.org/abs/2005.04966)
PRESENCE_WEIGHT = 2.0  # of positive examples
FLAT = 1e-5  # fraction by which the loss must fall between two checks
MOST_STEPS = 400  # of L-BFGS
BETWEEN_CHECKS = 20  # steps


# ---- features in, accuracy out ----


def standardized(train_x: Tensor, test_x: Tensor) -> tuple[Tensor, Tensor]:
    """Standardize both by mean and standard deviation of the training features; constant features become 0.

    A feature counts as constant if it varies only by rounding, relative to its scale: a random encoder's features may
    all be below 1e-8.
    """
    train_x = finite(train_x, "training features")
    test_x = finite(test_x, "test features")
    scale = power_of_two(train_x.abs().amax())  # otherwise squares may overflow float32
    train_x = train_x / scale
    test_x = test_x / scale
    mean = train_x.mean(0)
    std = train_x.std(0, correction=0)
    std = torch.where(std > 1e-6 * torch.maximum(std.max(), mean.abs()), std, torch.inf)
    return (train_x - mean) / std, (test_x - mean) / std


def accuracy(logits: Tensor, classes: Tensor, y: Tensor, k: int) -> float:
    """Return the percentage of images whose class is among the k highest logits; column i belongs to classes[i]."""
    return percentage(hits(logits, classes, y, k))


def percentage(hits: Tensor) -> float:
    """Return the percentage of images [N] that are hits."""
    return 100.0 * (int(hits.sum()) / len(hits))


def hits(logits: Tensor, classes: Tensor, y: Tensor, k: int) -> Tensor:
    """Return whether the class of each image [N] is among the k highest logits."""
    first = logits.argmax(1, keepdim=True) if k == 1 else logits.topk(min(k, len(classes)), dim=1).indices
    return (classes[first] == y[:, None]).any(1)


# ---- solver ----


def within_span(train_x: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """Return all sets of features in coordinates of the span of the training features, if there are fewer training
    images than features. The optimum of a linear model lies in this span: weights outside of it only add decay."""
    if train_x.shape[1] <= len(train_x):
        return train_x, *others
    basis = torch.linalg.qr(train_x.T).Q
    return tuple(x @ basis for x in (train_x, *others))


@torch.no_grad()
def fit_linear(
    x: Tensor,
    loss: LossOfScores,
    n_outputs: int,
    decay: float,
    flatness: float,
    bias: bool = True,
    precision: float = 1e-3,
    gram: Tensor | None = None,
    start: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Return weights [E, K] and bias [K] that minimize loss(x @ weights + bias) + decay / 2 |weights|^2 for a convex
    loss.

    L-BFGS runs in coordinates v, b in which the curvature at the starting point is near the identity: it takes 10 to 50
    steps instead of hundreds. Only on separable classes with weak L2 does it take up to MOST_STEPS, because the
    curvature falls with the loss. What counts as a small gradient falls with it, too.

    Args:
        loss: a function whose gradient stays precise where the loss is near 0.
        flatness: approximately 1 / the second derivative of one image's loss with respect to a score.
        bias: if False, the bias stays 0.
        precision: approximate relative precision of the scores.
        gram: x.T @ x, if it is already known.
        start: weights and bias from which to start; default: 0.
    """
    n = len(x)
    scale = 1e-6 * n * x.shape[1] * n_outputs**2  # of the loss: L-BFGS drops changes of gradients below 1e-10
    curvature = (x.T @ x if gram is None else gram) / flatness
    curvature.diagonal().add_(max(decay, 0.1 * float(curvature.diagonal().mean())))  # what is flat may change most
    factor = torch.linalg.cholesky(curvature / scale)
    bias_factor = (n / flatness / scale) ** 0.5
    v, b = x.new_zeros(x.shape[1], n_outputs), x.new_zeros(n_outputs)
    fitted = [v, b] if bias else [v]
    limits = {"max_iter": BETWEEN_CHECKS, "max_eval": 2 * BETWEEN_CHECKS, "tolerance_change": 0}
    optimizer = torch.optim.LBFGS(fitted, line_search_fn="strong_wolfe", **limits)

    def weights() -> tuple[Tensor, Tensor]:
        return torch.linalg.solve_triangular(factor.T, v, upper=True), b / bias_factor

    def loss_and_gradient() -> Tensor:
        weight, bias = weights()
        value, error = loss(x @ weight + bias)
        gradient = ((error.T @ x).T + decay * weight) / scale  # x.T @ error is slow on a CPU
        v.grad = torch.linalg.solve_triangular(factor, gradient, upper=False).contiguous()
        b.grad = error.sum(0) / scale / bias_factor
        return (decay / 2 * weight.square().sum() + value) / scale

    value = float(loss_and_gradient())
    small = precision * (n / scale) ** 0.5 / max(value, 1e-30)  # of gradient / loss; with one class, the loss is 0
    if start is not None:
        v.copy_(factor.T @ start[0])
        b.copy_(start[1] * bias_factor)
        value = float(loss_and_gradient())
    for check in range(MOST_STEPS // BETWEEN_CHECKS):
        before = value
        optimizer.param_groups[0]["tolerance_grad"] = small * before
        optimizer.step(loss_and_gradient)
        value = float(loss_and_gradient())
        steepest = max(float(part.grad.abs().max()) for part in fitted)
        is_flat = not value < (1 - FLAT) * before  # or NaN
        if is_flat and steepest > small * value and start is not None and check == 0:  # the line search was stuck
            return fit_linear(x, loss, n_outputs, decay, flatness, bias, precision, gram)
        if is_flat or steepest <= small * value:
            break
    return weights()


# ---- logistic regression ----


@torch.no_grad()
def logistic_regression(
    x: Tensor, y: Tensor, decay: float, precision: float = 1e-3, **known: Any
) -> tuple[Tensor, Tensor]:
    """Return weights [E, C] and bias [C] that minimize the summed cross entropy of x [N, E] + decay / 2 |weights|^2.
    `known` are gram and start of `fit_linear`."""
    n_classes = int(y.max()) + 1
    right = (torch.arange(len(x), device=x.device), y)

    def cross_entropy(scores: Tensor) -> tuple[Tensor, Tensor]:
        ahead = scores - scores[right][:, None]  # of the right class
        ahead[right] = -torch.inf
        losses = F.softplus(ahead.logsumexp(1))  # -log p of the right class, precise where p is near 1
        error = ahead.sub_(losses[:, None]).exp_()  # p of the other classes
        error[right] = -error.sum(1)  # p - 1
        return losses.sum(), error

    return fit_linear(x, cross_entropy, n_classes, decay, flatness=n_classes, precision=precision, **known)


def linear_logits(
    train_x: Tensor, test_x: Tensor, target: Tensor, decay: float, precision: float = 1e-3
) -> tuple[Tensor, Tensor]:
    """Return logits [N, C] of training and test features by multinomial logistic regression, fitted on the training
    features with classes `target` from 0 to C - 1: the optimum of scikit-learn's LogisticRegression(C=1 / decay).

    With strong L2, accuracies need no better precision than the default.
    """
    return Regressions(train_x, test_x, target, precision)(decay)


class Regressions:
    """`linear_logits` of the same features with one L2 after another, each fit starting from the one with the nearest
    L2: from strong to weak L2, where a fit from 0 takes hundreds of steps, most take a few."""

    def __init__(self, train_x: Tensor, test_x: Tensor, target: Tensor, precision: float = 1e-3):
        self.train_x, self.test_x = within_span(train_x, test_x)
        self.target = target
        self.precision = precision
        self.gram = self.train_x.T @ self.train_x
        self.solved: dict[float, tuple[Tensor, Tensor]] = {}  # L2 -> weights and bias

    def __call__(self, decay: float) -> tuple[Tensor, Tensor]:
        if int(self.target.max()) == 1:
            decay = 2 * decay  # with two classes, scikit-learn decays half the difference of their weights
        nearest = min(self.solved, key=lambda other: abs(math.log(other / decay)), default=None)
        known = {"gram": self.gram, "start": self.solved.get(nearest)}
        weight, bias = logistic_regression(self.train_x, self.target, decay, self.precision, **known)
        self.solved[decay] = weight, bias
        return self.train_x @ weight + bias, self.test_x @ weight + bias


# ---- support vector machines: one per class against the rest ----
#
# The protocol is that of VOC07 (https://arxiv.org/abs/1905.01235, section 6): features of length 1, squared hinge loss,
# positive examples with weight 2, the cost of each class chosen by 3-fold cross-validation. Labels are classes [N], or
# multi-label [N, K] with 1 for present, -1 for absent and 0 for neither: such an image is left out for that class.


def svm(train_x: Tensor, train_y: Tensor, test_x: Tensor, test_y: Tensor) -> Scores:
    """Fit SVMs on the training features [N, E] and score the test features.

    Returns the accuracy of the highest score ("acc1"), or for multi-label data the mean over classes of the average
    precision ("map"), in percent. Costs are chosen without test labels.
    """
    multi_label = train_y.dim() == 2
    classes = None if multi_label else train_y.unique()
    signs = train_y.float() if multi_label else one_against_rest(train_y, classes)
    train_x = finite(train_x, "training features")
    test_x = finite(test_x, "test features")
    x, test_x = within_span(with_bias(train_x), with_bias(test_x))
    costs = x.new_full((signs.shape[1],), COST_OF_FEW)
    chosen = in_every_fold(signs, multi_label)
    if chosen.any():
        columns = train_y.T[chosen] if multi_label else (train_y - train_y.min() + 1)[None]
        folds = np.stack([folds_of(column.cpu().numpy()) for column in columns], 1)
        costs[chosen] = choose_costs(x, signs[:, chosen], folds, multi_label)
    scores = test_x @ fit(x, signs, costs)
    if multi_label:
        return {"map": 100 * float(average_precision(scores, test_y, interpolated=True).nanmean())}
    return {"acc1": 100 * int((classes[scores.argmax(1)] == test_y).sum()) / len(test_y)}


def with_bias(x: Tensor) -> Tensor:
    """Return features of length 1 and a 1 for the bias, which is decayed like a weight (as in liblinear)."""
    return F.pad(unit(x.float()), (0, 1), value=1.0)


def one_against_rest(y: Tensor, classes: Tensor) -> Tensor:
    return (y[:, None] == classes).float() * 2 - 1


def in_every_fold(signs: Tensor, multi_label: bool) -> Tensor:
    """Return the classes [K] whose cost can be chosen, because they have an image in every fold. With one cost for all
    classes, these are all or none: all if at least half of the images are of such classes."""
    images = (signs > 0).sum(0)
    enough = images >= FOLDS
    if multi_label:
        return enough
    return (2 * images[enough].sum() >= images.sum()).expand(len(images))


def folds_of(labels: np.ndarray) -> np.ndarray:
    """Return the fold [N] in which each image is scored, -1 for images with label 0, which are in none.

    The folds are those of scikit-learn's cross_val_score: stratified, not shuffled.
    """
    rows = np.flatnonzero(labels)
    fold = np.full(len(labels), -1)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The least populated class")  # it is not in every fold
        for i, (_, scored) in enumerate(StratifiedKFold(FOLDS).split(rows, labels[rows])):
            fold[rows[scored]] = i
    return fold


def fit(x: Tensor, signs: Tensor, costs: Tensor) -> Tensor:
    """Return weights [E + 1, K] for signs [N, K] and costs [K]: those of LinearSVC(class_weight={1: 2})."""
    weight = x.new_zeros(x.shape[1], signs.shape[1])
    for cost in costs.unique().tolist():
        weight[:, costs == cost] = fit_at(x, signs[:, costs == cost], cost)
    return weight


def fit_at(x: Tensor, signs: Tensor, cost: float, gram: Tensor | None = None) -> Tensor:
    importance = torch.where(signs > 0, PRESENCE_WEIGHT, 1.0) * (signs != 0)

    def squared_hinge(scores: Tensor) -> tuple[Tensor, Tensor]:
        short = (1 - signs * scores).clamp(min=0)
        weighted = importance * short
        return (weighted * short).sum(), -2 * signs * weighted

    as_liblinear = {"decay": 1 / cost, "bias": False}
    return fit_linear(x, squared_hinge, signs.shape[1], flatness=0.5, precision=3e-4, gram=gram, **as_liblinear)[0]


def choose_costs(x: Tensor, signs: Tensor, folds: np.ndarray, multi_label: bool) -> Tensor:
    """Return the cost [K] of each class with the best mean over folds: of the average precision for multi-label data,
    else of the accuracy, which gives one cost for all classes."""
    fold = torch.from_numpy(folds).to(x.device)
    training = torch.cat([signs * (fold != i) for i in range(FOLDS)], 1)  # the SVMs of all folds, side by side
    costs = sorted(COSTS)
    gram = x.T @ x
    quality: Callable = mean_precisions if multi_label else mean_accuracy
    qualities = [quality((x @ fit_at(x, training, cost, gram)).chunk(FOLDS, 1), signs, fold) for cost in costs]
    return torch.tensor(costs, device=x.device)[torch.stack(qualities).argmax(0)].expand(signs.shape[1])


def mean_accuracy(scores: tuple[Tensor, ...], signs: Tensor, fold: Tensor) -> Tensor:
    target = signs.argmax(1)
    fold = fold[:, 0]
    right = [(score.argmax(1) == target)[fold == i].double().mean() for i, score in enumerate(scores)]
    return torch.stack(right).mean(0, keepdim=True)


def mean_precisions(scores: tuple[Tensor, ...], signs: Tensor, fold: Tensor) -> Tensor:
    return torch.stack([average_precision(score, signs * (fold == i)) for i, score in enumerate(scores)]).mean(0)


def average_precision(scores: Tensor, signs: Tensor, interpolated: bool = False) -> Tensor:
    """Return the average precision [K] of each class for scores [N, K]; images of sign 0 are left out.

    It is scikit-learn's: the mean precision at the positive images, of which those with equal scores share one.
    Interpolated, the precision at a recall is the highest at that or any higher recall, as in the source and in VOC
    since 2010 (not the 11 points of 2007).
    """
    scores, order = scores.masked_fill(signs == 0, -torch.inf).sort(0, descending=True)
    right = signs.gather(0, order) > 0
    ascending = -scores.T.contiguous()
    ends = torch.searchsorted(ascending, ascending, right=True).T  # number of images with at least this score
    precision = right.cumsum(0).gather(0, ends - 1) / ends
    if interpolated:
        precision = precision.flip(0).cummax(0).values.flip(0)
    return (precision * right).sum(0) / right.sum(0)


def few_presences(presences: Tensor, k: int, seed: int) -> Tensor:
    """Return labels [N, K] in which each class keeps k random images with it and (K - 1) k without it, and all other
    entries are 0. Each class is drawn independently (the low-shot samples of the source)."""
    rng = np.random.default_rng(seed)
    left = torch.zeros_like(presences)
    for i, column in enumerate(presences.T.cpu().numpy()):
        for sign, n in ((1, k), (-1, (presences.shape[1] - 1) * k)):
            rows = rng.permutation(np.flatnonzero(column == sign))[:n]
            left[torch.from_numpy(rows), i] = sign
    return left
