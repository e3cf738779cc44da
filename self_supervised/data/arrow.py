"""Data sets that Hugging Face's `datasets` saved to disk: Arrow files, memory-mapped; rows are read when needed.

Folders of Parquet files are read the same way, from the Arrow files that `datasets` makes of them in its cache.
Sources: https://huggingface.co/docs/datasets/process#save, https://huggingface.co/docs/datasets/loading#parquet.
"""

import hashlib
import io
import os
from pathlib import Path
from typing import Any

from self_supervised.data.file_search import PassedOver, folders_in
from self_supervised.data.files import File, OnDisk
from self_supervised.data.folders import SPLITS, ImageList, Label, as_label, has_images

COLUMN_LABEL_KEYS = ("label", "labels")  # where no other is wanted; else the only column of classes


def arrow_is_there(folder: Path) -> bool:
    return (folder / "dataset_dict.json").is_file() or is_single(folder) or is_parquet(folder)


def is_single(folder: Path) -> bool:
    """Whether a Dataset was saved there, alone or as a split of a DatasetDict."""
    return (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()


def is_parquet(folder: Path) -> bool:
    """Whether Parquet files lie there, or in `data` as on the hub, with no image files that they may describe."""
    tables = any(next(base.glob("*.parquet"), None) for base in (folder, folder / "data"))
    return tables and not has_images(folder)


class ArrowImages(OnDisk):
    """The images of a Dataset or DatasetDict; a path is the number of a row, below its split.

    Args:
        image_key: column of the images; None: the only one of that type.
        label_key: column of the labels; None: `label`, or the only one of type ClassLabel.
        names: labels are the names of classes, where they have some, and not their numbers.

    Raises:
        ValueError: there are no or several such columns; `datasets` is not installed.
    """

    def __init__(self, root: Path, image_key: str | None, label_key: str | None, labeled: bool, names: bool):
        self.root = root
        self.names = names
        self.passed_over = PassedOver()
        self.sets = load_splits(root)
        self.splits = splits_of(root, list(self.sets))
        folder = self.splits["train"]
        features = self.sets[folder].features
        self.image_key = image_key or only(features, "Image", ("image", "img"), "image_key", root)
        self.label_key = None
        if labeled:
            self.label_key = label_key or only(features, "ClassLabel", COLUMN_LABEL_KEYS, "label_key", root)
        for field, key in (("image_key", self.image_key), ("label_key", self.label_key)):
            if key is not None and key not in features:
                raise ValueError(f"{field}={key!r} is no column of {folder}: choose one of {', '.join(features)}")
        columns = {folder: self.sets[folder].features.get(self.label_key) for folder in self.splits.values()}
        self.classes_of = {folder: getattr(column, "names", None) for folder, column in columns.items()}
        self.classes = self.classes_of[folder]
        if any(classes != self.classes for classes in self.classes_of.values()):  # their numbers mean other classes
            self.names = True
        self.hashes = {folder: hash_of(self.sets[folder]) for folder in self.splits.values()}

    def find(self) -> ImageList:
        found: ImageList = {}
        for split, folder in self.splits.items():
            labels: list[Label] = [None] * len(self.sets[folder])
            if self.label_key is not None:
                values = self.sets[folder][:][self.label_key].to_pylist()
                labels = [self.label(value, self.classes_of[folder]) for value in values]
            prefix = f"{folder}/".removeprefix(f"{self.root}/")
            found[split] = [(f"{prefix}{row}", label) for row, label in enumerate(labels)]
        self.passed_over.clear()
        for folder, dataset in self.sets.items():
            if folder not in self.hashes:
                self.passed_over.add("in splits that are not used", folder, len(dataset))
        return found

    def label_of(self, path: str) -> Label:
        folder, _, row = str(self.root / path).rpartition("/")
        if self.label_key is None:
            return None
        return self.label(self.sets[folder][int(row)][self.label_key][0].as_py(), self.classes_of[folder])

    def label(self, value: Any, classes: list[str] | None) -> Label:
        """Classes are numbers, or their names; -1 is none."""
        if value is None or value == -1:
            return None
        if not isinstance(value, int | str) or isinstance(value, bool):
            raise ValueError(f"label_key={self.label_key!r} has {value!r}, which is no class: choose another column")
        return classes[value] if self.names and classes else as_label(str(value))

    def holds(self, path: str) -> bool:
        folder, _, row = str(self.root / path).rpartition("/")
        return folder in self.hashes and row.isdecimal() and int(row) < len(self.sets[folder])

    def open(self, path: str) -> File:
        folder, _, row = path.rpartition("/")
        value = self.sets[folder][int(row)][self.image_key][0].as_py()
        content = value["bytes"] if isinstance(value, dict) else value
        if content is not None:
            return io.BytesIO(content)
        if isinstance(value, dict) and value["path"]:
            return value["path"]
        raise ValueError(f"its column {self.image_key!r} is empty")

    def signature(self, path: str) -> tuple:
        return (self.hashes[path.rpartition("/")[0]],)


def load_splits(root: Path) -> dict[str, Any]:
    """Return folder -> the Dataset saved there, of `root` or of each split below it. Its rows come as tables of Arrow,
    with images as they were saved, not decoded. A split of Parquet files is named like a folder of this name."""
    try:
        from datasets import load_dataset, load_from_disk  # optional, and slow to import
    except ImportError as error:
        raise ValueError(
            f"data_path={str(root)!r}: a Hugging Face data set is read by `datasets`. Run pip install datasets."
        ) from error
    if is_parquet(root):
        return {str(root / split): part.with_format("arrow") for split, part in load_dataset(str(root)).items()}
    folders = [root] if is_single(root) else filter(is_single, folders_in(root))
    return {str(folder): load_from_disk(folder, keep_in_memory=False).with_format("arrow") for folder in folders}


def splits_of(root: Path, folders: list[str]) -> dict[str, str]:
    """Return split -> the folder of its data set. Splits of other names are not used."""
    if folders == [str(root)]:
        return {"train": str(root)}
    names = [os.path.basename(folder) for folder in folders]
    found = {s: str(root / name) for s, wanted in SPLITS.items() for name in wanted[::-1] if name in names}
    if "train" not in found:
        raise ValueError(f"{root} has the splits {', '.join(names)} and no train: give data_path={str(root)}/SPLIT")
    return found


def only(features: dict[str, Any], kind: str, preferred: tuple[str, ...], field: str, root: Path) -> str | None:
    """Return the column of this type; None if there is none, and it is that of labels."""
    of_kind = [name for name, feature in features.items() if type(feature).__name__ == kind]
    for name in preferred:
        if name in of_kind or (kind == "ClassLabel" and name in features):
            return name
    if len(of_kind) == 1 or (not of_kind and kind == "ClassLabel"):
        return of_kind[0] if of_kind else None
    several = f"{len(of_kind)} columns" if of_kind else "no column"
    instead = ", or labels_from=None" if kind == "ClassLabel" else ""
    raise ValueError(
        f"{root} has {several} of type {kind}: set {field} to one of {', '.join(of_kind or features)}{instead}"
    )


def hash_of(dataset: Any) -> str:
    """Return what changes when one of its Arrow files does."""
    statuses = [(entry["filename"], os.stat(entry["filename"])) for entry in dataset.cache_files]
    files = tuple((file, status.st_size, status.st_mtime_ns) for file, status in statuses)
    return hashlib.sha256(repr(files).encode()).hexdigest()
