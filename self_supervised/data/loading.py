"""From a data set to its loader: the size of a batch, the last batch of an epoch, and where the images are kept."""

import warnings
from typing import Any

import torch
from torch.utils.data import Dataset

from model_params import EncoderAndDataParams
from self_supervised import distributed
from self_supervised.data.batches import ResumableDataLoader, ResumableSampler
from self_supervised.data.image_files import ImageFiles, collate_crops
from self_supervised.data.packed import ImagesOnDevice, PackedImages, already_a_batch, fits
from self_supervised.data.packed_files import pack_files


def get_loader(
    params: EncoderAndDataParams,
    dataset: Dataset,
    training: bool,
    accumulated: int = 1,
    device: Any = "cpu",
    in_order: bool = False,
    processes: int | None = None,
) -> ResumableDataLoader:
    """Return a loader of batches of (images, labels).

    For training, images are shuffled by (seed, epoch). For evaluation, none is dropped, and files are shuffled as well:
    in the order of class folders, the first tenth of ImageNet (`limit_val_batches=0.1`) has a tenth of the classes.
    Packed data sets (arrays) need no workers, since reading a batch is a single copy of memory. Image files that were
    packed (`pack_images`) need none on a CPU: workers take longer to send crops than to make them, on cores that the
    training needs.

    Args:
        accumulated: batches per optimizer step, among which `global_batch_size` is divided.
        device: where a packed data set is kept, if `data_on_device` says so or, by default, if it fits.
        in_order: do not shuffle files for evaluation.
        processes: their number, if they have not started yet.

    Raises:
        ValueError: the settings do not fit the data set, or it has fewer images than one batch.
    """
    packed = isinstance(dataset, PackedImages)
    if params.data_on_device and not packed:
        raise ValueError(
            f"data_on_device=True: only built-in data sets can be kept on the device, and {params.dataset_name} "
            "consists of files. Leave it out."
        )
    if params.pack_images and isinstance(dataset, ImageFiles):
        pack_files(dataset, params.num_data_workers)
    device = torch.device(device)
    if packed and (fits(dataset, device) if params.data_on_device is None else params.data_on_device):
        dataset = ImagesOnDevice(dataset, device)
    processes = processes or distributed.world_size()
    size = images_per_batch(params, accumulated, processes)
    step = size * processes * (accumulated if training else 1)
    drop_last = training and should_drop_last(params.drop_last_batch, len(dataset), step)
    if drop_last:
        check_one_batch(params, len(dataset), size, processes)
    shuffle = training or not (packed or in_order)
    seed = params.seed or 0
    are_crops = isinstance(dataset, ImageFiles) and bool(dataset.views)
    without_workers = device.type == "cpu" and getattr(dataset, "packed_pixels", None) is not None
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


def no_loaders() -> list:
    """Return an empty list of validation loaders. Lightning warns of one; here, it is intended."""
    warnings.filterwarnings("ignore", "Total length of `list` across ranks is zero")
    return []


def check_one_batch(params: EncoderAndDataParams, n_images: int, size: int, processes: int) -> None:
    """Raise ValueError if there are fewer images than one batch of `size` on each process."""
    if n_images >= size * processes:
        return
    name = "batch_size" if params.global_batch_size is None else "global_batch_size"
    each = f" on each of {processes} processes" if processes > 1 else ""
    raise ValueError(
        f"{name}={getattr(params, name)}: the {n_images} {params.dataset.kind}s of {params.dataset_name} "
        f"are fewer than one batch of {size}{each}. Choose a smaller {name}, or drop_last_batch=None."
    )


def images_per_batch(params: EncoderAndDataParams, accumulated: int, processes: int | None = None) -> int:
    """Return the number of images per process and batch.

    Raises:
        ValueError: `global_batch_size` cannot be divided equally among processes and accumulated batches.
    """
    if params.global_batch_size is None:
        return params.batch_size
    processes = processes or distributed.world_size()
    shares = processes * accumulated
    if params.global_batch_size % shares:
        raise ValueError(
            f"global_batch_size={params.global_batch_size} is not divisible by {shares} = {processes} processes "
            f"x {accumulated} accumulated batches. Choose a multiple of {shares}."
        )
    return params.global_batch_size // shares
