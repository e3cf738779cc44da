"""Where images come from, by name: any folder of image files, or of videos, or a packed data set; and batches of them
by path. The picture of a video is its middle frame."""

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import attrs
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

import decoders
import video_files
from data import DATASETS, data_path, prepare_data
from image_files import central_square, in_mode, jpeg_size, read_image, read_reduced
from own_images import get_source, is_stored
from packed_images import PackedImages
from shared_params import EncoderAndDataParams

ONLY_RECOGNIZED = {"BUFR", "GRIB", "HDF5", "MPEG", "EPS", "WMF"}  # formats that PIL cannot decode by itself


def image_suffixes() -> set[str]:
    """Of all formats that the installed PIL decodes."""
    Image.init()
    readable = set(Image.OPEN) - ONLY_RECOGNIZED
    return {suffix for suffix, name in Image.registered_extensions().items() if name in readable}


class Folder:
    """All image files (or videos) below a folder, flat or nested, known by suffix; a path is relative to the folder,
    with "/".

    Hidden files are passed over. Where every image lies in a folder of its class (CLASS/IMAGE), that is its label.
    """

    def __init__(self, root: Path, kind: str = "image"):
        self.root, self.name, self.kind = root, str(root.resolve()), kind
        self.others = ""  # files that are no images, once paths() was called

    def paths(self) -> list[str]:
        """Sorted. Raises ValueError if there are none, or if a name is not UTF-8."""
        suffixes, others = image_suffixes() if self.kind == "image" else video_files.VIDEO_EXTENSIONS, Counter()
        found = []
        for path in files_below(self.root):
            if path.suffix.lower() in suffixes:
                found.append(path.relative_to(self.root).as_posix())
            else:
                others[path.suffix or path.name] += 1
        self.others = ", ".join(f"{n} {suffix}" for suffix, n in others.most_common(5))
        if not found:
            raise ValueError(
                f"{self.root} holds no {self.kind}s" + f", but other files: {self.others}" * bool(self.others)
            )
        for path in found:
            try:
                path.encode()
            except UnicodeEncodeError as error:
                raise ValueError(f"the name {path!r} in {self.root} is not UTF-8: rename it") from error
        return sorted(found)

    def labels(self, paths: list[str]) -> list[str | None]:
        in_class_folders = all(path.count("/") == 1 for path in paths)
        return [path.split("/")[0] if in_class_folders else None for path in paths]

    def picture(self, path: str, channels: int = 3, side: int | None = None) -> Image.Image:
        """The image, 1 channel gray, else RGB. With `side`, a large JPEG may come reduced, but no smaller than that."""
        file = str(self.root / path)
        if side is not None and not video_files.is_video(Path(file)) and (size := jpeg_size(file)):
            scale = next((scale for scale in (8, 4, 2) if min(size) >= scale * side), 1)
            return read_reduced(file, channels, scale)
        return picture_of(file, channels)

    def path_of(self, file: Path) -> str | None:
        """The path of a file that lies in this folder."""
        root, file = self.root.resolve(), file.resolve()
        return file.relative_to(root).as_posix() if file.is_relative_to(root) else None


class Packed:
    """A packed data set, or one split of it; a path is SPLIT/NUMBER, and a label the number of the class."""

    kind = "image"

    def __init__(self, name: str, dataset: str, splits: list[str]):
        prepare_data(dataset, splits)
        self.name, self.others = name, ""
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
        return [str(label) if label >= 0 else None for label in labels]  # STL-10's unlabelled ones are -1

    def picture(self, path: str, channels: int = 3, side: int | None = None) -> Image.Image:
        split, i = path.split("/")
        pixels = self.splits[split][int(i)][0].permute(1, 2, 0)
        return in_mode(Image.fromarray(pixels.squeeze(2).numpy()), channels)

    def path_of(self, file: Path) -> str | None:
        return None


