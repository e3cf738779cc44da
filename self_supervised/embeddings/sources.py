"""Sources of images by name: a directory of image files or of videos, a stored or a built-in data set. The picture of a
video is its middle frame."""

import hashlib
import os
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from model_params import EncoderAndDataParams
from self_supervised.catalogue import DATASETS
from self_supervised.data import decoders, video_files
from self_supervised.data.array_files import (
    TIFF_SUFFIXES,
    opened_image,
    read_npy,
    read_tiff,
    suffix_of,
    to_upright,
    transposed,
)
from self_supervised.data.arrow import ArrowImages
from self_supervised.data.custom import get_source, is_stored
from self_supervised.data.data_sets import prepare_data
from self_supervised.data.file_search import ARRAY_SUFFIX, PassedOver, data_path, files_below, image_suffixes
from self_supervised.data.files import File
from self_supervised.data.folders import ImageList, label_from_path
from self_supervised.data.image_files import has_equal_pages, in_mode, jpeg_size, read_any, read_image, read_reduced
from self_supervised.data.packed import PackedImages
from self_supervised.data.shard_urls import UnreachableShard
from self_supervised.fields import as_path

SHARD_OR_SPLIT = re.compile(r".*\.tar(?=/)|.*(?=/)|", re.IGNORECASE)  # start of a path in a `Stored`


class Folder:
    """All image files (or videos) below a directory, flat or nested, recognized by file extension. Paths are relative
    to the directory, with "/".

    Hidden files are skipped. If every image is in a directory of its class (CLASS/IMAGE), that is its label, unless
    `columns` has labels_from.
    """

    has_file_names = True

    def __init__(self, root: Path, kind: str = "image", columns: dict[str, Any] | None = None):
        self.root = root
        self.columns = {name: value for name, value in (columns or {}).items() if name == "labels_from"}
        EncoderAndDataParams(dataset_name="folder", **self.columns)  # raises for an unknown choice
        self.name = str(root.resolve())
        self.kind = kind
        self.passed_over = PassedOver()  # set by paths()

    def paths(self) -> list[str]:
        """Return all paths, sorted.

        Raises:
            ValueError: there are none, or a name is not UTF-8.
        """
        suffixes = image_suffixes() if self.kind == "image" else video_files.VIDEO_EXTENSIONS
        self.passed_over.clear()
        paths = sorted(files_below(self.root, suffixes, self.passed_over))
        if not paths:
            raise ValueError(f"{self.root} holds no {self.kind}s{self.passed_over}")
        for path in paths:
            try:
                path.encode()
            except UnicodeEncodeError as error:
                raise ValueError(f"the file name {path!r} in {self.root} is not UTF-8. Rename the file.") from error
        return paths

    def labels(self, paths: list[str]) -> list[str | None]:
        if self.columns:
            return [label_from_path(path, self.columns["labels_from"]) for path in paths]
        in_class_folders = all(path.count("/") == 1 for path in paths)
        return [path.split("/")[0] if in_class_folders else None for path in paths]

    def picture(self, path: str, side: int | None = None) -> Image.Image:
        """Return the image for display, in RGB.

        Args:
            side: if passed, a large JPEG may be decoded at a reduced size, with a shorter side of at least `side`.
        """
        file = str(self.root / path)
        is_image_file = not video_files.is_video(Path(file)) and not path.lower().endswith(ARRAY_SUFFIX)
        if side is not None and is_image_file and (size := jpeg_size(file)):
            scale = next((scale for scale in (8, 4, 2) if min(size) >= scale * side), 1)
            return read_reduced(file, 3, scale)
        return picture_of(file)

    def image(self, path: str, params: EncoderAndDataParams) -> Image.Image | np.ndarray:
        """Return the image as an encoder with these settings reads it."""
        file = str(self.root / path)
        return read_as(params, file, file)

    def paths_of(self, file: Path) -> list[str]:
        """Return the paths that a file may have in this directory: by its name, and without links."""
        paths = []
        for path in (Path(os.path.abspath(file)), file.resolve()):
            root = next((folder for folder in path.parents if folder.exists() and folder.samefile(self.root)), None)
            paths += [path.relative_to(root).as_posix()] if root else []
        return paths


