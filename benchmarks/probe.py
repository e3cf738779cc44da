"""What it costs to score an encoder: linear probe, nearest neighbors and RankMe, beside scikit-learn.

Compared, on the same halves of the same features (made here: ten overlapping classes, few directions that matter, as
encoders give them), each in a process of its own:

- evaluation.linear_probe by scikit-learn's LogisticRegression, as in validation, and by our solver of the same optimum
  (probe_solver="torch"); and OneVsRestClassifier of LogisticRegression(solver="liblinear"), which the field's original
  used, on the features as they are
- evaluation.knn (k = 20 and 200 at once); scikit-learn's KNeighborsClassifier, cosine and brute force, with the same
  weights: fitted once, asked once for each k
- evaluation.rank_me; the singular values by numpy

`%` is the accuracy on the scored half (of kNN with k = 200; for RankMe the effective rank), `peak MB` that of the
whole process, of which the row "features alone" says what the libraries and the features are. Neighbors of the larger
set are looked for only for the first 2,500 images, by all. What takes longer than the limit is stopped: ">" is a lower
bound.

To be reached: linear probe and kNN at least 8 times as fast as liblinear and KNeighborsClassifier. Both are products of
matrices; the one of kNN (images x images x width) is the same for everyone, so that its share bounds what can be won.
"""

import math
import signal
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from itertools import groupby
from typing import Any

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.multiclass import OneVsRestClassifier
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor

from benchmarks.harness import Row, arguments, in_fresh_process, report, seconds
from self_supervised.evaluation import validation

SIZES = [(8_000, 512), (50_000, 2_048)]  # images, width
SCORED_BY_KNN = 2_500  # of the larger set
CLASSES, T, LIMIT = 10, 0.07, 60.0  # seconds
Score = Callable[[Tensor, Tensor, Tensor, Tensor], float]


def features(n: int, width: int) -> tuple[Tensor, Tensor]:
    """Class centers and noise in a few directions, of strength 1 / sqrt(i), mixed and cut off at 0 as by a ReLU."""
    g = torch.Generator().manual_seed(0)
    rank = 2 * round(width**0.5 * 1.4)
    labels = torch.randperm(n, generator=g) % CLASSES
    latent = torch.randn(n, rank, generator=g) + torch.randn(CLASSES, rank, generator=g)[labels] * 2.6 / rank**0.5
    latent /= torch.arange(1, rank + 1).sqrt()
    x = latent @ torch.randn(rank, width, generator=g)
    return x.add_(torch.randn(n, width, generator=g), alpha=0.2).relu_(), labels


# ---- contestants: (train features, labels, test features, labels) -> score ----


def nothing(*_: Tensor) -> float:
    return 0.0


def our_probe(*halves: Tensor, solver: str) -> float:
    return validation.linear_probe(*halves, solver=solver)["valid_class_acc"]


def one_versus_rest(*halves: Tensor) -> float:
    train_x, train_y, test_x, test_y = (part.numpy() for part in halves)
    classifier = OneVsRestClassifier(LogisticRegression(solver="liblinear")).fit(train_x, train_y)
    return 100 * classifier.score(test_x, test_y)


def our_knn(*halves: Tensor) -> float:
    return validation.knn(*halves)["valid_knn200_acc"]


def neighbors_classifier(*halves: Tensor) -> float:
    train_x, train_y, test_x, test_y = (part.numpy() for part in halves)
    options = {"metric": "cosine", "algorithm": "brute", "weights": lambda distance: np.exp((1 - distance) / T)}
    classifier = KNeighborsClassifier(**options).fit(train_x, train_y)
    accuracy = [100 * classifier.set_params(n_neighbors=min(k, len(train_x))).score(test_x, test_y) for k in (20, 200)]
    return accuracy[1]


def our_rank(train_x: Tensor, *_: Tensor) -> float:
    return validation.rank_me(train_x)["valid_rank_me"]


