"""Where the arrays of packed data sets come from: read from scikit-learn, or downloaded by torchvision."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torchvision
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

Arrays = dict[str, tuple[np.ndarray, np.ndarray]]  # split -> images, labels


def data_path() -> Path:
    """The environment variable DATA_PATH (`~` is expanded), or ./data."""
    return Path(os.environ.get("DATA_PATH", "data")).expanduser()


def read_digits() -> Arrays:
    """scikit-learn's 1,797 scans of handwritten digits, 8 x 8 x 1: 1,297 for training, 500 to test."""
    digits = load_digits()
    images = np.round(digits.images / 16 * 255)[..., None]
    parts = train_test_split(images, digits.target, test_size=500, stratify=digits.target, random_state=0)
    return {"train": (parts[0], parts[2]), "test": (parts[1], parts[3])}


def read_cifar(source: type) -> Callable[[], Arrays]:
    def read() -> Arrays:
        sets = {name: source(data_path(), train=name == "train", download=True) for name in ("train", "test")}
        return {name: (s.data, s.targets) for name, s in sets.items()}

    return read


def read_stl10() -> Arrays:
    sets = {
        name: torchvision.datasets.STL10(data_path(), name, download=True) for name in ("train", "unlabeled", "test")
    }
    return {name: (s.data.transpose(0, 2, 3, 1), s.labels) for name, s in sets.items()}


READERS: dict[str, Callable[[], Arrays]] = {
    "digits": read_digits,
    "cifar10": read_cifar(torchvision.datasets.CIFAR10),
    "cifar100": read_cifar(torchvision.datasets.CIFAR100),
    "stl10": read_stl10,
}  # of the packed data sets of catalogue.DATASETS
