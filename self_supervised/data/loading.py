"""From a data set's name to a data set and its loader, and the settings that depend on the data.

Data sets of one image size are packed once into `$DATA_PATH/<name>/<split>/images.npy` (uint8, N x H x W x C) and
`labels.npy` (int64), and memory-mapped. Data sets of image or video files are decoded and cropped in the loader's
workers. Both yield (uint8 images, labels); all other operations run on the device (views/augmentations.py).
"""

import math
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import attrs
import numpy as np
import torch
from attrs import frozen
from pytorch_lightning.utilities import rank_zero_info
from torch.utils.data import Dataset

from model_params import EncoderAndDataParams
from self_supervised import distributed
from self_supervised.catalogue import DATASETS, ViewSettings
from self_supervised.data import custom, image_files, subsets, video_files
from self_supervised.data.class_labels import class_names, labels_line
from self_supervised.data.files import UNREADABLE, Sample, class_numbers_of_split
from self_supervised.data.image_files import ImageFiles, collate_crops, samples_in_class_folders
from self_supervised.data.loader import ResumableDataLoader, ResumableSampler
from self_supervised.data.packed import (
    ARRAY_FILES,
    READERS,
    ImagesOnDevice,
    PackedImages,
    already_a_batch,
    data_path,
    fits,
    pack,
    packed_is_there,
)
from self_supervised.data.packed_files import pack_files
from self_supervised.folder_lock import locked
from self_supervised.views.augmentations import generator

IMAGES_FOR_STATISTICS = 2000  # images from which channel statistics are computed
PACKING = threading.Lock()  # for threads: the lock of a directory is for processes
SMALLEST_STD = 1 / 255  # lower bound of a channel's standard deviation, for channels that are constant

Params = TypeVar("Params", bound=EncoderAndDataParams)


# ---- layouts of data sets of files ----


@frozen
class FileLayout:
    """Layout of a split that is stored as files: how its images or videos are found."""

    are_there: Callable[[Path], bool]
    samples: Callable[[Path], list[Sample]] | None  # None: videos, which are found as the settings say (video_files.py)
    layout: str  # for the message if they are missing


CLASS_FOLDERS = FileLayout(Path.is_dir, samples_in_class_folders, "with one folder of images per class")
VIDEOS = FileLayout(
    video_files.videos_are_there, None, "with one folder of videos per class, or listed in a .csv of its name"
)
VOC_LISTS = FileLayout(
    image_files.voc_is_there,
    image_files.voc_samples,
    "in VOCdevkit/VOC2007 next to it, with JPEGImages and ImageSets/Main",
)
FILE_LAYOUTS = {"folders": CLASS_FOLDERS, "videos": VIDEOS, "voc": VOC_LISTS}  # DatasetInfo.storage -> layout


# ---- data sets ----


def prepare_data(name: str, splits: Iterable[str] = ()) -> None:
    """Download and pack splits of a data set (default: all), unless they are on disk.

    One process does the work while others of the same machine wait at the lock. A split appears under its name only
    when it is complete, so that an interrupted run leaves nothing that looks like data.

    Raises:
        ValueError: DATA_PATH is a file, or a split is a directory of other files.
        FileNotFoundError: a split is neither on disk nor can it be downloaded.
    """
    info = DATASETS[name]
    folder = data_path() / name
    if data_path().is_file():
        raise ValueError(f"DATA_PATH={data_path()} is a file. Set it to the directory of the data sets.")
    every = {*info.pretraining_splits, *info.train_splits, *info.test_splits}
    splits = sorted(splits or every)
    is_there = packed_is_there if info.is_packed else FILE_LAYOUTS[info.storage].are_there
    missing = [folder / split for split in splits if not is_there(folder / split)]
    if not missing:
        return
    wanted = f"dataset_name={name!r} is not in {', '.join(map(str, missing))}"
    if not info.is_packed:
        raise FileNotFoundError(
            f"{wanted}, each {FILE_LAYOUTS[info.storage].layout}. Put it there, or set the environment variable "
            f"DATA_PATH to the directory that holds {name}."
        )
    with PACKING, locked(folder, wait=math.inf):
        # another process may have packed it meanwhile
        missing = [path for path in missing if not packed_is_there(path)]
        if not missing:
            return
        for split in sorted(every):  # all that are downloaded, not only the missing ones
            refuse_other_files(name, folder / split)
        try:
            arrays = READERS[name]()
        except (OSError, RuntimeError) as error:
            raise FileNotFoundError(
                f"{wanted} (images.npy and labels.npy), and could not be downloaded ({error}). Connect to the "
                "internet, put the arrays there, or set the environment variable DATA_PATH to the directory that holds "
                f"{name}."
            ) from error
        for split, content in arrays.items():  # keep every split: downloading was the expensive part
            if not packed_is_there(folder / split):
                pack(folder / split, *content)


