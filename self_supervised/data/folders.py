"""Images in a directory: their splits and labels, from lists or from the names of directories.

The first of these layouts that the directory has is used:
1. train.txt, and optionally val.txt and test.txt. Each line is a path below the directory, optionally followed by a
   comma, a tab or a space and the label. If no line has a label, directory names are the labels.
2. Directories train, and optionally val and test, with class folders or images.
3. Class folders, or images.

`write_lists` writes lists of the same form for splits that were drawn.
"""

import json
import math
import os
import posixpath
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from self_supervised.data.class_labels import MOST_NAMED, Label
from self_supervised.data.file_search import PassedOver, files_below, image_suffixes
from self_supervised.data.files import OnDisk
from self_supervised.fields import first_of
from self_supervised.safe_files import atomic_write

# split -> its names, in upper or lower case
SPLITS = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test", "testing")}
# split -> (path below the root, label) of its images; the key "" is for images outside all splits
ImageList = dict[str, list[tuple[str, Label]]]
STRING = r'"(?:[^"]|"")*"'  # of a CSV file
QUOTED = re.compile(rf"({STRING})(?:(?:\s*,|\s)(.*))?")
SEVERAL = re.compile(r"-?\d+((\s*[,;]\s*|\s+)(-?\d+|train|val\w*|test))+")  # a class number, and other columns
SETTINGS = "splits.json"  # the settings with which `write_lists` wrote the lists next to it


class ImageFolder(OnDisk):
    """Image files below a directory.

    Args:
        labels_from: which directory of a path is its class, "first_folder" or "last_folder"; None: no labels.
    """

    def __init__(self, root: Path, labels_from: str | None):
        self.root = root
        self.labels_from = labels_from
        self.passed_over = PassedOver()

    def find(self) -> ImageList:
        """Return all images, by split; all as `train` if the directory has no splits."""
        self.passed_over.clear()
        if listed_in(self.root):
            return labeled_lists(self.root, self)
        images_of: ImageList = {}
        for path in sorted(files_below(self.root, image_suffixes(), self.passed_over)):
            first, _, inner = path.partition("/")
            split = split_named(first) if inner else None
            images_of.setdefault(split or "", []).append((path, self.label_of(inner if split else path)))
        return images_of if images_of.keys() - {""} else {"train": images_of.get("", [])}

    def label_of(self, path: str) -> Label:
        return label_from_path(path, self.labels_from)

    def holds(self, path: str) -> bool:
        file = self.root / path
        return os.path.lexists(file) and not file.is_dir()  # unreadable_images decides about dangling links


def refuse_no_directory(root: Path, data_path: str | None) -> None:
    """Raise ValueError if `root`, which is `data_path` or the default, is not a directory."""
    if root.is_dir():
        return
    more = "" if data_path else ", or set DATA_PATH"
    if data_path and not root.is_absolute():
        more = f" (--data_path). Relative paths, also that of a run, are read from the current directory, {Path.cwd()}"
    raise ValueError(f"data_path={str(root)!r} is not a directory. Pass the directory that holds your images{more}.")


def has_images(folder: Path) -> bool:
    """Return whether a directory holds image files, or a list of them."""
    images = files_below(folder, image_suffixes(), PassedOver())
    return "train" in dict(listed_in(folder)) or next(images, None) is not None


def split_named(name: str) -> str | None:
    return next((split for split, names in SPLITS.items() if name.lower() in names), None)


def label_from_path(path: str, labels_from: str | None) -> str | None:
    """Return the class of a relative path: the name of its first or last directory."""
    folders = path.split("/")[:-1]
    return None if labels_from is None or not folders else folders[0 if labels_from == "first_folder" else -1]


def with_labels(images_of: ImageList, label_of: Callable[[str], Label]) -> ImageList:
    """Return the images with the labels of `label_of`, unless some have labels already.

    The two kinds of labels are not combined, since they could number the same class differently.
    """
    if any(label is not None for images in images_of.values() for _, label in images):
        return images_of
    return {split: [(path, label_of(path)) for path, _ in images] for split, images in images_of.items()}


# ---- lists ----


def labeled_lists(folder: Path, source: Any) -> ImageList:
    """Return the images of `read_lists`, with labels by folder if no list has labels. The directory of a split, with
    which all paths begin, is not a class."""
    images_of = read_lists(folder, source)
    paths = (path for images in images_of.values() for path, _ in images)
    of_splits = isinstance(source, ImageFolder) and all(split_named(path.partition("/")[0]) for path in paths)
    return with_labels(images_of, lambda path: source.label_of(path.partition("/")[2] if of_splits else path))


def listed_in(folder: Path) -> list[tuple[str, Path]]:
    """Return (split, file) of each list in a directory."""
    files = [file for file in sorted(folder.glob("*.[tT][xX][tT]")) if split_named(file.stem)]
    return [(split, file) for split in SPLITS for file in files if split_named(file.stem) == split]


def read_lists(folder: Path, source: Any) -> ImageList:
    """Return the images of `source` that the lists in `folder` name, each once.

    Args:
        source: ImageFolder, TarShards or ArrowImages.

    Raises:
        ValueError: there is no list for training; an image is not in `source`, is in two lists, or has two labels.
    """
    files = listed_in(folder)
    seen = {}
    images_of: ImageList = {split: [] for split, _ in files}
    if "train" not in images_of:
        raise ValueError(f"{files[0][1]}: there is no train.txt next to it. Add one, or remove this list.")
    is_ours = settings_of_lists(folder) is not None
    for split, file in files:
        images = list(entries(list_text(file), source.root, is_ours, file))
        check_that_all_are_there(source, [path for path, _ in images], file)
        for path, label in images:
            before = seen.setdefault(path, (split, label))
            if before != (split, label):
                what = f"is in {before[0]} and in {split}" if before[0] != split else f"has two labels in {file.name}"
                raise ValueError(f"{path} {what}, according to the lists in {folder}. Keep one of its lines.")
    for path, (split, label) in seen.items():
        images_of[split].append((path, label))
    return images_of


