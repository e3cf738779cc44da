"""Name -> images and labels, sizes and constants, in one table.

Sets of one image size are packed once into `$DATA_PATH/<name>/<split>/images.npy` (uint8, N x H x W x C) and
`labels.npy` (int64), and memory-mapped from then on. Sets of files are decoded and cropped in the loader's workers.
Both yield (uint8 images, labels); everything else happens on the device (augmentations.py).
"""

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torchvision
from attrs import field, frozen
from filelock import FileLock
from torch import Tensor
from torch.utils.data import Dataset

import ddp
import own_images
import video_files
import voc
from augmentations import View
from image_files import ImageFiles, Sample, class_folders
from loader import Loader, Share
from optimizers import batch_size
from packed_images import ImagesOnDevice, PackedImages, fits, is_there, pack
from packed_sources import Arrays, data_path, read_cifar, read_digits, read_stl10

if TYPE_CHECKING:
    from model_params import EncoderAndDataParams

# ---- the table ----


@frozen
class Files:
    """How the images or videos of a split are found where they stay files."""

    are_there: Callable[[Path], bool]
    samples: Callable[[Path], list[Sample]] | None  # None: how videos are found, the settings say (video_files.py)
    layout: str  # for the error where they are not there


CLASS_FOLDERS = Files(Path.is_dir, class_folders, "with one folder of images per class")
VIDEOS = Files(video_files.are_there, None, "with one folder of videos per class, or listed in a .csv of its name")
VOC_LISTS = Files(voc.is_there, voc.samples, "in VOCdevkit/VOC2007 beside it, with JPEGImages and ImageSets/Main")


@frozen
class DatasetInfo:
    """`read` is None where the images stay files. Splits are folders (or lists) below `$DATA_PATH/<name>`."""

    crop_size: int
    n_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    read: Callable[[], Arrays] | None
    pretraining_splits: tuple[str, ...] = ("train",)
    train_splits: tuple[str, ...] = ("train",)  # labelled
    test_splits: tuple[str, ...] = ("test",)
    files: Files = CLASS_FOLDERS  # where read is None
    own: Callable[..., Dataset] | None = None  # instead: the user's images, from (DATA_PATH, settings, split, views)
    validation_splits: tuple[str, ...] | None = None  # while pretraining; None: test_splits
    many_labels: bool = False  # of an image: presences [K] of all classes, 1, -1 or 0, and not one class
    view: View = field(factory=View)  # training views, where the settings do not say otherwise
    class_names: str = ""  # of a packed set, in the order of their numbers; "": the numbers

    @property
    def channels(self) -> int:
        return len(self.mean)

    def feeds(self, channels: int) -> bool:
        """Whether an encoder of so many channels can take the images: gray ones are repeated for one of colors."""
        return self.own is not None or self.channels == channels or (self.channels, channels) == (1, 3)

    @property
    def of_videos(self) -> bool:
        return self.read is None and self.files is VIDEOS

    @property
    def counts_folders(self) -> bool:
        """Whether classes are folders of images, and as many as there are folders."""
        return self.read is None and self.files is CLASS_FOLDERS and self.own is None

    @property
    def kind(self) -> str:
        return "videos" if self.of_videos else "images"


DIGIT_VIEW = View(  # a mirrored digit is another one, and has no colour; blurred at 8 x 8 it is a spot
    crop_scale=(0.4, 1.0), jitter_probability=0.0, grayscale_probability=0.0, flip_probability=0.0, blur_probability=0.0
)
CLIP_VIEW = View(crop_scale=(0.2, 0.766), crop_ratio=(0.75, 1.3333))  # SCE for video: the area of CVRL's crops
CIFAR10, CIFAR100 = torchvision.datasets.CIFAR10, torchvision.datasets.CIFAR100
IMAGENET_MEAN, IMAGENET_STD, TRAINVAL = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), ("trainval",)
OfFiles = partial(DatasetInfo, 224, mean=IMAGENET_MEAN, std=IMAGENET_STD, read=None)

