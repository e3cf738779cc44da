"""Data sets that Hugging Face's `datasets` saved to disk: Arrow files, memory-mapped; rows are read when asked for.

pyarrow reads them as well as `datasets` does, starts faster and is all that is needed. The format is that of
`save_to_disk`: https://huggingface.co/docs/datasets/process#save.
"""

import hashlib
import io
import json
import os
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from file_search import PassedOver
from files import File, OnDisk
from image_folders import SPLITS, Found, Label, as_label

if TYPE_CHECKING:
    import pyarrow

STATE, INFO, SPLIT_LIST = "state.json", "dataset_info.json", "dataset_dict.json"
LABEL_KEYS = ("label", "labels")  # where no other is wanted; else the only column of classes
Stamp = tuple[tuple[str, int, int], ...]  # of each file: path, size, time


def is_there(folder: Path) -> bool:
    return (folder / SPLIT_LIST).is_file() or ((folder / STATE).is_file() and (folder / INFO).is_file())


class ArrowImages(OnDisk):
    """The images of a Dataset or DatasetDict; a path is the number of a row, below its split.

    Args:
        image_key: column of the images; None: the only one of that type.
        label_key: column of the labels; None: `label`, or the only one of type ClassLabel.
        names: labels are the names of classes, where they have some, and not their numbers.

    Raises:
        ValueError: there are no or several such columns; pyarrow is not installed.
    """

    def __init__(self, root: Path, image_key: str | None, label_key: str | None, labelled: bool, names: bool):
        self.root, self.names = root, names
        self.splits, self.passed_over = splits_of(root), PassedOver()
        folder = next(iter(self.splits.values()))
        features = json.loads((folder / INFO).read_text())["features"] or {}
        self.image_key = image_key or only(features, "Image", ("image", "img"), "image_key", root)
        self.label_key = None
        if labelled:
            self.label_key = label_key or only(features, "ClassLabel", LABEL_KEYS, "label_key", root)
        for field, key in (("image_key", self.image_key), ("label_key", self.label_key)):
            if key is not None and key not in features:
                raise ValueError(f"{field}={key!r} is no column of {folder}: choose one of {', '.join(features)}")
        self.classes_of = {str(folder): classes_in(folder, self.label_key) for folder in self.splits.values()}
        self.classes = self.classes_of[str(folder)]
        if any(classes != self.classes for classes in self.classes_of.values()):  # their numbers mean other classes
            self.names = True
        self.files = {str(folder): stamp(folder) for folder in self.splits.values()}

    def find(self) -> Found:
        found: Found = {"train": []}
        for split, folder in self.splits.items():
            table = self.table(str(folder))
            labels: list[Label] = [None] * len(table)
            if self.label_key is not None:
                labels = [
                    self.label(value, self.classes_of[str(folder)]) for value in table[self.label_key].to_pylist()
                ]
            prefix = "" if folder == self.root else f"{folder.name}/"
            found[split] = [(f"{prefix}{row}", label) for row, label in enumerate(labels)]
        self.passed_over.clear()
        for folder in unused_splits(self.root, self.splits):
            self.passed_over.add("in splits that are not used", folder, len(mapped(stamp(folder))))
        return found

    def label_of(self, path: str) -> Label:
        folder, _, row = str(self.root / path).rpartition("/")
        if self.label_key is None:
            return None
        return self.label(self.table(folder)[self.label_key][int(row)].as_py(), self.classes_of[folder])

    def label(self, value: Any, classes: list[str] | None) -> Label:
        """Classes are numbers, or their names; -1 is none."""
        if value is None or value == -1:
            return None
        if not isinstance(value, int | str) or isinstance(value, bool):
            raise ValueError(f"label_key={self.label_key!r} has {value!r}, which is no class: choose another column")
        return classes[value] if self.names and classes else as_label(str(value))

    def table(self, folder: str) -> "pyarrow.Table":
        return mapped(self.files[folder])

    def holds(self, path: str) -> bool:
        folder, _, row = str(self.root / path).rpartition("/")
        return folder in self.files and row.isdecimal() and int(row) < len(self.table(folder))

    def open(self, path: str) -> File:
        folder, _, row = path.rpartition("/")
        value = self.table(folder)[self.image_key][int(row)].as_py()
        content = value["bytes"] if isinstance(value, dict) else value
        if content is not None:
            return io.BytesIO(content)
        if isinstance(value, dict) and value["path"]:
            return value["path"]
        raise ValueError(f"its column {self.image_key!r} is empty")

    def stamp(self, path: str) -> tuple:
        return (hash_of(self.files[path.rpartition("/")[0]]),)


def splits_of(root: Path) -> dict[str, Path]:
    """split -> the folder of its data set. Splits of other names are not used."""
    if not (root / SPLIT_LIST).is_file():
        return {"train": root}
    names = json.loads((root / SPLIT_LIST).read_text())["splits"]
    found = {s: root / name for s, wanted in SPLITS.items() for name in wanted[::-1] if name in names}
    if "train" not in found:
        raise ValueError(f"{root} has the splits {', '.join(names)} and no train: give data_path={str(root)}/SPLIT")
    return found


def unused_splits(root: Path, used: dict[str, Path]) -> list[Path]:
    names = json.loads((root / SPLIT_LIST).read_text())["splits"] if (root / SPLIT_LIST).is_file() else []
    return [root / name for name in names if root / name not in used.values() and (root / name / STATE).is_file()]


def classes_in(folder: Path, label_key: str | None) -> list[str] | None:
    """Names of the classes of a column, in the order of their numbers; None if it has none."""
    features = json.loads((folder / INFO).read_text())["features"] or {}
    return (features.get(label_key) or {}).get("names") if label_key else None


def only(features: dict, kind: str, preferred: tuple[str, ...], field: str, root: Path) -> str | None:
    """The column of this type; None if there is none, and it is that of labels."""
    of_kind = [name for name, feature in features.items() if isinstance(feature, dict) and feature.get("_type") == kind]
    for name in preferred:
        if name in of_kind or (kind == "ClassLabel" and name in features):
            return name
    if len(of_kind) == 1 or (not of_kind and kind == "ClassLabel"):
        return of_kind[0] if of_kind else None
    several = f"{len(of_kind)} columns" if of_kind else "no column"
    way_out = f"set {field} to one of {', '.join(of_kind or features)}" + ", or labels_from=None" * (
        kind == "ClassLabel"
    )
    raise ValueError(f"{root} has {several} of type {kind}: {way_out}")


def stamp(folder: Path) -> Stamp:
    files = [folder / entry["filename"] for entry in json.loads((folder / STATE).read_text())["_data_files"]]
    statuses = [(file, os.stat(file)) for file in files]
    return tuple((str(file), status.st_size, status.st_mtime_ns) for file, status in statuses)


@lru_cache(maxsize=16)
def hash_of(files: Stamp) -> str:
    return hashlib.sha256(repr(files).encode()).hexdigest()


@lru_cache(maxsize=16)
def mapped(files: Stamp) -> "pyarrow.Table":
    try:
        import pyarrow
    except ImportError as error:
        raise ValueError("Hugging Face data sets need pyarrow: pip install pyarrow") from error
    tables = [pyarrow.ipc.open_stream(pyarrow.memory_map(path)).read_all() for path, _, _ in files]
    return pyarrow.concat_tables(tables)
