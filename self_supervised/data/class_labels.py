"""Labels -> classes, numbered from 0 without gaps: a label may be a name, an id or a date. Every split is numbered by
the labels of the training set, since the same number must mean the same class in all of them."""

import difflib
import unicodedata
from collections.abc import Iterable, Mapping

import numpy as np

Label = str | int | None  # name or number of a class; None: no label
UNLABELED = -1
MOST_NAMED = 5  # in a message
KIND = "number classes from 0 to the number of classes - 1, and write -1 for no label"


def composed(label: Label) -> Label:
    """The name in Unicode's composed form (NFC), whichever form the file system keeps: macOS decomposes accents."""
    return unicodedata.normalize("NFC", label) if isinstance(label, str) else label


def class_numbers_of(train: Iterable[Label], others: Mapping[str, Iterable[Label]], where: object) -> dict[Label, int]:
    """Label -> number of its class: its place among the sorted labels of the training set (of all, if train has none).

    Args:
        train: labels of the training set.
        others: split -> its labels.
        where: the folder or list, for the message.

    Raises:
        ValueError: a split has a label that train lacks. Names it, and the nearest ones of train.
    """
    of_split = {split: set(labels) - {None} for split, labels in others.items()}
    known = set(train) - {None} or set().union(*of_split.values())
    for split, labels in of_split.items():
        if unknown := sorted(map(str, labels - known)):
            more = f" and {len(unknown) - MOST_NAMED} more" if len(unknown) > MOST_NAMED else ""
            named = ", ".join(nearest_name(label, map(str, known)) for label in unknown[:MOST_NAMED])
            raise ValueError(
                f"{where}: {split} has classes that train lacks, {len(unknown)} of {len(labels)}: "
                f"{named}{more}. Classes are matched by name: rename them as in train, or move them away. Images "
                "of your own can also do without labels: labels_from=None"
            )
    return {label: number for number, label in enumerate(sorted(known))}


def nearest_name(label: str, known: Iterable[str]) -> str:
    """The label, and the nearest known ones, whatever their case: "Cats (nearest: cats, cat)"."""
    folded: dict[str, str] = {}
    for name in sorted(known):
        folded.setdefault(name.casefold(), name)
    near = difflib.get_close_matches(label.casefold(), folded, n=3) or sorted(folded)[:3]
    return f"{label!r} (nearest: {', '.join(repr(folded[name]) for name in near)})"


# ---- arrays of labels ----


def in_classes(labels: np.ndarray, what: object) -> np.ndarray:
    """Labels as the numbers of classes, int64 [N], -1 for none: of bool, any integers, whole floats, [N, 1], one-hot.

    Args:
        labels: of any shape and type.
        what: the file or field that they come from, for the message.

    Raises:
        ValueError: they are something else, such as text, fractions, NaN or numbers below -1.
    """
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if is_one_hot(labels):
        labels = labels.argmax(1)
    if labels.ndim != 1 or labels.dtype.kind not in "buif":
        raise ValueError(f"{what} holds {labels.dtype} {labels.shape}, not one label an image [N]: {KIND}")
    if labels.dtype.kind == "f" and not np.isfinite(labels).all():
        raise ValueError(f"{what} holds labels that are not finite: {KIND}")
    classes = labels.astype(np.int64)
    wrong = labels[(classes != labels) | (classes < UNLABELED)]
    if len(wrong):
        raise ValueError(f"{what} holds {len(wrong)} labels that are not classes, such as {wrong[0]}: {KIND}")
    return classes


def is_one_hot(labels: np.ndarray) -> bool:
    """Whether each row of [N, K] has a single 1, and 0 elsewhere."""
    if labels.ndim != 2 or labels.dtype.kind not in "buif":
        return False
    return bool(((labels == 1).sum(1) == 1).all() and ((labels == 0).sum(1) == labels.shape[1] - 1).all())