DATASETS = {
    "digits": DatasetInfo(8, 10, (0.3053,), (0.3760,), read_digits, view=DIGIT_VIEW),
    "cifar10": DatasetInfo(
        32,
        10,
        (0.4914, 0.4822, 0.4465),
        (0.2470, 0.2435, 0.2616),
        read_cifar(CIFAR10),
        class_names="airplane automobile bird cat deer dog frog horse ship truck",
    ),
    "cifar100": DatasetInfo(32, 100, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762), read_cifar(CIFAR100)),
    "stl10": DatasetInfo(
        96,
        10,
        (0.4406, 0.4273, 0.3858),
        (0.2603, 0.2566, 0.2713),
        read_stl10,
        pretraining_splits=("train", "unlabeled"),
        class_names="airplane bird car cat deer dog horse monkey ship truck",
    ),
    "imagenet": OfFiles(n_classes=1000, test_splits=("val",)),
    "voc07": OfFiles(
        n_classes=20, pretraining_splits=TRAINVAL, train_splits=TRAINVAL, files=VOC_LISTS, many_labels=True
    ),
    "folder": OfFiles(n_classes=0, own=own_images.get_images, validation_splits=("val",)),
    "kinetics": OfFiles(
        n_classes=400, mean=(0.45,) * 3, std=(0.225,) * 3, test_splits=("val",), files=VIDEOS, view=CLIP_VIEW
    ),
}


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
    there = info.files.are_there if info.read is None else is_there
    missing = [folder / split for split in splits if not there(folder / split)]
    if not missing:
        return
    wanted = f"{name} was looked for in {', '.join(map(str, missing))}"
    if info.read is None:
        way_out = "put it there, or set the environment variable DATA_PATH to the folder above."
        raise FileNotFoundError(f"{wanted}, each {info.files.layout}, and is not there: {way_out}")
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"):
        missing = [path for path in missing if not is_there(path)]  # others may have packed it meanwhile
        if not missing:
            return
        try:
            arrays = info.read()
        except (OSError, RuntimeError) as error:
            raise FileNotFoundError(
                f"{wanted} (images.npy and labels.npy), is not there, and could not be downloaded ({error}): connect "
                "to the internet, or put the arrays there, or set the environment variable DATA_PATH to their folder."
            ) from error
        for split, content in arrays.items():  # all that came, wanted now or not: it was the download that took time
            if not is_there(folder / split):
                pack(folder / split, *content)


# ---- for the modules above ----


def already_a_batch(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return batch


def get_dataset(params: "EncoderAndDataParams", splits: tuple[str, ...], views: list[View] | tuple = ()) -> Dataset:
    """uint8 images and labels of some splits, downloaded if need be. `views` are taken here only from sets of files."""
    if not params.dataset.feeds(params.channels):
        raise ValueError(
            f"in_channels={params.channels} does not fit dataset_name={params.dataset_name!r}, whose images have "
            f"{params.dataset.channels} channels. Leave it out, or choose another data set."
        )
    if params.dataset.own is not None:
        return params.dataset.own(data_path(), params, splits[0], list(views))
    prepare_data(params.dataset_name, splits)
    folders = [data_path() / params.dataset_name / split for split in splits]
    if params.dataset.read is not None:
        images = PackedImages(folders)
        check_arrays(images, params, folders)
        return images
    (folder,) = folders
    if params.dataset.of_videos:
        return video_files.get_videos(params, folder, list(views))
    skip = params.unreadable_images == "skip"
    size, find = params.crop_size, params.dataset.files.samples
    return ImageFiles(folder, params.dataset.channels, size, list(views), params.seed or 0, skip, find)


def check_arrays(images: PackedImages, params: "EncoderAndDataParams", folders: list[Path]) -> None:
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


def drops_last(wish: bool | None, n_images: int, size: int) -> bool:
    """None: a last batch of a few images is dropped, because its batch statistics would harm a network in train mode,
    but not one of at least half the images, and not the only one."""
    return wish if wish is not None else n_images >= size and n_images % size < size / 2


def get_loader(
    params: "EncoderAndDataParams",
    dataset: Dataset,
    training: bool,
    accumulated: int = 1,
    device: Any = "cpu",
    in_order: bool = False,
) -> Loader:
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
    size, processes = batch_size(params, accumulated), ddp.world_size()
    drop_last = training and drops_last(params.drop_last_batch, len(dataset) // processes, size)
    if drop_last and len(dataset) < size * processes:
        which = "batch_size" if params.global_batch_size is None else "global_batch_size"
        found, each = f"{len(dataset)} {params.dataset.kind}", f" on each of {processes} processes" * (processes > 1)
        raise ValueError(
            f"{found} of {params.dataset_name} are fewer than one batch of {size}{each}: choose a smaller {which} (is "
            f"{getattr(params, which)}), or drop_last_batch=None"
        )
    shuffle = training or not (packed or in_order)
    return Loader(
        dataset,
        batch_size=size if training else max(1, size // params.clips_of_a_video),
        sampler=Share(dataset, processes, ddp.rank(), shuffle, seed=params.seed or 0, drop_last=drop_last),
        num_workers=0 if packed else params.num_data_workers,
        collate_fn=already_a_batch if packed else None,
        pin_memory=params.pin_data_memory and torch.cuda.is_available() and not isinstance(dataset, ImagesOnDevice),
        drop_last=drop_last,
    )
