"""Which images of a labeled set are used: subsets and splits as pure functions of (labels, how many, seed).

Every class is drawn from by itself, so each is there in proportion. Images without a label (below 0) are never drawn.
The same seed makes nested subsets: 1 label a class is among the 5 labels a class, and those among the 10 %.
"""

from collections.abc import Sequence

import numpy as np

Labels = Sequence[int] | np.ndarray


def stratified(
    labels: Labels, *, fraction: float | None = None, per_class: int | None = None, seed: int = 0
) -> np.ndarray:
    """Sorted indices of a random part of the labeled images: a fraction of every class, but at least one image, or
    `per_class` images of every class; without both, all of them.

    With 0.01 and 0.1 of ImageNet: SimCLR's semi-supervised subsets, by another draw (https://arxiv.org/abs/2002.05709,
    section 4.2).

    Raises:
        ValueError: both fraction and per_class; a class with fewer than `per_class` images; no labels at all.
    """
    if fraction is not None and per_class is not None:
        raise ValueError(f"fraction={fraction} and per_class={per_class} are two wishes: choose one of them")
    classes = shuffled_classes(labels, seed)
    fewest = min(map(len, classes))
    if per_class is not None and not 1 <= per_class <= fewest:
        raise ValueError(f"labels_per_class={per_class} must be from 1 to {fewest}, the images of the smallest class")
    counts = [per_class or share(len(order), 1.0 if fraction is None else fraction) for order in classes]
    return np.sort(np.concatenate([order[:count] for order, count in zip(classes, counts, strict=True)]))


def held_out(labels: Labels, fraction: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(to fit on, to score): sorted indices of two parts of the labeled images. The second is a fraction of every
    class: at least one image, but never the last one. It is for choosing settings, which must not see the test set.

    Raises:
        ValueError: no class has two images.
    """
    classes = shuffled_classes(labels, seed)
    cuts = [min(share(len(order), fraction), len(order) - 1) for order in classes]
    score = np.concatenate([order[:cut] for order, cut in zip(classes, cuts, strict=True)])
    if len(score) == 0:
        raise ValueError(f"nothing can be held out of {len(classes)} classes of one image each: use more labels")
    return np.setdiff1d(np.concatenate(classes), score), np.sort(score)


def share(n: int, fraction: float) -> int:
    """A fraction of n images, rounded, but at least one."""
    return max(1, round(fraction * n))


def shuffled_classes(labels: Labels, seed: int) -> list[np.ndarray]:
    """Indices of the images of each class, in random order."""
    labels = np.asarray(labels)
    rng = np.random.default_rng(seed)
    by_class = np.argsort(labels, kind="stable")[np.count_nonzero(labels < 0) :]
    if len(by_class) == 0:
        raise ValueError("no image has a label of 0 or more: there is nothing to draw from")
    _, starts = np.unique(labels[by_class], return_index=True)
    return [rng.permutation(images) for images in np.split(by_class, starts[1:])]
