"""Scores of a validation epoch, by the evaluations of `params.evaluations`: (train features [N, E], labels [N], test
features, labels) -> dict of scalars.

Accuracies are in percent. Everything is seeded or deterministic, and is computed on the device of the features, except
scikit-learn's probe. Features may have any scale. Features that are not finite raise a ValueError.
"""

import math
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial

import torch
from pytorch_lightning.utilities import rank_zero_info
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from threadpoolctl import threadpool_limits
from torch import Tensor

from self_supervised.catalogue import LABEL_FREE
from self_supervised.data.class_labels import is_one_hot
from self_supervised.evaluation.linear_models import accuracy, linear_logits, percentage, standardized, within_span
from self_supervised.numerics import NotFinite, Scores, finite, on_scoring_device, rescaled, unit

PROBE_DECAY = 100.0  # L2 of the linear probe, scikit-learn's 1 / C
SLOW_PROBE = 20  # seconds of a fit from which a GPU should do it
KNN_T = 0.07  # temperature of the votes of neighbors


def halves(features: Tensor, labels: Tensor, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return two random halves, stratified by class if possible: (x, y) to fit on and (x, y) to score."""
    _, counts = labels.unique(return_counts=True)
    can_stratify = counts.min() > 1 and len(labels) // 2 >= len(counts)
    stratify = labels.cpu() if can_stratify else None
    parts = train_test_split(torch.arange(len(labels)), test_size=0.5, stratify=stratify, random_state=seed)
    fit, score = (part.to(labels.device) for part in parts)
    return features[fit], labels[fit], features[score], labels[score]


def linear_probe(train_x: Tensor, train_y: Tensor, test_x: Tensor, test_y: Tensor, solver: str = "sklearn") -> Scores:
    """Score multinomial logistic regression on standardized features, with L2 (C = 0.01), by one of SOLVERS."""
    train_x, test_x = standardized(train_x, test_x)
    classes, target = train_y.unique(return_inverse=True)
    logits = SOLVERS[solver](train_x, test_x, target, PROBE_DECAY)
    names = ("train_class_acc", "valid_class_acc")
    return {name: accuracy(part, classes, y, 1) for name, part, y in zip(names, logits, (train_y, test_y), strict=True)}


def sklearn_logits(train_x: Tensor, test_x: Tensor, target: Tensor, decay: float) -> tuple[Tensor, Tensor]:
    """Return the same as `linear_logits`, by scikit-learn on one CPU core: on multiple cores that are busy, its
    many small steps take much longer."""
    x, test_x = (part.cpu().numpy() for part in within_span(train_x, test_x))
    classifier = LogisticRegression(C=1 / decay, max_iter=1000)
    start = time.perf_counter()
    with warnings.catch_warnings(), threadpool_limits(1, "blas"):
        warnings.simplefilter("ignore", ConvergenceWarning)  # float32 rounding may stop the last line search
        classifier.fit(x, target.cpu().numpy())
    report_slow_probe(time.perf_counter() - start, train_x.device)
    logits = (torch.from_numpy(classifier.decision_function(part)).to(train_x.device) for part in (x, test_x))
    return tuple(torch.stack([-s, s], 1) if s.dim() == 1 else s for s in logits)  # [N]: the second of two classes


def report_slow_probe(seconds: float, device: torch.device) -> None:
    """Log a line if the GPU with the features waited long for scikit-learn."""
    if seconds > SLOW_PROBE and device.type == "cuda":
        rank_zero_info(
            f"warning: probe_solver='sklearn': linear_probe took {seconds:.0f} s on one CPU core. Set "
            f"probe_solver='torch', which finds the same optimum on {device}"
        )


def knn(
    train_x: Tensor, train_y: Tensor, test_x: Tensor, test_y: Tensor, ks: tuple[int, ...] = (20, 200), T: float = KNN_T
) -> Scores:
    """Return the accuracies of `knn_hits`."""
    hits_of = knn_hits(train_x, train_y, test_x, test_y, ks, T)
    return {f"valid_knn{k}_acc": percentage(hits) for k, hits in hits_of.items()}


def knn_hits(
    train_x: Tensor, train_y: Tensor, test_x: Tensor, test_y: Tensor, ks: tuple[int, ...], T: float = KNN_T
) -> dict[int, Tensor]:
    """Return whether k nearest neighbors by cosine find the class of each test image [N]. Each votes with weight
    exp(cosine / T) (InstDisc, https://arxiv.org/abs/1805.01978, section 3.4). With fewer than k training images, all of
    them vote."""
    classes, target = train_y.unique(return_inverse=True)
    hits: dict[int, list[Tensor]] = {k: [] for k in ks}
    for cosine, neighbor, y in nearest_by_cosine(train_x, test_x, test_y, max(ks)):
        votes = (cosine / T).exp()
        label = target[neighbor]
        for k in ks:
            scores = votes.new_zeros(len(y), len(classes)).scatter_add_(1, label[:, :k], votes[:, :k])
            hits[k].append(classes[scores.argmax(1)] == y)
    return {k: torch.cat(parts) for k, parts in hits.items()}


def nearest_by_cosine(
    train_x: Tensor, test_x: Tensor, test_y: Tensor, k: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield (cosines [n, k], their rows in `train_x` [n, k], labels [n]) of 1,000 test features at a time, the nearest
    first; all training features if there are fewer than k."""
    train_x = unit(finite(train_x, "training features"))
    test_x = unit(finite(test_x, "test features"))
    for x, y in zip(test_x.split(1000), test_y.split(1000), strict=True):  # 1000 x N cosines fit into memory
        yield *(x @ train_x.T).topk(min(k, len(train_x)), dim=1), y


def rank_me(train_x: Tensor, *_: Tensor) -> Scores:
    """Return the effective rank of the features (RankMe). Needs no labels."""
    return {"valid_rank_me": effective_rank(train_x)}


def effective_rank(x: Tensor) -> float:
    """Return exp of the entropy of the normalized singular values (RankMe, https://arxiv.org/abs/2210.02885, equation
    1)."""
    singular = torch.linalg.svdvals(rescaled(finite(x)))
    p = singular / singular.sum().clamp(min=1e-12) + 1e-7
    return float((-(p * p.log()).sum()).exp())


def embedding_std(train_x: Tensor, *_: Tensor) -> Scores:
    """Return the root mean square deviation of the normalized features times sqrt(E): 1 if they are spread evenly over
    the sphere, 0 if they are a single point (after SimSiam, https://arxiv.org/abs/2011.10566, section 4.1). Needs no
    labels."""
    return {"valid_embedding_std": float(unit(finite(train_x)).var(0, correction=0).sum().sqrt())}


FUNCTIONS = {"linear_probe": linear_probe, "knn": knn, "rank_me": rank_me, "embedding_std": embedding_std}
SOLVERS: dict[str, Callable] = {"sklearn": sklearn_logits, "torch": linear_logits}


def epoch_scores(
    names: list[str],
    x: Tensor,
    y: Tensor | None,
    train: tuple[Tensor, Tensor] | None = None,
    probe_solver: str = "sklearn",
) -> Scores:
    """Return the scores of all named evaluations on features x [N, E] with labels y [N].

    Probes are fitted on a random half of x and scored on the other half. If `train` (features and labels of the
    training set) is passed, they are fitted on it and scored on all of x, and the names of their scores end in
    "_trainset". Probes leave out images without a label (-1). Without at least two labeled classes, only evaluations
    that need no labels run.
    """
    x = finite(on_scoring_device(x), "embeddings")
    y = one_label_each(on_scoring_device(y))
    if train is not None:
        train = (on_scoring_device(train[0]), one_label_each(on_scoring_device(train[1])))
    table = FUNCTIONS | {"linear_probe": partial(linear_probe, solver=probe_solver)}
    scores = {}
    split = None
    if y is not None and (train is None or train[1] is not None) and (y >= 0).sum() > 1:
        scored = labeled(x, y)
        split = halves(*scored) if train is None else (*labeled(*train), *scored)
    for name in names:
        if name in LABEL_FREE:
            scores |= table[name](x)
        elif split is not None and len(split[1].unique()) > 1:
            new_scores = table[name](*split)
            scores |= new_scores if train is None else {f"{key}_trainset": value for key, value in new_scores.items()}
    return scores


def need_labels(names: list[str]) -> bool:
    """Return whether one of these evaluations needs labels."""
    return not set(LABEL_FREE).issuperset(names)


def labeled(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return features and labels of the images that have a label."""
    has_label = y >= 0
    return (x, y) if has_label.all() else (x[has_label], y[has_label])


def scores_or_nan(names: list[str], x: Tensor, y: Tensor | None, train: tuple | None, probe_solver: str) -> Scores:
    """Return the scores of `epoch_scores`, or NaN for all of them if embeddings are not finite.

    The training then continues, because running statistics of batch norm may be far off early on, and recover.
    """
    try:
        return epoch_scores(names, x, y, train, probe_solver)
    except NotFinite as error:
        rank_zero_info(f"not evaluated: {error}")
    blank = x.new_zeros(len(x), 1)  # to get the names of the scores
    train = None if train is None else (train[0].new_zeros(len(train[0]), 1), train[1])
    return dict.fromkeys(epoch_scores(names, blank, y, train, probe_solver), math.nan)


def one_label_each(y: Tensor | None) -> Tensor | None:
    """Return the classes [N] of one-hot labels [N, K]; None for other multi-hot labels, where an image may have
    multiple classes."""
    if y is None or y.dim() == 1:
        return y
    return y.argmax(1) if is_one_hot(y.cpu().numpy()) else None


def test_name(name: str) -> str:
    """Return a score's name for the test set: valid_knn20_acc_trainset -> test_knn20_acc."""
    return name.removesuffix("_trainset").replace("valid_", "test_")