def refuse_other_files(name: str, split: Path) -> None:
    """Raise ValueError if files are where a split of the data set `name` would be written."""
    if packed_is_there(split):
        return
    files = {file.name for file in split.glob("*")}
    others = sorted(files - set(ARRAY_FILES))
    if files and not others:
        raise ValueError(
            f"dataset_name={name!r}: {split} has only {files.pop()}. Add the other array (label -1: none), or "
            "move the file to download the data set."
        )
    if others:
        raise ValueError(
            f"dataset_name={name!r}: {split} holds other files than images.npy and labels.npy, such as {others[0]}. To "
            f"use these images, pass dataset_name='folder' and data_path={str(split.parent)!r}. To use {name}, which "
            "is written there, move them, or set the environment variable DATA_PATH to another directory."
        )


def get_dataset(
    params: EncoderAndDataParams, splits: tuple[str, ...], views: list[ViewSettings] | tuple = ()
) -> Dataset:
    """Return the data set of some splits, (uint8 image, label) each, which is downloaded if it is not on disk.

    Args:
        views: random crops that data sets of files take themselves; packed ones ignore them.

    Raises:
        ValueError: the data does not fit the settings.
        FileNotFoundError: see `prepare_data`.
    """
    if not params.dataset.feeds(params.channels):
        raise ValueError(
            f"in_channels={params.channels} does not fit dataset_name={params.dataset_name!r}, whose images have "
            f"{params.dataset.channels} channels. Leave it out, or choose another data set."
        )
    if params.dataset.is_custom:
        return custom.get_images(data_path(), params, splits[0], list(views))
    prepare_data(params.dataset_name, splits)
    folders = [data_path() / params.dataset_name / split for split in splits]
    if params.dataset.is_packed:
        images = PackedImages(folders)
        check_arrays(images, params, folders)
        training = set(splits) & {*params.dataset.pretraining_splits, *params.dataset.train_splits}
        if training and params.data_fraction < 1:
            classes = images.labels - images.labels.min()  # unlabeled images (-1) are a class, too
            images = images.subset(subsets.stratified(classes, fraction=params.data_fraction, seed=params.data_seed))
        return images
    (folder,) = folders
    if params.dataset.of_videos:
        return video_files.get_videos(params, folder, list(views))
    images = ImageFiles(
        folder,
        params.dataset.channels,
        params.crop_size,
        list(views),
        params.seed or 0,
        params.unreadable_images == "skip",
        FILE_LAYOUTS[params.dataset.storage].samples,
        exif_orientation=params.exif_orientation,
    )
    if params.dataset.storage == "folders":
        train = folder.with_name("train")
        numbers = class_numbers_of_split(train if train.is_dir() else folder)
        images.class_names = sorted(numbers, key=numbers.get)
        if splits == params.dataset.train_splits:
            names = dict(enumerate(images.class_names))
            images.about_labels = labels_line({folder.name: images.files}, names, "class folders", "")
    return images


def check_arrays(images: PackedImages, params: EncoderAndDataParams, folders: list[Path]) -> None:
    """Raise ValueError if the arrays in `folders` cannot be those of the data set."""
    where = ", ".join(map(str, folders))
    channels = images.images[0].shape[3]
    if channels not in (params.dataset.channels, params.channels):
        raise ValueError(
            f"dataset_name={params.dataset_name!r} has {params.dataset.channels} channels, but images.npy in {where} "
            f"has {channels} channels. Put the arrays of this data set there."
        )
    if (highest := int(images.labels.max())) >= params.dataset.n_classes:
        raise ValueError(
            f"dataset_name={params.dataset_name!r} has {params.dataset.n_classes} classes, but labels.npy in {where} "
            f"has the label {highest}. Number classes from 0 to {params.dataset.n_classes - 1}."
        )


# ---- loaders ----


