"""Class numbers from labels (names, ids or dates): from 0 without gaps.

The labels of the training set define the numbers for every split, so that a number means the same class in each. At the
end: checks of label arrays.
"""

import difflib
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from model_params import EncoderAndDataParams
from self_supervised.fields import first_of

Label = str | int | None  # name or number of a class; None: no label
UNLABELED = -1  # class number of an image without a label
MOST_NAMED = 5  # labels or paths listed in a message
MOST_LISTED_CLASSES = 10  # listed in the line on labels
NUMBERING = "Number classes from 0 to the number of classes - 1, and write -1 for no label."


def composed(label: Label) -> Label:
    """Return a name in Unicode's composed form (NFC), since file systems differ: macOS decomposes accents."""
    return unicodedata.normalize("NFC", label) if isinstance(label, str) else label


def class_numbers_of(train: Iterable[Label], others: Mapping[str, Iterable[Label]], where: object) -> dict[Label, int]:
    """Return label -> class number: its position among the sorted labels of the training set.

    If the training set has no labels, those of all splits are used.

    Args:
        train: labels of the training set.
        others: split -> its labels.
        where: the directory or list, for the message.

    Raises:
        ValueError: a split has a label that train lacks. The message lists similar labels of train.
    """
    of_split = {split: set(labels) - {None} for split, labels in others.items()}
    known = set(train) - {None} or set().union(*of_split.values())
    for split, labels in of_split.items():
        if unknown := sorted(map(str, labels - known)):
            more = f" and {len(unknown) - MOST_NAMED} more" if len(unknown) > MOST_NAMED else ""
            named = ", ".join(nearest_name(label, map(str, known)) for label in unknown[:MOST_NAMED])
            raise ValueError(
                f"{where}: {split} has classes that train lacks, {len(unknown)} of {len(labels)}: "
                f"{named}{more}. Classes are matched by name: rename them as in train, or move them away. A custom "
                "data set can also be used without labels: labels_from=None."
            )
    return {label: number for number, label in enumerate(sorted(known))}


def nearest_name(label: str, known: Iterable[str]) -> str:
    """Return a label with the most similar known ones, ignoring case: "'Cats' (nearest: 'cats', 'cat')"."""
    folded: dict[str, str] = {}
    for name in sorted(known):
        folded.setdefault(name.casefold(), name)
    near = difflib.get_close_matches(label.casefold(), folded, n=3) or sorted(folded)[:3]
    return f"{label!r} (nearest: {', '.join(repr(folded[name]) for name in near)})"


def labels_text(
    samples_of: Mapping[str, list[tuple[str, int]]],
    names: Mapping[int, str],
    folders: str,
    otherwise: str,
    kind: str = "image",
) -> str:
    """Return the text that says which names became classes, and how many images each has; "none" if none has a label.

    Args:
        samples_of: split -> (path, class number or -1) of its images.
        names: class number -> name.
        folders: the directories of a path that can be its label, for the message: "first folder".
        otherwise: where labels come from that are not names of directories.
        kind: "image" or "video".
    """
    counts = Counter(label for _, label in chain(*samples_of.values()))
    counts.pop(UNLABELED, None)
    if not counts:
        return "none"
    of_class = {label: path for path, label in chain(*samples_of.values())}  # the path of one image each
    by_folder = any(names.get(label) in str(composed(path)).split("/")[:-1] for label, path in of_class.items())
    shown = [
        f"{names.get(label, label)} ({n:,} {kind if n == 1 else f'{kind}s'})" for label, n in sorted(counts.items())
    ]
    classes = "1 class" if len(shown) == 1 else f"{len(shown):,} classes"
    origin = f"the {folders}" if by_folder else otherwise
    return f"{classes} from {origin}: {first_of(shown, MOST_LISTED_CLASSES)}"


# ---- names of classes ----


def numbers_of(class_to_idx: list[str]) -> dict[str, int]:
    """Return name -> number, from entries such as "cat=0"."""
    return {composed(name): int(number) for name, _, number in (entry.rpartition("=") for entry in class_to_idx)}


def first_names(class_to_idx: list[str]) -> dict[int, str]:
    """Return number -> the first name that has it, in the order of the numbers."""
    given = [(number, name) for name, number in numbers_of(class_to_idx).items()]
    return dict(sorted(dict(reversed(given)).items()))


