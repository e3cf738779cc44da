"""Checks of labels: that they are the classes of the classifier, and in which batches of a user's loader."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset, Subset

from self_supervised.data.class_labels import class_names, in_classes
from self_supervised.data.files import LabeledFiles
from self_supervised.data.packed import PackedImages


def refuse_wrong_labels(
    labels: Tensor | np.ndarray | None,
    source: str,
    n_classes: int | None,
    dataset_name: str,
    required: bool,
    each: bool,
) -> None:
    """Raise ValueError unless labels are classes, and those of the classifier if there is one.

    Args:
        labels: [N] or [N, 1], multi-hot [N, K], or None.
        source: where they come from, for the message.
        n_classes: classes of the classifier that is trained, or None without one.
        dataset_name: the data set whose classes the classifier has.
        required: whether a classifier needs these labels: not in a validation that can do without them.
        each: whether the classifier needs a label for each image, so that -1 is refused.
    """
    if labels is None or (labels.ndim == 2 and labels.shape[1] > 1):
        if n_classes is not None and required:
            given = "no labels" if labels is None else f"labels of shape {tuple(labels.shape)}"
            raise ValueError(f"{source} has {given}. A classifier needs labels [N], a class number per image.")
        return
    if isinstance(labels, Tensor):
        labels = (labels.double() if labels.is_floating_point() else labels).cpu().numpy()
    classes = in_classes(labels, source)
    if each and len(classes) and classes.min() < 0:
        raise ValueError(
            f"{source} has images without a label ({classes.min()}). A classifier needs a label for each image: leave "
            "the others out."
        )
    if n_classes is not None and len(classes) and (highest := classes.max()) >= n_classes:
        raise ValueError(
            f"{source} has the label {highest}, and the classifier has n_classes={n_classes} (dataset_name="
            f"{dataset_name!r}). Number the classes from 0, or set n_classes or dataset_name to those of these images."
        )


def names_in(dataset: Dataset | None, params: Any) -> dict[int, str]:
    """Return class number -> name of a loader's data set: of ours, or `classes` as torchvision's have them; {} if they
    are not known, or if the labels are changed afterwards."""
    while isinstance(dataset, Subset):
        dataset = dataset.dataset
    if isinstance(dataset, LabeledFiles | PackedImages):
        return class_names(params, dataset)
    if any(getattr(one, "target_transform", None) for one in (dataset, getattr(dataset, "transforms", None))):
        return {}
    names = getattr(dataset, "classes", None)
    is_known = isinstance(names, list | tuple) and all(isinstance(name, str) for name in names)
    return dict(enumerate(names)) if is_known else {}


def refuse_other_numbers(known: Sequence[str] | None, names: Mapping[int, str], source: str) -> None:
    """Raise ValueError if classes are not numbered as in the classifier, whose scores would be wrong in silence.

    Args:
        known: names of the classifier's classes, in the order of their numbers. The data set may have other words for
            them, so names that are not among them are ignored, and so are those of two classes.
        names: class number -> name.
        source: what numbers them so, for the message.
    """
    times = Counter(known or ())
    numbers = {name: number for number, name in enumerate(known or ()) if times[name] == 1}
    for number, name in names.items():
        if (expected := numbers.get(name, number)) != number:
            raise ValueError(
                f"{source}: {name!r} is class {number}, and class {expected} of the classifier. Give each class the "
                "number that it had in training (of a custom data set: class_to_idx). To train with other classes, set "
                "class_names=None."
            )


def is_checked(labels: Tensor | None, is_first: bool) -> bool:
    """Return whether the labels of a batch of the user's loader are checked.

    To read integers from a GPU makes the host wait, so those are only checked in the first training batch of an epoch
    (`is_first`). Labels on the CPU, and floats, which may be anything, are always checked.
    """
    return labels is None or labels.device.type == "cpu" or labels.is_floating_point() or is_first
