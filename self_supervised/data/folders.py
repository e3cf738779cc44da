"""Images in a folder: which there are, by layout, and the labels that lists or folders say.

The first of these that the folder holds:
1. train.txt, and val.txt, test.txt if there are: a path in each line, below the folder, and behind a comma, a tab or a
   space the label, if wanted; where no line has one, the folders say it.
2. folders train, and val, test if there are, with class folders or images in them.
3. class folders, or images, directly.
"""

import json
import os
import posixpath
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from self_supervised.data.class_labels import Label
from self_supervised.data.file_search import PassedOver, files_below, image_suffixes
from self_supervised.data.files import OnDisk
from self_supervised.safe_files import atomic_write

# split -> its names, in upper or lower case
SPLITS = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test", "testing")}
# split, or "" of images that lie beside all splits -> (path below the root, label)
ImageList = dict[str, list[tuple[str, Label]]]
SETTINGS = "splits.json"  # beside lists that were written here


class ImageFolder(OnDisk):
    """Image files below a folder.

    Args:
        labels_from: "first_folder" or "last_folder" of a path; None: no labels.
    """

    def __init__(self, root: Path, labels_from: str | None):
        if not root.is_dir():
            raise ValueError(f"data_path={str(root)!r} is no folder: give that of your images, or set DATA_PATH")
        self.root = root
        self.labels_from = labels_from
        self.passed_over = PassedOver()

    def find(self) -> ImageList:
        """All images, by split; `train` alone where the folder knows no splits."""
        self.passed_over.clear()
        if listed_in(self.root):
            return with_labels(read_lists(self.root, self), self.label_of)
        found: ImageList = {}
        for path in sorted(files_below(self.root, image_suffixes(), self.passed_over)):
            first, _, inner = path.partition("/")
            split = split_named(first) if inner else None
            found.setdefault(split or "", []).append((path, self.label_of(inner if split else path)))
        return found if found.keys() - {""} else {"train": found.get("", [])}

    def label_of(self, path: str) -> Label:
        return of_folder(path, self.labels_from)

    def holds(self, path: str) -> bool:
        return (self.root / path).is_file()


def has_images(folder: Path) -> bool:
    images = files_below(folder, image_suffixes(), PassedOver())
    return "train" in dict(listed_in(folder)) or next(images, None) is not None


def split_named(name: str) -> str | None:
    return next((split for split, names in SPLITS.items() if name.lower() in names), None)


def of_folder(path: str, labels_from: str | None) -> str | None:
    """The class that a relative path says."""
    folders = path.split("/")[:-1]
    return None if labels_from is None or not folders else folders[0 if labels_from == "first_folder" else -1]


def with_labels(found: ImageList, label_of: Callable[[str], Label]) -> ImageList:
    """With labels by path where there are none at all: two sources of labels would number classes twice."""
    if any(label is not None for images in found.values() for _, label in images):
        return found
    return {split: [(path, label_of(path)) for path, _ in images] for split, images in found.items()}


# ---- lists ----


def listed_in(folder: Path) -> list[tuple[str, Path]]:
    """(split, list) of each list."""
    files = [file for file in sorted(folder.glob("*.txt")) if split_named(file.stem)]
    return [(split, file) for split in SPLITS for file in files if split_named(file.stem) == split]


def read_lists(folder: Path, source) -> ImageList:
    """What the lists in `folder` name of `source`, each image once.

    Raises:
        ValueError: there is none for training; an image is not in `source`, in two lists, or has two labels.
    """
    files = listed_in(folder)
    seen = {}
    found: ImageList = {split: [] for split, _ in files}
    if "train" not in found:
        raise ValueError(f"{files[0][1]} needs a train.txt beside it: add one, or take the list away")
    for split, file in files:
        images = list(entries(list_text(file), source.root))
        check_that_all_are_there(source, [path for path, _ in images], file)
        for path, label in images:
            before = seen.setdefault(path, (split, label))
            if before != (split, label):
                what = f"is for {before[0]} and for {split}" if before[0] != split else f"has two labels in {file.name}"
                raise ValueError(f"{path} {what}, say the lists in {folder}: leave one of the lines")
    for path, (split, label) in seen.items():
        found[split].append((path, label))
    return found