def list_text(file: Path) -> str:
    try:
        return file.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not encoded in UTF-8 ({error}). Save it in UTF-8.") from error


def entries(text: str, root: Path, is_ours: bool = False, file: Path | None = None) -> Iterator[tuple[str, Label]]:
    """Yield (path below the root, label or None) of each line of a list. The user's lists may have quotes as in CSV
    files, which `write_lists` does not write."""
    suffixes = "|".join(map(re.escape, image_suffixes()))
    # a path ends with an image's extension (it may contain blanks and commas), else at the last comma or blank
    pattern = re.compile(rf"(.+(?:{suffixes})|.+(?=,)|.+(?=\s)|.+)(?:(?:\s*,|\s)(.*))?", re.IGNORECASE)
    roots = [os.path.join(base, "") for base in (os.path.abspath(root), os.path.realpath(root))]
    for line in filter(None, map(str.strip, text.split("\n"))):  # splitlines() would also split at \x0b, \x85, ...
        path, label = ((None if is_ours else QUOTED.fullmatch(line)) or pattern.fullmatch(line)).groups(default="")
        if not is_ours and SEVERAL.fullmatch(label.strip()):
            raise ValueError(
                f"{file} has more than a path and a label in {line!r}. Leave other columns out, or quote the label."
            )
        path, label = (x.strip() if is_ours else unquoted(x.strip()) for x in (path, label))
        path = posixpath.normpath(path)
        for base in roots:
            path = path.removeprefix(base)
        yield path, as_label(label)


def unquoted(text: str) -> str:
    """Return a text without the quotes that programs put around a comma in CSV files."""
    return text[1:-1].replace('""', '"') if re.fullmatch(STRING, text) else text


def as_label(text: str) -> Label:
    """Return the label that a text means: a class number (pandas writes "3.0"), a class name, or None for "" and
    "-1"."""
    text = re.sub(r"^(-?\d+)\.0+$", r"\1", text.strip())
    label = int(text) if text.removeprefix("-").isdecimal() else text
    return None if label in ("", -1) else label


def whole_number(value: Any) -> Any:
    """Return a whole float as int, and NaN as None: pandas makes the numbers of a column floats if some are missing.
    Any other value is returned as it is."""
    if isinstance(value, float) and (value.is_integer() or math.isnan(value)):
        return None if math.isnan(value) else int(value)
    return value


def check_that_all_are_there(source: Any, paths: list[str], file: Path) -> None:
    """Raise ValueError for paths in the list `file` that `source` does not hold, or that are not below its root."""
    outside = next((path for path in paths if path.startswith(("/", "../"))), None)
    if outside:
        raise ValueError(
            f"{file} lists {outside}, which is not below {source.root}. Set data_path to a directory that holds all "
            "images."
        )
    missing = [path for path in paths if not source.holds(path)]
    if missing:
        redraw = ", or draw new splits with another splits_path" if file.parent != source.root else ""
        way_out = f"Put them there, or remove their lines{redraw}."
        if settings_of_lists(file.parent) is not None:
            way_out = (
                "These lists were drawn from the images of the run. If data_path holds others, pass --splits_path none "
                "(Python: None), or another splits_path. If the images have moved, set data_path to the directory that "
                "holds all of them. If some are gone, remove their lines."
            )
        raise ValueError(
            f"{file} lists images that are not in {source.root}: {first_of(missing, MOST_NAMED)}. {way_out}"
        )


def write_lists(folder: Path, images_of: ImageList, made_by: dict[str, Any]) -> None:
    """Write the list of each split, and the settings `made_by` with which the splits were drawn.

    train.txt is written last: if it exists, all lists are complete.

    Raises:
        ValueError: the path of an image cannot be a line of a text file.
    """
    paths = (path for images in images_of.values() for path, _ in images)
    if odd := sorted(repr(path) for path in paths if re.search(r"[\n\r\ud800-\udfff]", path)):
        raise ValueError(
            f"file names with line breaks, or not in UTF-8, cannot be listed: {first_of(odd, MOST_NAMED)} "
            f"({len(odd):,} in all). Rename them."
        )
    atomic_write(folder / SETTINGS, json.dumps(made_by, indent=2))
    for split in ("val", "test", "train"):
        images = images_of.get(split, [])
        # ./ protects a leading blank, which `entries` would strip
        lines = (f"{'./' if path[0].isspace() else ''}{path},{label}\n" for path, label in images)
        atomic_write(folder / f"{split}.txt", "".join(lines))


def settings_of_lists(folder: Path) -> dict[str, Any] | None:
    """Return the settings with which `write_lists` wrote the lists in `folder`; None if the lists are the user's.

    A file of the user may have the same name.
    """
    file = folder / SETTINGS
    try:
        made_by = json.loads(file.read_text()) if file.is_file() else None
    except ValueError:
        return None
    return made_by if isinstance(made_by, dict) and "val_size" in made_by else None


def check_settings(folder: Path, made_by: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise ValueError if the lists in `folder` were written with settings `made_by` that differ from `now`."""
    now = json.loads(json.dumps(now))
    names = [name for name in now if name in made_by]  # earlier versions stored fewer
    changed = [f"{name}={made_by[name]!r}, not {now[name]!r}" for name in names if made_by[name] != now[name]]
    if changed:
        raise ValueError(
            f"splits_path={str(folder)!r}: its lists were created with {'; '.join(changed)}. Use the settings with "
            "which they were created, or another splits_path, where new lists are written."
        )
