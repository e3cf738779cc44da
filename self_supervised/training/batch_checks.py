"""Checks of the labels that a method reads, and of which batches of a user's loader they are made."""

import numpy as np
from torch import Tensor

from self_supervised.data.class_labels import in_classes


def check_labels(
    labels: Tensor | np.ndarray | None, source: str, n_classes: int | None, dataset_name: str, required: bool = True
) -> None:
    """Check that labels are classes, and those of the classifier if there is one.

    Args:
        labels: [N] or [N, 1], multi-hot [N, K], or None.
        source: where they come from, for the message.
        n_classes: classes of the classifier that is trained, or None without one.
        dataset_name: the data set whose classes the classifier has.
        required: False where the classifier can do without labels.

    Raises:
        ValueError: they are not, or labels that are required are missing.
    """
    if labels is None or (labels.ndim == 2 and labels.shape[1] > 1):
        if n_classes is not None and required:
            found = "no labels" if labels is None else f"labels of shape {tuple(labels.shape)}"
            raise ValueError(f"{source} has {found}. A classifier needs labels [N], one class per image")
        return
    if isinstance(labels, Tensor):
        labels = (labels.double() if labels.is_floating_point() else labels).cpu().numpy()
    classes = in_classes(labels, source)
    if n_classes is not None and len(classes) and (highest := classes.max()) >= n_classes:
        raise ValueError(
            f"{source} has the label {highest}, and the classifier has n_classes={n_classes}, those of dataset_name="
            f"{dataset_name!r}. Number the classes from 0, or set dataset_name to the data set of these images"
        )


def may_be_read(labels: Tensor | None, is_first: bool) -> bool:
    """Return whether the labels of a batch are to be checked: reading integers from a GPU makes the host wait, which
    is acceptable only in the first training batch of an epoch. Floats are always checked, because they may be anything.
    """
    return labels is None or labels.device.type == "cpu" or labels.is_floating_point() or is_first