def class_names_of(labels: set[str | int], class_to_idx: list[str] | None) -> dict[Label, Label]:
    """Return label -> name of its class.

    It is the label in Unicode's composed form, or the first name that `class_to_idx` has for the label's number.

    Raises:
        ValueError: class_to_idx lacks a label; without it, labels are both numbers and names; a number is below -1.
    """
    numbers = [label for label in labels if isinstance(label, int)]
    if numbers and min(numbers) < 0:
        raise ValueError(f"label={min(numbers)} is not a class. Number classes from 0, and write -1 for no label.")
    if class_to_idx is None:
        if 0 < len(numbers) < len(labels):
            word = min(label for label in labels if isinstance(label, str))
            raise ValueError(
                f"some labels are numbers, such as {numbers[0]}, and some are names, such as {word}. Use one kind, or "
                "set class_to_idx."
            )
        return {label: composed(label) for label in labels}
    given = numbers_of(class_to_idx)
    given |= without_zeros(given, set(numbers))
    first = first_names(class_to_idx)
    names = {label: first.get(given.get(str(composed(label)), label)) for label in labels}
    if unknown := sorted(str(label) for label, name in names.items() if name is None):
        raise ValueError(
            f"class_to_idx has no number for {', '.join(unknown)}. Add one, or exclude these images with "
            "exclude_patterns."
        )
    return names


def without_zeros(given: dict[str, int], labels: set[int]) -> dict[str, int]:
    """Return "1" -> number of the class "01", and so on, if `labels` are such names: a list's 01 is read as 1.

    Raises:
        ValueError: they may also be class numbers, with another meaning.
    """
    names = [name for name in given if name.isdecimal()]
    named = {int(name): given[name] for name in names}
    if not labels or not labels <= named.keys() or names == list(map(str, named)):
        return {}
    unclear = [label for label in sorted(labels) if named[label] != label]
    if unclear and labels <= set(given.values()):
        raise ValueError(
            f"class_to_idx: label {unclear[0]} is the name of class {named[unclear[0]]} and the number of another. "
            "Rename the classes in class_to_idx and in the lists, such as class_01."
        )
    return {str(label): number for label, number in named.items()}


def class_names(params: EncoderAndDataParams, dataset: Any) -> dict[int, str]:
    """Return class number -> name: from the data set or the settings, or from the files' directories if each class has
    its own."""
    if known := getattr(dataset, "class_names", None):
        return dict(enumerate(known))
    if params.class_to_idx:
        return {number: name for name, number in numbers_of(params.class_to_idx).items()}
    stored = params.dataset.class_names.split() or getattr(getattr(dataset, "source", None), "classes", None)
    if stored:
        return dict(enumerate(stored))
    of_class: dict[int, set[str]] = {}
    for path, label in getattr(dataset, "files", []):
        of_class.setdefault(int(label), set()).add(Path(path).parent.name)
    folders = {label: next(iter(names)) for label, names in of_class.items() if len(names) == 1}
    return folders if len(set(folders.values())) == len(of_class) else {}


# ---- label arrays ----


def in_classes(labels: np.ndarray, what: object) -> np.ndarray:
    """Return labels as class numbers, int64 [N]; -1 is no label.

    Args:
        labels: bools, integers or whole floats, [N] or [N, 1]; or one-hot rows [N, K].
        what: the file or field that holds them, for the message.

    Raises:
        ValueError: the labels are something else, such as text, fractions, NaN or numbers below -1.
    """
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if is_one_hot(labels):
        labels = labels.argmax(1)
    if labels.ndim != 1 or labels.dtype.kind not in "buif":
        raise ValueError(f"{what} holds {labels.dtype} {labels.shape}, not one label per image [N]. {NUMBERING}")
    if labels.dtype.kind == "f" and not np.isfinite(labels).all():
        raise ValueError(f"{what} holds labels that are not finite. {NUMBERING}")
    classes = labels.astype(np.int64)
    wrong = labels[(classes != labels) | (classes < UNLABELED)]
    if len(wrong):
        raise ValueError(f"{what} holds {len(wrong)} labels that are not classes, such as {wrong[0]}. {NUMBERING}")
    return classes


def lacking(of_sets: Iterable[np.ndarray]) -> str:
    """Return what sets of labels lack for a classifier of their labeled images: "no labels" if no image of a set has
    one, "a single class" if all have the same, else ""."""
    classes = [np.unique(labels[labels >= 0]) for labels in of_sets]
    if any(len(of_set) == 0 for of_set in classes):
        return "no labels"
    return "a single class" if any(len(of_set) == 1 for of_set in classes) else ""


def is_one_hot(labels: np.ndarray) -> bool:
    """Return whether labels are [N, K] with a single 1 in each row, and 0 elsewhere."""
    if labels.ndim != 2 or labels.dtype.kind not in "buif":
        return False
    return bool(((labels == 1).sum(1) == 1).all() and ((labels == 0).sum(1) == labels.shape[1] - 1).all())