class Packed:
    """A built-in data set, or one split of it. Paths are SPLIT/NUMBER, and labels are class numbers."""

    kind = "image"
    has_file_names = False

    def __init__(self, name: str, dataset: str, splits: list[str]):
        prepare_data(dataset, splits)
        self.name = name
        self.passed_over = PassedOver()
        self.splits = {split: PackedImages([data_path() / dataset / split]) for split in splits}

    def paths(self) -> list[str]:
        return [
            f"{split}/{i:0{len(str(len(images) - 1))}d}"
            for split, images in self.splits.items()
            for i in range(len(images))
        ]

    def labels(self, paths: list[str]) -> list[str | None]:
        known = {split: images.labels for split, images in self.splits.items()}
        labels = (int(known[split][int(i)]) for split, i in (path.split("/") for path in paths))
        return [str(label) if label >= 0 else None for label in labels]  # -1: STL-10's unlabeled images

    def picture(self, path: str, side: int | None = None) -> Image.Image:
        return self.pixels(path, 3)

    def image(self, path: str, params: EncoderAndDataParams) -> Image.Image:
        return self.pixels(path, params.channels)

    def pixels(self, path: str, channels: int) -> Image.Image:
        split, i = path.split("/")
        pixels = self.splits[split][int(i)][0].permute(1, 2, 0)
        return in_mode(Image.fromarray(pixels.squeeze(2).numpy()), channels)

    def paths_of(self, file: Path) -> list[str]:
        return []


class Stored:
    """All splits of shards or of a Hugging Face data set (data/custom.py), with the paths and labels found there.

    Args:
        columns: settings of COLUMNS.
        preferred: column of images that is read if there is one of this name, and `columns` has none.
    """

    kind = "image"

    def __init__(self, name: str, columns: dict[str, Any] | None = None, preferred: str | None = None):
        self.columns = columns or {}
        if preferred is not None and "image_key" not in self.columns and self.has_other_column(name, preferred):
            self.columns = {"image_key": preferred, **self.columns}
        splits = self.read(name, self.columns)
        self.label_of = {path: label for images in splits.values() for path, label in images}
        self.outside_splits = splits.get("", [])  # empty if there are no splits
        self.name = name
        self.passed_over = self.source.passed_over
        self.has_file_names = not isinstance(self.source, ArrowImages)  # of a Hugging Face data set, rows have numbers

    def has_other_column(self, name: str, image_key: str) -> bool:
        """Return whether the data set has this column of images, and another one is read by default."""
        try:
            with_column = self.read(name, {"image_key": image_key, "labels_from": None})
        except UnreachableShard:
            raise
        except ValueError:
            return False
        with suppress(ValueError):  # with several columns, there is no default
            usual = self.read(name, {"labels_from": None})
            if usual == with_column and getattr(self.source, "image_key", image_key) == image_key:
                return False
        return any(with_column.values())

    def read(self, name: str, columns: dict[str, Any]) -> ImageList:
        self.source = get_source(EncoderAndDataParams(dataset_name="folder", **columns), name, names=True)
        return self.source.find()

    def paths(self) -> list[str]:
        if not self.label_of:
            raise ValueError(f"{self.name} holds no images")
        return sorted(self.label_of)

    def labels(self, paths: list[str]) -> list[str | None]:
        return [None if self.label_of[path] is None else str(self.label_of[path]) for path in paths]

    def contents(self) -> dict[str, str]:
        """Return shard or split -> hash of its files' sizes and times: the paths of its images are often numbers, which
        say nothing about the images."""
        hashes: dict[str, Any] = {}
        for path in self.paths():
            digest = hashes.setdefault(SHARD_OR_SPLIT.match(path)[0], hashlib.sha256())
            digest.update(repr(self.source.signature(str(self.source.root / path))).encode())
        return {part: digest.hexdigest()[:16] for part, digest in hashes.items()}

    def picture(self, path: str, side: int | None = None) -> Image.Image:
        return picture_in(path, self.source.open(str(self.source.root / path)))

    def image(self, path: str, params: EncoderAndDataParams) -> Image.Image | np.ndarray:
        return read_as(params, path, self.source.open(str(self.source.root / path)))

    def paths_of(self, file: Path) -> list[str]:
        return []


ImageSource = Folder | Packed | Stored


def read_as(params: EncoderAndDataParams, path: str, file: File) -> Image.Image | np.ndarray:
    return read_any(path, file, params.channels, params.pixel_range, params.exif_orientation)