def list_text(file: Path) -> str:
    try:
        return file.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not in UTF-8 ({error}): save it in UTF-8") from error


def entries(text: str, root: Path) -> Iterator[tuple[str, Label]]:
    """(path below the root, label or None) of each line."""
    suffixes = "|".join(map(re.escape, image_suffixes()))
    # a path ends like an image's name, blanks, commas and all, or else at the last comma, or at the last blank
    pattern = re.compile(rf"(.+(?:{suffixes})|.+(?=,)|.+(?=\s)|.+)(?:(?:\s*,|\s)(.*))?", re.IGNORECASE)
    roots = [os.path.join(base, "") for base in (os.path.abspath(root), os.path.realpath(root))]
    for line in filter(None, map(str.strip, text.split("\n"))):  # splitlines() would also split names
        path, label = pattern.fullmatch(line).groups()
        path = posixpath.normpath(path.rstrip())
        for base in roots:
            path = path.removeprefix(base)
        yield path, as_label(label or "")


def as_label(text: str) -> Label:
    """A whole number is the number of a class, other text its name, and nothing or -1 is no label."""
    text = text.strip()
    label = int(text) if text.removeprefix("-").isdecimal() else text
    return None if label in ("", -1) else label


def check_that_all_are_there(source, paths: list[str], file: Path) -> None:
    """Raises ValueError for paths in the list `file` that `source` does not hold, or that are not below its root."""
    outside = next((path for path in paths if path.startswith(("/", "../"))), None)
    if outside:
        raise ValueError(
            f"{file} names {outside}, which is not below {source.root}: give data_path a folder of all images"
        )
    missing = [path for path in paths if not source.holds(path)]
    if missing:
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        drawn = ", or draw anew with another splits_path" if file.parent != source.root else ""
        raise ValueError(
            f"{file} names images that are not in {source.root}: {', '.join(missing[:5])}{more}. Put them there, or "
            f"take their lines away{drawn}"
        )


def write_lists(folder: Path, found: ImageList, made_by: dict[str, Any]) -> None:
    """Lists, and the settings that they were made by. train.txt comes last: who sees it finds them all.

    Raises:
        ValueError: a name that no line of a list can hold.
    """
    atomic_write(folder / SETTINGS, json.dumps(made_by, indent=2))
    for split in ("val", "test", "train"):
        images = found.get(split, [])
        odd = next((path for path, _ in images if re.search(r"[\n\r\ud800-\udfff]", path)), None)
        if odd is not None:
            raise ValueError(f"{odd!r} cannot be listed in {folder / split}.txt: rename it, in UTF-8 and in one line")
        # a blank in front belongs to the name if there is ./ before it
        lines = (f"{'./' if path[0].isspace() else ''}{path},{label}\n" for path, label in images)
        atomic_write(folder / f"{split}.txt", "".join(lines))


def settings_of_lists(folder: Path) -> dict[str, Any] | None:
    """By which `write_lists` made the lists; None where it did not. A user's own file may have this name."""
    file = folder / SETTINGS
    try:
        made_by = json.loads(file.read_text()) if file.is_file() else None
    except ValueError:
        return None
    return made_by if isinstance(made_by, dict) and "val_size" in made_by else None


def check_settings(folder: Path, made_by: dict[str, Any], now: dict[str, Any]) -> None:
    now = json.loads(json.dumps(now))
    names = [name for name in now if name in made_by]  # earlier versions noted fewer
    changed = [f"{name}={made_by[name]!r}, not {now[name]!r}" for name in names if made_by[name] != now[name]]
    if changed:
        raise ValueError(
            f"the lists in splits_path={str(folder)!r} were made by {'; '.join(changed)}: set what they were made by, "
            "or another splits_path, where they are made anew"
        )
