"""Packed data sets: images of one size as two memory-mapped arrays on disk, or as one tensor on the device."""

import copy
import mmap
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torchvision
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.utils.data import Dataset

from self_supervised.data.class_labels import in_classes
from self_supervised.data.file_search import data_path
from self_supervised.distributed import has_room, to_device
from self_supervised.safe_files import atomic_folder

Arrays = dict[str, tuple[np.ndarray, np.ndarray]]  # split -> images [N, H, W, C], labels [N]
ARRAY_FILES = ("images.npy", "labels.npy")  # of a split
COPY_BYTES = 2**26  # size of one copy to the device
REPACK = "Write it again, or remove its directory to have the data set downloaded and packed again, if it can be."


# ---- downloading ----


def read_digits() -> Arrays:
    """Return scikit-learn's 1,797 scans of handwritten digits, 8 x 8 x 1: 1,297 for training, 500 for testing."""
    digits = load_digits()
    images = np.round(digits.images / 16 * 255)[..., None]
    parts = train_test_split(images, digits.target, test_size=500, stratify=digits.target, random_state=0)
    return {"train": (parts[0], parts[2]), "test": (parts[1], parts[3])}


def read_cifar(source: type) -> Callable[[], Arrays]:
    """Return the reader of a CIFAR class of torchvision."""

    def read() -> Arrays:
        sets = {name: source(data_path(), train=name == "train", download=True) for name in ("train", "test")}
        return {name: (s.data, s.targets) for name, s in sets.items()}

    return read


def read_stl10() -> Arrays:
    sets = {
        name: torchvision.datasets.STL10(data_path(), name, download=True) for name in ("train", "unlabeled", "test")
    }
    return {name: (s.data.transpose(0, 2, 3, 1), s.labels) for name, s in sets.items()}


# the packed data sets of catalogue.DATASETS
READERS: dict[str, Callable[[], Arrays]] = {
    "digits": read_digits,
    "cifar10": read_cifar(torchvision.datasets.CIFAR10),
    "cifar100": read_cifar(torchvision.datasets.CIFAR100),
    "stl10": read_stl10,
}


# ---- arrays on disk ----


def packed_is_there(split: Path) -> bool:
    """Return whether the directory of a split holds both arrays."""
    return all((split / name).is_file() for name in ARRAY_FILES)


def pack(split: Path, images: np.ndarray, labels: np.ndarray) -> None:
    """Write the arrays of a split atomically.

    Raises:
        OSError: the directory of the split holds files, which are not deleted.
    """
    with atomic_folder(split) as unfinished:
        np.save(unfinished / "images.npy", np.ascontiguousarray(images, dtype=np.uint8))
        np.save(unfinished / "labels.npy", np.asarray(labels, dtype=np.int64))
        if split.is_dir():
            split.rmdir()


def arrays(split: Path) -> tuple[np.memmap, np.ndarray]:
    """Return the images [N, H, W, C] of a split, uint8 and memory-mapped, and their labels [N], int64.

    Raises:
        ValueError: a file is truncated, empty, or holds something else.
    """
    file = split / "images.npy"
    images = loaded(file, "r")
    labels = in_classes(loaded(split / "labels.npy"), split / "labels.npy")
    if images.dtype != np.uint8 or images.ndim != 4 or 0 in images.shape:
        raise ValueError(f"{file} holds {images.dtype} {images.shape}, not uint8 N x H x W x C. {REPACK}")
    if len(images) != len(labels):
        raise ValueError(f"{split} holds {len(images)} images but {len(labels)} labels. {REPACK}")
    return images, labels


def loaded(file: Path, mmap_mode: str | None = None) -> np.ndarray:
    try:
        array = np.load(file, mmap_mode=mmap_mode)
        if not isinstance(array, np.ndarray):
            raise ValueError("it is an archive")
        return array
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(
            f"{file} cannot be read as an array; it is truncated, or something else ({error}). {REPACK}"
        ) from error


class PackedImages(Dataset):
    """Data set of memory-mapped splits, one after the other, which reads a whole batch at once.

    Raises:
        ValueError: see `arrays`; or the images of two splits have different shapes.
    """

    def __init__(self, splits: list[Path]):
        self.images, labels = map(list, zip(*map(arrays, splits), strict=True))
        for split, images in zip(splits, self.images, strict=True):
            if images.shape[1:] != self.images[0].shape[1:]:
                raise ValueError(
                    f"{split / 'images.npy'} holds images of shape {images.shape[1:]}, and {splits[0]} holds images "
                    f"of shape {self.images[0].shape[1:]}. {REPACK}"
                )
        self.labels = np.concatenate(labels)
        self.starts = np.cumsum([0, *map(len, self.images)])  # position of the first image of each split
        self.places = np.arange(len(self.labels))  # positions of the images in use, counted through all splits

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, indices: np.ndarray) -> "PackedImages":
        """Return a data set of these images only, on the same files."""
        part = copy.copy(self)
        part.labels = self.labels[indices]
        part.places = self.places[indices]
        return part

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        images, labels = self.__getitems__([index])
        return images[0], labels[0]

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        """Return images, uint8 [N, C, H, W], and labels, int64 [N].

        PyTorch's loader calls this with the indices of a whole batch.
        """
        indices = np.asarray(indices)
        places = self.places[indices]
        part = np.searchsorted(self.starts, places, side="right") - 1
        batch = np.empty((len(places), *self.images[0].shape[1:]), dtype=np.uint8)
        for i, images in enumerate(self.images):
            batch[part == i] = images[places[part == i] - self.starts[i]]
            release_pages(images)
        return torch.from_numpy(batch).permute(0, 3, 1, 2), torch.from_numpy(self.labels[indices])


def release_pages(mapped: np.memmap) -> None:
    """Release the pages that were read from this process's memory; they stay in the system's cache.

    Otherwise the whole data set would become resident in one epoch.
    """
    if hasattr(mmap, "MADV_DONTNEED"):
        mapped._mmap.madvise(mmap.MADV_DONTNEED)


class ImagesOnDevice(Dataset):
    """Data set of packed images as one uint8 tensor on the device, where batches are selected without copies to it."""

    def __init__(self, packed: PackedImages, device: torch.device):
        shape = (len(packed), *packed.images[0].shape[1:])
        self.images = torch.empty(shape, dtype=torch.uint8, device=device)
        self.labels = torch.from_numpy(packed.labels).to(device)
        chunk = max(1, COPY_BYTES // self.images[0].nbytes)  # the whole set may not fit into the host's memory
        for indices in torch.arange(len(packed)).split(chunk):
            images, _ = packed.__getitems__(indices)
            self.images[indices[0] : indices[-1] + 1] = images.permute(0, 2, 3, 1).to(device)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, indices: Tensor | list[int]) -> tuple[Tensor, Tensor]:
        """Return images, uint8 [N, C, H, W], and labels, int64 [N], on the device."""
        indices = self.order(indices)
        return self.images[indices].permute(0, 3, 1, 2), self.labels[indices]

    def order(self, indices: Tensor | list[int]) -> Tensor:
        """Return indices as a tensor on the device."""
        return to_device(torch.as_tensor(indices), self.images.device)


def fits(packed: PackedImages, device: torch.device) -> bool:
    """Return whether there is room for all images on the device."""
    return has_room(len(packed) * packed.images[0][:1].nbytes, device)


def already_a_batch(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Return a batch of `PackedImages` unchanged: the loader's collate function."""
    return batch