def picture_of(file: str) -> Image.Image:
    """Return an image file, or the middle frame of a video file."""
    if not video_files.is_video(Path(file)):
        return picture_in(file, file)
    frames, _ = decoders.read_video(file, lambda times: np.array([len(times) // 2]), 3, threads=1)
    return Image.fromarray(frames[0])


def picture_in(path: str, file: File) -> Image.Image:
    """Return an image for display in RGB. Values of arrays and of more than 8 bits are scaled from the smallest to the
    largest, and of images with more channels, the first three are shown."""
    suffix = suffix_of(path, file)
    if suffix == ARRAY_SUFFIX:
        return scaled_to_display(read_npy(file, 3))
    try:
        with opened_image(file) as image:
            has_8_bits = not image.mode.startswith(("I", "F"))
            is_stack = image.format == "TIFF" and len(image.getbands()) == 1 and has_equal_pages(image)
            if has_8_bits and not is_stack:
                return read_image(file, 3)
            if image.format != "TIFF":
                return scaled_to_display(np.asarray(transposed(image, to_upright(image))))
    except UnidentifiedImageError:  # a TIFF with more channels
        if suffix not in TIFF_SUFFIXES:
            raise
    if not isinstance(file, str):
        file.seek(0)
    return scaled_to_display(read_tiff(file, 3))


def scaled_to_display(pixels: np.ndarray) -> Image.Image:
    pixels = np.atleast_3d(pixels).astype(np.float64)
    pixels = np.moveaxis(pixels, int(np.argmin(pixels.shape)), 2)
    pixels = pixels[..., : 3 if pixels.shape[2] > 2 else 1]
    low, high = np.nanmin(pixels), np.nanmax(pixels)
    gray_levels = np.nan_to_num((pixels - low) * (255 / max(high - low, 1e-12))).astype(np.uint8)
    return in_mode(Image.fromarray(gray_levels.squeeze(2) if gray_levels.shape[2] == 1 else gray_levels), 3)


def source_of_features(about: dict[str, Any], folder: str | Path | None) -> "ImageSource":
    """Return the source of the images whose features a file holds.

    Args:
        about: the file's metadata.
        folder: directory of the images, if it has moved.

    Raises:
        ValueError: it is not there. The message names --folder.
    """
    kind = "video" if "num_frames" in about["preprocessing"] else "image"
    try:
        source = open_source(folder or about["images"], kind, about.get("columns"))
    except ValueError as error:
        reason = str(error).removesuffix(".")
        raise ValueError(f"{reason}. Pass the directory of the {kind}s with --folder.") from error
    is_told = isinstance(source, Stored) and folder is None and about.get("contents")  # a copy has other times
    if is_told and (changed := written_again(about, {"images": source.name, "contents": source.contents()})):
        print(f"warning: {changed} has been written again: pictures may not be of the images that were embedded")
    return source


def written_again(about: dict[str, Any], now: dict[str, Any]) -> str | None:
    """Return the first shard or split whose images are no longer those of the metadata `about`, or None. Files of
    earlier versions do not tell."""
    before = about.get("contents", {})
    changed = [part for part, digest in before.items() if now["contents"].get(part, digest) != digest]
    return (changed[0] or now["images"]) if changed else None


def open_source(
    name: str | Path, kind: str = "image", columns: dict[str, Any] | None = None, preferred: str | None = None
) -> ImageSource:
    """Return the source with that name: a directory of images or of videos (kind="video"), shards, a Hugging Face data
    set, or a built-in data set ("cifar10") or one of its splits ("cifar10/test").

    Args:
        columns, preferred: see `Stored`. Of a directory, only labels_from has an effect.

    Raises:
        ValueError: it is none of these.
    """
    folder = as_path(name)
    if folder.is_dir() and kind == "video":
        return Folder(folder, kind, columns)
    if kind == "video":
        raise ValueError(f"{name} is not a directory of videos. Pass one, because this encoder takes videos.")
    if is_stored(str(name)):
        return Stored(str(name), columns, preferred)
    if folder.is_dir():
        return Folder(folder, columns=columns)
    packed = [dataset for dataset, info in DATASETS.items() if info.is_packed]
    dataset, _, split = str(name).partition("/")
    if dataset not in packed and folder.is_file():
        raise ValueError(f"{name} is a file. Pass its directory.")
    if dataset not in packed:
        raise ValueError(f"{name} is neither a directory nor one of the data sets {', '.join(packed)}")
    info = DATASETS[dataset]
    if split not in ("", *info.splits):
        raise ValueError(f"{dataset} has no split {split!r}: choose one of {', '.join(info.splits)}")
    return Packed(str(name), dataset, [split] if split else info.splits)


def as_absolute(name: str) -> str:
    """Return the name of a `Stored` with absolute paths. URLs stay as they are."""
    parts = (part if "://" in part else os.path.abspath(os.path.expanduser(part)) for part in name.split("::"))
    return "::".join(parts)
