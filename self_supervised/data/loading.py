"""Name -> images and labels, sizes and constants, in one table.

Sets of one image size are packed once into `$DATA_PATH/<name>/<split>/images.npy` (uint8, N x H x W x C) and
`labels.npy` (int64), and memory-mapped from then on. Sets of files are decoded and cropped in the loader's workers.
Both yield (uint8 images, labels); everything else happens on the device (views/augmentations.py).
"""

from argparse import Namespace
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import attrs
import numpy as np
import torch
from attrs import frozen
from filelock import FileLock
from pytorch_lightning.utilities import rank_zero_info
from torch import nn
from torch.utils.data import Dataset

from model_params import EncoderAndDataParams
from self_supervised import distributed
from self_supervised.catalogue import DATASETS, OWN_MODULE, ViewSettings
from self_supervised.data import custom, image_files, video_files
from self_supervised.data.files import UNREADABLE, class_numbers_of_split
from self_supervised.data.image_files import ImageFiles, Sample, class_folders
from self_supervised.data.loader import ResumableDataLoader, ResumableSampler
from self_supervised.data.packed import (
    READERS,
    ImagesOnDevice,
    PackedImages,
    already_a_batch,
    data_path,
    fits,
    pack,
    packed_is_there,
)
from self_supervised.views.augmentations import generator

IMAGES_FOR_STATISTICS = 2000
SMALLEST_STD = 1 / 255  # of a channel that is the same everywhere


def of_images(dataset: Dataset, seed: int) -> tuple[list[float], list[float]]:
    """(means, deviations) of the values, from 0 to 1, of at most MOST_IMAGES whole images, drawn from `seed`. Images
    are as an evaluation sees them, in the data set's size: the central squares of files."""
    chosen = np.sort(generator(seed).permutation(len(dataset))[:IMAGES_FOR_STATISTICS])
    n, total, squares = 0, 0.0, 0.0
    for index in chosen.tolist():
        image, label = dataset[index]
        if np.any(np.asarray(label) == UNREADABLE):
            continue
        pixels = image.numpy().astype(np.float64) / 255  # [C, H, W]
        n += pixels[0].size
        total = total + pixels.sum((1, 2))
        squares = squares + (pixels**2).sum((1, 2))
    mean = total / n
    std = np.sqrt(np.maximum(squares / n - mean**2, 0))
    return mean.tolist(), np.maximum(std, SMALLEST_STD).tolist()


# ---- Name -> images and labels, sizes and constants, in one table ----


# ---- sets of files ----


@frozen
class Files:
    """How the images or videos of a split are found where they stay files."""

    are_there: Callable[[Path], bool]
    samples: Callable[[Path], list[Sample]] | None  # None: how videos are found, the settings say (data/video_files.py)
    layout: str  # for the error where they are not there


CLASS_FOLDERS = Files(Path.is_dir, class_folders, "with one folder of images per class")
VIDEOS = Files(
    video_files.videos_are_there, None, "with one folder of videos per class, or listed in a .csv of its name"
)
VOC_LISTS = Files(
    image_files.voc_is_there,
    image_files.voc_samples,
    "in VOCdevkit/VOC2007 beside it, with JPEGImages and ImageSets/Main",
)


FILES = {"folders": CLASS_FOLDERS, "videos": VIDEOS, "voc": VOC_LISTS}  # by DatasetInfo.storage


# ---- on disk ----


