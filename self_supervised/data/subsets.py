"""Random subsets and splits of labeled images, as pure functions of labels, size and seed.

They are stratified: images are drawn from every class separately. Images without a label (below 0) are never drawn.
Subsets of one seed are nested: the image of 1 label per class is among those of 5 labels per class, and of 10 %.
"""

from collections.abc import Sequence

import numpy as np

Labels = Sequence[int] | np.ndarray


class EmptySplit(ValueError):
    """Error: a data set has no images for a split."""


def stratified(
    labels: Labels, *, fraction: float | None = None, per_class: int | None = None, seed: int = 0
) -> np.ndarray:
    """Return the sorted indices of a random subset of the labeled images; without any size, of all of them.

    The fractions 0.01 and 0.1 of ImageNet give subsets like SimCLR's semi-supervised ones
    (https://arxiv.org/abs/2002.05709, section 4.2), drawn with another seed.

    Args:
        fraction: fraction of every class, at least one image.
        per_class: number of images of every class.

    Raises:
        ValueError: both sizes are given, a class has fewer than `per_class` images, or no image has a label.
    """
    if fraction is not None and per_class is not None:
        raise ValueError(f"fraction={fraction} and per_class={per_class} are mutually exclusive. Pass one of them.")
    classes = shuffled_classes(labels, seed)
    fewest = min(map(len, classes))
    if per_class is not None and not 1 <= per_class <= fewest:
        raise ValueError(
            f"labels_per_class={per_class} must be from 1 to {fewest}, the number of images of the smallest class"
        )
    counts = [per_class or count_of(len(order), 1.0 if fraction is None else fraction) for order in classes]
    return np.sort(np.concatenate([order[:count] for order, count in zip(classes, counts, strict=True)]))


def held_out(labels: Labels, fraction: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return sorted indices of two parts of the labeled images, (to fit on, to score).

    The second part is a fraction of every class: at least one image, but never the last one. Use it to choose settings,
    which must not see the test set.

    Raises:
        ValueError: no class has two images.
    """
    classes = shuffled_classes(labels, seed)
    cuts = [min(count_of(len(order), fraction), len(order) - 1) for order in classes]
    score = np.concatenate([order[:cut] for order, cut in zip(classes, cuts, strict=True)])
    if len(score) == 0:
        raise ValueError(
            f"nothing can be held out from {len(classes)} classes with one image each. Label more images, or set "
            "validate_on='test'."
        )
    return np.setdiff1d(np.concatenate(classes), score), np.sort(score)


def count_of(n: int, fraction: float) -> int:
    """Return the number of images in a fraction of n images: rounded, but at least 1."""
    return max(1, round(fraction * n))


def shuffled_classes(labels: Labels, seed: int) -> list[np.ndarray]:
    """Return the indices of the images of each class, in random order."""
    labels = np.asarray(labels)
    rng = np.random.default_rng(seed)
    by_class = np.argsort(labels, kind="stable")[np.count_nonzero(labels < 0) :]
    if len(by_class) == 0:
        raise ValueError("no image has a label of 0 or more, so none can be drawn. Use labeled images.")
    _, starts = np.unique(labels[by_class], return_index=True)
    return [rng.permutation(images) for images in np.split(by_class, starts[1:])]