def numpys_rank(train_x: Tensor, *_: Tensor) -> float:
    singular = np.linalg.svd(train_x.numpy(), compute_uv=False)
    p = singular / singular.sum() + 1e-7
    return float(np.exp(-(p * np.log(p)).sum()))


CONTESTANTS: dict[tuple[str, str], Score] = {
    ("-", "features alone"): nothing,
    ("linear probe", "ours, torch"): partial(our_probe, solver="torch"),
    ("linear probe", "ours, sklearn"): partial(our_probe, solver="sklearn"),
    ("linear probe", "sklearn, one vs rest"): one_versus_rest,
    ("kNN", "ours"): our_knn,
    ("kNN", "sklearn"): neighbors_classifier,
    ("RankMe", "ours"): our_rank,
    ("RankMe", "numpy"): numpys_rank,
}


def measured(key: tuple[str, str], n: int, width: int, rounds: int, scored: int) -> tuple[float, float]:
    """(median seconds, score), in a process of its own; it is ended after LIMIT seconds of what is measured."""
    warnings.simplefilter("ignore", ConvergenceWarning)  # of liblinear
    run, halves = CONTESTANTS[key], list(validation.halves(*features(n, width)))
    run(*validation.halves(*features(40, 8)))  # imports, and threads that start
    if key[0] == "kNN":
        halves[2:] = halves[2][:scored], halves[3][:scored]
    scores: list[float] = []
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # C code is stopped too
    signal.alarm(round(LIMIT))
    times, start = [], time.perf_counter()
    while len(times) <= rounds and time.perf_counter() - start < LIMIT / 20:
        times.append(seconds(lambda: scores.append(run(*halves))))
    signal.alarm(0)
    return statistics.median(times[1:] or times), scores[0]  # the first, alone, pays for libraries that start


def here(run: Callable[..., Any], *args: Any) -> tuple[Any, float]:
    """As in_fresh_process, but in this one: starting another takes seconds."""
    return run(*args), math.nan


def row_of(key: tuple[str, str], n: int, width: int, rounds: int, process: Callable) -> Row:
    scored = SCORED_BY_KNN if n > SIZES[0][0] and key[0] == "kNN" else n // 2
    row: Row = {"images": n, "width": width, "what": key[0], "who": key[1], "fitted on": n // 2}
    row["scored"] = 0 if key[0] in ("-", "RankMe") else scored
    try:
        (median, score), megabytes = process(measured, key, n, width, rounds, scored)
    except BrokenProcessPool:  # ended by its alarm
        return {**row, "s": f"> {LIMIT:.0f}", "time / ours": LIMIT, "%": "-", "peak MB": "-"}
    return {**row, "s": median, "time / ours": median, "%": score, "peak MB": megabytes}


def with_ratios(rows: list[Row]) -> list[Row]:
    """`time / ours` from seconds to ratios, within each evaluation of each size. Ours comes first."""
    done: list[Row] = []
    for _, group in groupby(rows, key=lambda row: (row["images"], row["what"])):
        group_rows: list[Any] = list(group)
        ours = group_rows[0]["time / ours"]
        for row in group_rows:
            ratio, stopped = row["time / ours"] / ours, isinstance(row["s"], str)
            done.append({**row, "time / ours": "-" if row["what"] == "-" else f"> {ratio:.3g}" if stopped else ratio})
    return done


def main(argv: list[str] | None = None) -> None:
    options = arguments(__doc__, rounds=3).parse_args(argv)
    sizes, rounds = ([(400, 16)], 1) if options.quick else (SIZES, options.rounds)
    process = here if options.quick else in_fresh_process
    rows = []
    for size in sizes:
        for key in CONTESTANTS:
            rows.append(row_of(key, *size, rounds, process))
            print(*rows[-1].values(), file=sys.stderr, flush=True)  # the whole takes minutes
    report("probe", with_ratios(rows), options.out, "scikit-learn")


if __name__ == "__main__":
    main()