def get_loader(
    params: EncoderAndDataParams,
    dataset: Dataset,
    training: bool,
    accumulated: int = 1,
    device: Any = "cpu",
    in_order: bool = False,
) -> ResumableDataLoader:
    """Return a loader of batches of (images, labels).

    For training, images are shuffled by (seed, epoch). For evaluation, none is dropped, and files are shuffled as well:
    in the order of class folders, the first tenth of ImageNet (`limit_val_batches=0.1`) has a tenth of the classes.
    Packed data sets need no workers, since reading a batch is a single copy of memory. Packed files need none on a CPU:
    workers take longer to send crops than to make them, on cores that the training needs.

    Args:
        accumulated: batches per optimizer step, among which `global_batch_size` is divided.
        device: where a packed data set is kept, if `data_on_device` says so or, by default, if it fits.
        in_order: do not shuffle files for evaluation.

    Raises:
        ValueError: the settings do not fit the data set, or it has fewer images than one batch.
    """
    packed = isinstance(dataset, PackedImages)
    if params.data_on_device and not packed:
        raise ValueError(
            f"data_on_device=True: only packed data sets can be kept on the device, and {params.dataset_name} consists "
            "of files. Leave it out."
        )
    if params.pack_images and isinstance(dataset, ImageFiles):
        pack_files(dataset, params.num_data_workers)
    device = torch.device(device)
    if packed and (fits(dataset, device) if params.data_on_device is None else params.data_on_device):
        dataset = ImagesOnDevice(dataset, device)
    size, processes = images_per_batch(params, accumulated), distributed.world_size()
    step = size * processes * (accumulated if training else 1)
    drop_last = training and should_drop_last(params.drop_last_batch, len(dataset), step)
    if drop_last:
        check_one_batch(params, len(dataset), size)
    shuffle = training or not (packed or in_order)
    seed = params.seed or 0
    are_crops = isinstance(dataset, ImageFiles) and bool(dataset.views)
    without_workers = device.type == "cpu" and getattr(dataset, "packed", None) is not None
    return ResumableDataLoader(
        dataset,
        batch_size=size if training else max(1, size // params.clips_of_a_video),
        sampler=ResumableSampler(
            dataset, processes, distributed.rank(), shuffle, seed, drop_last, step=step, same_order=not training
        ),
        num_workers=0 if packed or without_workers else params.num_data_workers,
        collate_fn=already_a_batch if packed else collate_crops if are_crops else None,
        pin_memory=params.pin_data_memory and torch.cuda.is_available() and not isinstance(dataset, ImagesOnDevice),
        drop_last=drop_last,
        of_dataset_name=True,
    )


def should_drop_last(setting: bool | None, n_images: int, step: int) -> bool:
    """Return whether the last, incomplete optimizer step of `step` images is dropped: `setting`, if it is not None.

    By default it is dropped if it has less than half of its images, because their batch statistics would harm the
    training, unless it is the only step.
    """
    return setting if setting is not None else n_images >= step and n_images % step < step / 2


def check_one_batch(params: EncoderAndDataParams, n_images: int, size: int) -> None:
    """Raise ValueError if there are fewer images than one batch of `size` on each process."""
    processes = distributed.world_size()
    if n_images >= size * processes:
        return
    name = "batch_size" if params.global_batch_size is None else "global_batch_size"
    each = f" on each of {processes} processes" if processes > 1 else ""
    raise ValueError(
        f"{name}={getattr(params, name)}: the {n_images} {params.dataset.kind} of {params.dataset_name} "
        f"are fewer than one batch of {size}{each}. Choose a smaller {name}, or drop_last_batch=None."
    )


def images_per_batch(params: EncoderAndDataParams, accumulated: int) -> int:
    """Return the number of images per process and batch.

    Raises:
        ValueError: `global_batch_size` cannot be divided equally among processes and accumulated batches.
    """
    if params.global_batch_size is None:
        return params.batch_size
    shares = distributed.world_size() * accumulated
    if params.global_batch_size % shares:
        raise ValueError(
            f"global_batch_size={params.global_batch_size} is not divisible by {shares} = {distributed.world_size()} "
            f"processes x {accumulated} accumulated batches. Choose a multiple of {shares}."
        )
    return params.global_batch_size // shares


# ---- settings that depend on the data ----


def with_statistics(params: Params) -> Params:
    """Return the settings with image_mean and image_std of the training images, where these are None."""
    if params.image_mean is not None and params.image_std is not None:
        return params
    dataset = get_dataset(params, params.dataset.pretraining_splits)
    statistics = channel_statistics(dataset, params.data_seed, -4 if params.dataset.of_videos else -3)
    mean, std = (list(params.of_each_channel(values)) for values in statistics)
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
    if not info.is_custom and not (info.of_videos and VIDEOS.are_there(folder)):
        return info.n_classes, info.class_names.split() or None
    dataset = get_dataset(params, (split,))
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
