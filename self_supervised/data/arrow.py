"""Hugging Face data sets on disk: memory-mapped Arrow files, whose rows are read when they are needed.

Directories of Parquet files are read the same way, from the Arrow files that `datasets` creates in its cache.
Sources: https://huggingface.co/docs/datasets/process#save, https://huggingface.co/docs/datasets/loading#parquet.
"""

import hashlib
import io
import os
from pathlib import Path
from typing import Any

from self_supervised.data.file_search import PassedOver, folders_in
from self_supervised.data.files import File, OnDisk
from self_supervised.data.folders import SPLITS, ImageList, Label, as_label, has_images, whole_number

COLUMN_LABEL_KEYS = ("label", "labels")  # default label columns; without them, the only column of type ClassLabel


def arrow_is_there(folder: Path) -> bool:
    """Return whether a directory holds a Hugging Face data set: a Dataset, a DatasetDict or Parquet files."""
    return (folder / "dataset_dict.json").is_file() or is_single(folder) or is_parquet(folder)


def is_single(folder: Path) -> bool:
    """Return whether a directory holds a Dataset, by itself or as a split of a DatasetDict."""
    return (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()


def is_parquet(folder: Path) -> bool:
    """Return whether a directory, or its subdirectory `data` as on the hub, holds Parquet files and no image files.

    Parquet files next to image files may be their metadata.
    """
    tables = any(next(base.glob("*.parquet"), None) for base in (folder, folder / "data"))
    return tables and not has_images(folder)


class ArrowImages(OnDisk):
    """Images of a Dataset or DatasetDict. The path of an image is SPLIT/ROW, or ROW alone.

    Args:
        image_key: column of the images; None: the only column of type Image.
        label_key: column of the labels; None: `label`, `labels`, or the only column of type ClassLabel.
        labeled: whether labels are read.
        names: whether labels are the names of classes, if the column stores them, and not their numbers.

    Raises:
        ValueError: no column or more than one column fits, the column holds no images, or `datasets` is not installed.
    """

    def __init__(self, root: Path, image_key: str | None, label_key: str | None, labeled: bool, names: bool):
        self.root = root = root.absolute() if root == Path() else root  # Path('.') / '0' lacks the root
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
                raise ValueError(f"{field}={key!r}: {folder} has no such column. Choose one of {', '.join(features)}.")
        check_image_column(self.image_key, features[self.image_key])
        columns = {folder: self.sets[folder].features.get(self.label_key) for folder in self.splits.values()}
        self.classes_of = {folder: getattr(column, "names", None) for folder, column in columns.items()}
        self.classes = self.classes_of[folder]
        with_labels = [folder for folder in columns if self.label_key in self.sets[folder].features]
        if any(self.classes_of[folder] != self.classes for folder in with_labels):  # a number means different classes
            self.names = True
        self.hashes = {folder: hash_of(self.sets[folder]) for folder in self.splits.values()}

    def find(self) -> ImageList:
        """Return all images and their labels, by split."""
        images_of: ImageList = {}
        for split, folder in self.splits.items():
            labels: list[Label] = [None] * len(self.sets[folder])
            if self.label_key in self.sets[folder].features:
                values = self.sets[folder][:][self.label_key].to_pylist()
                labels = [self.label(value, self.classes_of[folder]) for value in values]
            prefix = f"{folder}/".removeprefix(f"{self.root}/")
            images_of[split] = [(f"{prefix}{row}", label) for row, label in enumerate(labels)]
        self.passed_over.clear()
        for folder, dataset in self.sets.items():
            if folder not in self.hashes:
                self.passed_over.add("in unused splits", folder, len(dataset))
        return images_of

    def label_of(self, path: str) -> Label:
        folder, _, row = str(self.root / path).rpartition("/")
        if self.label_key not in self.sets[folder].features:  # secret labels of a test set
            return None
        return self.label(self.sets[folder][int(row)][self.label_key][0].as_py(), self.classes_of[folder])

    def label(self, value: Any, classes: list[str] | None) -> Label:
        """Return the label that a value of the label column means: a class number or name, or None for -1 and NaN."""
        value = whole_number(value)
        if value is None or value == -1:
            return None
        if not isinstance(value, int | str) or isinstance(value, bool):
            raise ValueError(
                f"label_key={self.label_key!r}: {value!r} in this column is not a class. Choose another column."
            )
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
        raise ValueError(f"image_key={self.image_key!r}: this column is empty in this row")

    def signature(self, path: str) -> tuple:
        return (self.hashes[path.rpartition("/")[0]],)


def load_splits(root: Path) -> dict[str, Any]:
    """Return directory -> Dataset, for `root` or for each split below it.

    Rows come as Arrow tables, whose images are not decoded. A split of Parquet files gets the directory ROOT/SPLIT,
    although there is none.
    """
    try:
        from datasets import load_dataset, load_from_disk  # optional, and slow to import
    except ImportError as error:
        raise ValueError(
            f"data_path={str(root)!r}: a Hugging Face data set is read by `datasets`. Run pip install datasets."
        ) from error
    if is_parquet(root):
        try:
            splits = load_dataset(str(root))
        except Exception as error:  # `datasets` raises its own types, with the cause below them
            reason = " ".join(str(error.__cause__ or error).split())
            raise ValueError(f"data_path={str(root)!r}: its Parquet files could not be read ({reason})") from error
        return {str(root / split): part.with_format("arrow") for split, part in splits.items()}
    folders = [root] if is_single(root) else filter(is_single, folders_in(root))
    return {str(folder): load_from_disk(folder, keep_in_memory=False).with_format("arrow") for folder in folders}


def splits_of(root: Path, folders: list[str]) -> dict[str, str]:
    """Return split -> directory of its Dataset. Splits with other names than those in SPLITS are not used."""
    if folders == [str(root)]:
        return {"train": str(root)}
    names = [os.path.basename(folder) for folder in folders]
    folder_of = {s: str(root / name) for s, wanted in SPLITS.items() for name in wanted[::-1] if name in names}
    if "train" not in folder_of:
        way_out = "Name its files train-..." if is_parquet(root) else f"Select one with data_path={root}/SPLIT"
        raise ValueError(
            f"data_path={str(root)!r}: the data set has the splits {', '.join(names)}, but no train. {way_out}."
        )
    return folder_of


def only(features: dict[str, Any], kind: str, preferred: tuple[str, ...], field: str, root: Path) -> str | None:
    """Return the name of the only column of type `kind`, or of one of the `preferred` ones.

    None if `kind` is ClassLabel and no column fits.

    Raises:
        ValueError: there is no such column, or more than one.
    """
    of_kind = [name for name, feature in features.items() if type(feature).__name__ == kind]
    for name in preferred:
        if name in of_kind or (kind == "ClassLabel" and name in features):
            return name
    if len(of_kind) == 1 or (not of_kind and kind == "ClassLabel"):
        return of_kind[0] if of_kind else None
    count = f"{len(of_kind)} columns" if of_kind else "no column"
    instead = ", or labels_from=None" if kind == "ClassLabel" else ""
    raise ValueError(
        f"{field}=None: {root} has {count} of type {kind}. Set {field} to one of {', '.join(of_kind or features)}"
        f"{instead}."
    )


def check_image_column(key: str, feature: Any) -> None:
    """Raise ValueError unless a column holds encoded images: as type Image, as bytes, or as dictionaries with bytes."""
    kind = type(feature).__name__
    kind = feature.dtype if kind == "Value" else kind
    if kind != "Image" and "binary" not in kind and not (isinstance(feature, dict) and "bytes" in feature):
        raise ValueError(
            f"image_key={key!r}: this column holds {kind}, not encoded images. Choose another column, or convert it "
            f"with cast_column({key!r}, datasets.Image()) and save the data set again."
        )


def hash_of(dataset: Any) -> str:
    """Return a hash of the paths, sizes and modification times of a Dataset's Arrow files."""
    statuses = [(entry["filename"], os.stat(entry["filename"])) for entry in dataset.cache_files]
    files = tuple((file, status.st_size, status.st_mtime_ns) for file, status in statuses)
    return hashlib.sha256(repr(files).encode()).hexdigest()
