"""From a data set's name to a data set, of arrays or of files.

Data sets of one image size are packed once into `$DATA_PATH/<name>/<split>/images.npy` (uint8, N x H x W x C) and
`labels.npy` (int64), and memory-mapped. Data sets of image or video files are decoded and cropped in the loader's
workers. Both yield (uint8 images, labels); all other operations run on the device (views/augmentations.py).
"""

import math
import threading
from collections.abc import Callable, Iterable
from pathlib import Path

from attrs import frozen
from torch.utils.data import Dataset

from model_params import EncoderAndDataParams
from self_supervised.catalogue import DATASETS, ViewSettings
from self_supervised.data import custom, image_files, subsets, video_files
from self_supervised.data.class_labels import labels_text
from self_supervised.data.file_search import data_path
from self_supervised.data.files import Sample, class_numbers_of_split
from self_supervised.data.image_files import ImageFiles, samples_in_class_folders
from self_supervised.data.packed import ARRAY_FILES, READERS, PackedImages, pack, packed_is_there
from self_supervised.folder_lock import locked

PACKING = threading.Lock()  # for threads: the lock of a directory is for processes


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
    splits = sorted(splits or info.splits)
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
        for split in info.splits:  # all that are downloaded, not only the missing ones
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
        FILE_LAYOUTS[params.dataset.storage].samples(folder),
        params.dataset.channels,
        params.crop_size,
        list(views),
        params.seed or 0,
        params.unreadable_images == "skip",
        exif_orientation=params.exif_orientation,
    )
    if params.dataset.storage == "folders":
        train = folder.with_name("train")
        numbers = class_numbers_of_split(train if train.is_dir() else folder)
        images.class_names = sorted(numbers, key=numbers.get)
        if splits == params.dataset.train_splits:
            names = dict(enumerate(images.class_names))
            images.about_labels = labels_text({folder.name: images.files}, names, "class folders", "")
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