def prepare_data(name: str, splits: Iterable[str] = ()) -> None:
    """Make sure that splits of a data set (default: all) are on disk: download and pack them where they are not.

    One process does the work while others of the same machine wait at the lock. A split appears under its name only
    when it is complete, so a killed packing leaves nothing that looks like data.

    Raises:
        ValueError: DATA_PATH is a file.
        FileNotFoundError: says what was looked for, where, and what to do.
    """
    info, folder = DATASETS[name], data_path() / name
    if data_path().is_file():
        raise ValueError(f"DATA_PATH={data_path()} is a file: it must be the folder of the data sets")
    splits = sorted(splits or {*info.pretraining_splits, *info.train_splits, *info.test_splits})
    there = packed_is_there if info.is_packed else FILES[info.storage].are_there
    missing = [folder / split for split in splits if not there(folder / split)]
    if not missing:
        return
    wanted = f"{name} was looked for in {', '.join(map(str, missing))}"
    if not info.is_packed:
        way_out = "put it there, or set the environment variable DATA_PATH to the folder above."
        raise FileNotFoundError(f"{wanted}, each {FILES[info.storage].layout}, and is not there: {way_out}")
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"):
        missing = [path for path in missing if not packed_is_there(path)]  # others may have packed it meanwhile
        if not missing:
            return
        try:
            arrays = READERS[name]()
        except (OSError, RuntimeError) as error:
            raise FileNotFoundError(
                f"{wanted} (images.npy and labels.npy), is not there, and could not be downloaded ({error}): connect "
                "to the internet, or put the arrays there, or set the environment variable DATA_PATH to their folder."
            ) from error
        for split, content in arrays.items():  # all that came, wanted now or not: it was the download that took time
            if not packed_is_there(folder / split):
                pack(folder / split, *content)


# ---- for the modules above ----


def get_dataset(
    params: EncoderAndDataParams, splits: tuple[str, ...], views: list[ViewSettings] | tuple = ()
) -> Dataset:
    """uint8 images and labels of some splits, downloaded if need be. `views` are taken here only from sets of files."""
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
        return images
    (folder,) = folders
    if params.dataset.of_videos:
        return video_files.get_videos(params, folder, list(views))
    skip = params.unreadable_images == "skip"
    size, find = params.crop_size, FILES[params.dataset.storage].samples
    return ImageFiles(folder, params.dataset.channels, size, list(views), params.seed or 0, skip, find)


def check_arrays(images: PackedImages, params: EncoderAndDataParams, folders: list[Path]) -> None:
    """Raise ValueError for arrays of other images than those of the data set."""
    where, channels = ", ".join(map(str, folders)), images.images[0].shape[3]
    if channels not in (params.dataset.channels, params.channels):
        raise ValueError(
            f"{where}: images.npy has {channels} channels, and dataset_name={params.dataset_name!r} has "
            f"{params.dataset.channels}: put the arrays of that set there"
        )
    if (highest := int(images.labels.max())) >= params.dataset.n_classes:
        raise ValueError(
            f"{where}: labels.npy has the label {highest}, and dataset_name={params.dataset_name!r} has "
            f"{params.dataset.n_classes} classes: number them from 0 to {params.dataset.n_classes - 1}"
        )


def should_drop_last(wish: bool | None, n_images: int, size: int) -> bool:
    """None: a last batch of a few images is dropped, because its batch statistics would harm a network in train mode,
    but not one of at least half the images, and not the only one."""
    return wish if wish is not None else n_images >= size and n_images % size < size / 2