class Stored:
    """Images in shards or in a Hugging Face data set, of all splits (own_images.py); paths are theirs, labels as they
    are found there."""

    kind = "image"

    def __init__(self, name: str):
        self.source = get_source(EncoderAndDataParams(dataset_name="folder"), name, names=True)
        self.name, self.others = name, ""
        self.label_of = {path: label for images in self.source.find().values() for path, label in images}

    def paths(self) -> list[str]:
        if not self.label_of:
            raise ValueError(f"{self.name} holds no images")
        return sorted(self.label_of)

    def labels(self, paths: list[str]) -> list[str | None]:
        return [None if self.label_of[path] is None else str(self.label_of[path]) for path in paths]

    def picture(self, path: str, channels: int = 3, side: int | None = None) -> Image.Image:
        return read_image(self.source.open(str(self.source.root / path)), channels)

    def path_of(self, file: Path) -> str | None:
        return None


Source = Folder | Packed | Stored


def picture_of(file: str, channels: int = 3) -> Image.Image:
    """An image; of a video the frame in the middle."""
    if not video_files.is_video(Path(file)):
        return read_image(file, channels)
    frames, _ = decoders.read_video(file, lambda times: np.array([len(times) // 2]), channels, threads=1)
    return Image.fromarray(frames[0].squeeze(2) if channels == 1 else frames[0])


def files_below(folder: Path) -> Iterator[Path]:
    """All but hidden ones. Links to folders are followed, but not to one that we are in."""
    for root, folders, files in os.walk(folder, followlinks=True):
        here = Path(root).resolve()
        folders[:] = [f for f in folders if not f.startswith(".") and not here.is_relative_to((here / f).resolve())]
        yield from (Path(root, file) for file in files if not file.startswith("."))


def open_source(name: str | Path, kind: str = "image") -> Source:
    """A folder of images, or of videos (kind="video"), shards or a Hugging Face data set, or a packed one:
    "cifar10", or one split of it: "cifar10/test".

    Raises:
        ValueError: it is neither.
    """
    folder = Path(name).expanduser()
    if folder.is_dir() and kind == "video":
        return Folder(folder, kind)
    if kind == "video":
        raise ValueError(f"{name} is no folder of videos, which this encoder takes")
    if is_stored(str(name)):
        return Stored(str(name))
    if folder.is_dir():
        return Folder(folder)
    packed = [dataset for dataset, info in DATASETS.items() if info.read is not None]
    dataset, _, split = str(name).partition("/")
    if dataset not in packed:
        raise ValueError(f"{name} is neither a folder nor one of the data sets {', '.join(packed)}")
    info = DATASETS[dataset]
    splits = sorted({*info.pretraining_splits, *info.train_splits, *info.test_splits})
    if split not in ("", *splits):
        raise ValueError(f"{dataset} has no split {split!r}: choose one of {', '.join(splits)}")
    return Packed(str(name), dataset, [split] if split else splits)


def part_kept(params: EncoderAndDataParams) -> float:
    """Side of the central square that an encoder sees, over an image's shorter side: as it is evaluated in training."""
    return 7 / 8 if params.dataset.read is None else 1.0


def square(image: Image.Image, params: EncoderAndDataParams) -> Tensor:
    """uint8 [C, size, size] as an encoder with these settings wants it."""
    return central_square(image, params.crop_size, part_kept(params))


class Batches(Dataset):
    """Paths -> (those that could be read, what an encoder with these settings wants of them: uint8 [n, C, size, size],
    or clips of videos, {path: why it could not be read}).

    PyTorch's loader calls it with the paths of a whole batch if its sampler is a list of paths.
    """

    def __init__(self, source: Source, params: EncoderAndDataParams):
        self.source, self.params, self.videos = source, params, None
        if params.dataset.of_videos:
            self.videos = video_files.as_set(attrs.evolve(params, video_decoder="file"), [], [])

    def prepared(self, path: str) -> Tensor:
        """The square in the middle; of a video its evaluation clips."""
        if self.videos is not None:
            return self.videos.even_clips(str(self.source.root / path))
        return square(self.source.picture(path, self.params.channels), self.params)

    def __getitems__(self, paths: list[str]) -> tuple[list[str], Tensor | None, dict[str, str]]:
        found, unreadable = {}, {}
        for path in paths:
            try:
                found[path] = self.prepared(path)
            except Exception as error:  # PIL's readers raise many kinds of them on damaged files
                unreadable[path] = f"{type(error).__name__}: {error}"
        return list(found), torch.stack(list(found.values())) if found else None, unreadable
