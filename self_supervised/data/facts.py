"""Facts of the data that settings depend on: the statistics of its channels, and the number of its classes."""

from typing import TypeVar

import attrs
import numpy as np
from pytorch_lightning.utilities import rank_zero_info
from torch.utils.data import Dataset

from model_params import EncoderAndDataParams
from self_supervised.data import data_sets
from self_supervised.data.class_labels import class_names
from self_supervised.data.file_search import data_path
from self_supervised.data.files import UNREADABLE, class_numbers_of_split
from self_supervised.numerics import generator

IMAGES_FOR_STATISTICS = 2000  # images from which channel statistics are computed
SMALLEST_STD = 1 / 255  # lower bound of a channel's standard deviation, for channels that are constant

Params = TypeVar("Params", bound=EncoderAndDataParams)


def with_statistics(params: Params) -> Params:
    """Return the settings with image_mean and image_std of the training images, where these are None."""
    if params.image_mean is not None and params.image_std is not None:
        return params
    dataset = data_sets.get_dataset(params, params.dataset.pretraining_splits)
    statistics = channel_statistics(dataset, params.data_seed, -4 if params.dataset.of_videos else -3)
    mean, std = (list(params.per_channel(values)) for values in statistics)
    params = attrs.evolve(params, image_mean=params.image_mean or mean, image_std=params.image_std or std)
    rank_zero_info(f"{params.dataset_name}: image_mean={params.image_mean}, image_std={params.image_std}")
    return params


def channel_statistics(dataset: Dataset, seed: int, channel_axis: int = -3) -> tuple[list[float], list[float]]:
    """Return the mean and standard deviation of each channel, of values from 0 to 1.

    They are computed from at most IMAGES_FOR_STATISTICS readable images, drawn with `seed`, as an evaluation sees them:
    of files, the central squares.
    """
    chosen = np.sort(generator(seed).permutation(len(dataset))[:IMAGES_FOR_STATISTICS])
    n = 0  # pixels
    total = 0.0
    squares = 0.0
    for index in chosen.tolist():
        image, label = dataset[index]
        if np.any(np.asarray(label) == UNREADABLE):
            continue
        pixels = np.moveaxis(image.numpy(), channel_axis, 0).astype(np.float64) / 255
        pixels = pixels.reshape(len(pixels), -1)
        n += pixels.shape[1]
        total = total + pixels.sum(1)
        squares = squares + (pixels**2).sum(1)
    mean = total / n
    std = np.sqrt(np.maximum(squares / n - mean**2, 0))
    return mean.tolist(), np.maximum(std, SMALLEST_STD).tolist()


def n_classes(params: EncoderAndDataParams) -> int:
    """Return the number of classes, as `count_classes` does."""
    return count_classes(params)[0]


def count_classes(params: EncoderAndDataParams) -> tuple[int, list[str] | None]:
    """Return the number of classes of the training images (other splits have no others), 0 if they have no labels; and
    their names, None if these are not known.

    Classes of custom data sets, videos and class folders are counted, since subsets go by the same dataset_name
    (ImageNet-100, Kinetics-200, ...). If the data is not on disk, or is packed, the number is the catalogue's.
    """
    info = params.dataset
    (split,) = info.train_splits
    folder = data_path() / params.dataset_name / split
    if info.storage == "folders" and folder.is_dir():
        names = {number: name for name, number in class_numbers_of_split(folder).items()}
        return len(names), [names[number] for number in sorted(names)]
    if not info.is_custom and not (info.of_videos and data_sets.VIDEOS.are_there(folder)):
        return info.n_classes, info.class_names.split() or None
    dataset = data_sets.get_dataset(params, (split,))
    n = 1 + int(dataset.labels.max())
    names = class_names(params, dataset)
    return n, [names.get(number, str(number)) for number in range(n)] if names else None


def require_labels(classes: int, params: EncoderAndDataParams) -> int:
    """Return the number of classes.

    Raises:
        ValueError: images have no labels, or more than one each.
    """
    if params.dataset.multi_label:
        raise ValueError(
            f"dataset_name={params.dataset_name!r}: its images have multiple labels each, and a classifier needs one. "
            "Choose another data set, or leave the classifier out."
        )
    if classes < 1:
        raise ValueError(
            f"dataset_name={params.dataset_name!r}, data_path={params.data_path!r}: the images have no labels, which "
            "a classifier needs. Put them into class folders, or list labels in train.txt (docs/own_data.md)."
        )
    return classes