def get_loader(
    params: EncoderAndDataParams,
    dataset: Dataset,
    training: bool,
    accumulated: int = 1,
    device: Any = "cpu",
    in_order: bool = False,
) -> ResumableDataLoader:
    """Batches of (images, labels): shuffled by (seed, epoch) for training, else nothing is dropped.

    Packed sets need no workers: reading a batch is one copy of memory. Class folders are shuffled for evaluation too:
    in their order, the first tenth of ImageNet (`limit_val_batches=0.1`) would be a tenth of the classes.
    `in_order` keeps them in the order of the set.
    """
    packed = isinstance(dataset, PackedImages)
    if params.data_on_device and not packed:
        raise ValueError(
            f"data_on_device=True is for packed sets, and {params.dataset_name} is of image files: leave it out"
        )
    device = torch.device(device)
    if packed and (fits(dataset, device) if params.data_on_device is None else params.data_on_device):
        dataset = ImagesOnDevice(dataset, device)
    size, processes = batch_size(params, accumulated), distributed.world_size()
    drop_last = training and should_drop_last(params.drop_last_batch, len(dataset) // processes, size)
    if drop_last and len(dataset) < size * processes:
        which = "batch_size" if params.global_batch_size is None else "global_batch_size"
        found, each = f"{len(dataset)} {params.dataset.kind}", f" on each of {processes} processes" * (processes > 1)
        raise ValueError(
            f"{found} of {params.dataset_name} are fewer than one batch of {size}{each}: choose a smaller {which} (is "
            f"{getattr(params, which)}), or drop_last_batch=None"
        )
    shuffle = training or not (packed or in_order)
    return ResumableDataLoader(
        dataset,
        batch_size=size if training else max(1, size // params.clips_of_a_video),
        sampler=ResumableSampler(
            dataset, processes, distributed.rank(), shuffle, seed=params.seed or 0, drop_last=drop_last
        ),
        num_workers=0 if packed else params.num_data_workers,
        collate_fn=already_a_batch if packed else None,
        pin_memory=params.pin_data_memory and torch.cuda.is_available() and not isinstance(dataset, ImagesOnDevice),
        drop_last=drop_last,
    )


def batch_size(params: EncoderAndDataParams, accumulated: int) -> int:
    """Images of one process in one batch.

    Raises:
        ValueError: `global_batch_size` cannot be shared out equally.
    """
    if params.global_batch_size is None:
        return params.batch_size
    shares = distributed.world_size() * accumulated
    if params.global_batch_size % shares:
        raise ValueError(
            f"global_batch_size={params.global_batch_size} is not divisible by {shares} = {distributed.world_size()} "
            f"processes x {accumulated} accumulated batches: choose a multiple of {shares}"
        )
    return params.global_batch_size // shares


# ---- settings that the data decides ----

Params = TypeVar("Params", bound=EncoderAndDataParams)


def resolve(
    kind: type[Params], params: Params | dict | None, encoder: nn.Module | None, fields: dict[str, Any]
) -> tuple[Params, bool]:
    """`params` (settings, a dict of them, or None for the defaults), changed by `fields`; whether the seed was None.

    A module of the user's own as encoder says so in encoder_arch; seed=None becomes that of `pl.seed_everything`. The
    argument `hparams`, as the original named it, is another name of `params`.
    """
    if (hparams := fields.pop("hparams", None)) is not None:
        if params is not None:
            raise ValueError("hparams and params are two names of one argument: pass one of them")
        params = dict(vars(hparams)) if isinstance(hparams, Namespace) else hparams
    if encoder is not None:
        fields = {**fields, "encoder_arch": OWN_MODULE}
    params = kind(**params) if isinstance(params, dict) else params or kind()
    params = attrs.evolve(params, **fields)
    seed_is_drawn = params.seed is None
    if seed_is_drawn:
        params = attrs.evolve(params, seed=torch.initial_seed() % 2**32)
    return with_statistics(params) if params.compute_statistics else params, seed_is_drawn


def with_statistics(params: Params) -> Params:
    """image_mean and image_std, where they are None, are those of the training images."""
    if params.image_mean is not None and params.image_std is not None:
        return params
    dataset = get_dataset(params, params.dataset.pretraining_splits)
    found = of_images(dataset, params.data_seed)
    mean, std = (list(params.of_each_channel(values)) for values in found)
    params = attrs.evolve(params, image_mean=params.image_mean or mean, image_std=params.image_std or std)
    rank_zero_info(f"{params.dataset_name}: image_mean={params.image_mean}, image_std={params.image_std}")
    return params


def n_classes(params: EncoderAndDataParams) -> int:
    """Number of classes in the training images: other splits have no others. 0 where they have no labels.

    Counted in images of the user's, in videos and in class folders, since there are sets of other sizes under one name
    (ImageNet-100, Kinetics-200, ...). The catalogue says how many there are where they are not on disk.
    """
    info, (split,) = params.dataset, params.dataset.train_splits
    folder = data_path() / params.dataset_name / split
    if info.storage == "folders" and folder.is_dir():
        return len(set(class_numbers_of_split(folder).values()))
    if not info.is_custom and not (info.of_videos and VIDEOS.are_there(folder)):
        return info.n_classes
    return 1 + int(get_dataset(params, (split,)).labels.max())


def require_labels(classes: int, params: EncoderAndDataParams) -> int:
    """Refuses images without labels, and those with several."""
    if params.dataset.many_labels:
        raise ValueError(
            f"dataset_name={params.dataset_name!r}: its images have several labels each, and a classifier needs one. "
            "Choose another data set, or leave the classifier out."
        )
    if classes < 1:
        raise ValueError(
            f"the images of dataset_name={params.dataset_name!r}, data_path={params.data_path!r} have no labels, which "
            "a classifier needs: put them into class folders, or list labels in train.txt (docs/own_data.md)"
        )
    return classes
