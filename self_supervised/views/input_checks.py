"""Checks of the images that a loader yields: their type, their axes, and whether floats are normalized."""

from typing import Any

import torch
from pytorch_lightning.utilities import rank_zero_info
from torch import Tensor
from torch.utils._pytree import tree_leaves

from model_params import EncoderAndDataParams
from self_supervised.catalogue import BLUR_RADIUS, ViewSettings

# Limits of a batch of normalized float images, beyond which check_floats asks whether they are
HIGHEST_MEAN = 3.0  # of a channel: a black image has -2.1 with ImageNet's constants
HIGHEST_STD = 5.0  # of a channel
LOWEST_STD = 0.02  # of the channel that varies most
REPAIR = "Repair such images, or leave them out of the data set"


def check_pixels(images: Tensor, channels: int) -> None:
    """Raise ValueError unless `images` are uint8 images or clips with the channels that the encoder takes."""
    description = f"{images.dtype} {list(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
    if not isinstance(images, Tensor):
        raise ValueError(
            f"images={description}: not a tensor. Pass torch.as_tensor(images), or torch.stack(images) for a list of "
            "tensors of one size."
        )
    if images.dtype != torch.uint8:
        raise ValueError(
            f"images={description}: only uint8 tensors with values from 0 to 255 are normalized here. Convert values "
            "from 0 to 1 with (images * 255).round().to(torch.uint8). Pass normalized images to the encoder itself."
        )
    if images.dim() in (4, 5, 6):
        check_axes(images, channels, of_videos=images.dim() > 4)
    axis = images.dim() - {4: 3, 5: 4, 6: 4}.get(images.dim(), 0)
    if images.dim() not in (4, 5, 6) or images.shape[axis] not in sizes_of_c(images, channels):
        raise ValueError(
            f"images={description}: the encoder takes images [N, {channels}, H, W], or clips [N, {channels}, T, H, W]. "
            f"{way_to_axes(images, channels)}."
        )


def way_to_axes(images: Tensor, channels: int) -> str:
    """Return what to do about uint8 images of a wrong number of axes or channels."""
    sizes = sizes_of_c(images, channels)
    if images.dim() == 3 and images.shape[0] not in sizes and images.shape[2] not in sizes and 1 in sizes:
        return "Add the axis of the channels with images[:, None]"
    if images.dim() == 4 and not set(images.shape[1:]) & set(sizes):
        return f"Set in_channels={images.shape[1]} when you pretrain, or convert the images"
    return "Permute the axes, or add the first one with images[None]"


def sizes_of_c(images: Tensor, channels: int) -> tuple[int, ...]:
    """Return the sizes that the channel axis may have: gray uint8 images are repeated for RGB."""
    return (1, 3) if channels == 3 and images.dtype == torch.uint8 else (channels,)


def axes_of(images: Tensor, of_videos: bool) -> str:
    """Return a letter for each axis of a batch: NCHW or NCTHW; with V views or clips of each image, NVCHW or NVCTHW."""
    axes = "CTHW" if of_videos else "CHW"
    return ("NV" if images.dim() > len(axes) + 1 else "N") + axes


def check_axes(images: Tensor, channels: int, of_videos: bool) -> None:
    """Raise ValueError if the channels of images seem to be the last axis, or those of clips to come after the frames.

    If both axes may be the channels, the last one is taken for them if it is shorter than the axis before it.
    """
    axes = axes_of(images, of_videos)
    if len(axes) != images.dim():
        return
    sizes = sizes_of_c(images, channels)
    is_first = images.shape[axes.index("C")] in sizes
    last = axes.replace("C", "") + "C"
    for seen in (last, axes.replace("CT", "TC")):
        is_narrow = seen == last and images.shape[-1] < images.shape[-2]
        if seen != axes and images.shape[seen.index("C")] in sizes and (is_narrow or not is_first):
            order = [seen.index(axis) for axis in axes]
            of_one = ", ".join(str(i - 1) for i in order[1:])
            width = f" If W is {images.shape[-1]}, crop or pad the images." if is_first else ""
            raise ValueError(
                f"images={images.dtype} {list(images.shape)}: the axes seem to be {' x '.join(seen)}, but must be "
                f"{' x '.join(axes)}. Yield images.permute({str(order)[1:-1]}); of a single image, that is "
                f"permute({of_one}), of a NumPy array transpose({of_one}).{width}"
            )


def check_batch_images(images: Tensor | list[Tensor], params: EncoderAndDataParams) -> None:
    """Check the axes of a batch, and the values of float images, which are used without normalization.

    Raises:
        ValueError: the axes have another order, or the images are not what the encoder takes.
    """
    parts = images if isinstance(images, list) else [images]
    if isinstance(images, list) and images[0].dim() == 3:
        raise ValueError(
            f"images: a list of {len(images)} tensors with 3 axes, the first {list(images[0].shape)}. A list means "
            "views of the same images, [N, C, H, W] each. Resize images to one size and stack them: torch.stack(images)"
        )
    for part in parts:
        if part.dtype == torch.uint8:
            if part.dim() == 5 and not params.dataset.of_videos:
                raise ValueError(
                    f"images={part.dtype} {list(part.shape)}: stacked uint8 views are not supported. Yield a list of "
                    "views [N, C, H, W], or set dataset_name='kinetics' if these are clips [N, C, T, H, W]."
                )
            check_pixels(part, params.channels)
        else:
            check_axes(part, params.channels, params.dataset.of_videos)
    if len(parts) > (used := getattr(params, "n_views", len(parts))):
        rank_zero_info(
            f"warning: the loader yields {len(parts)} views of each image, of which {used} are used: set n_large_views "
            "and n_small_views"
        )
    lines = [check_floats(part, params) for part in parts if part.is_floating_point()]
    if line := next(filter(None, lines), ""):
        rank_zero_info(line)


def check_cropped(images: Tensor, view: ViewSettings) -> None:
    """Raise ValueError if uint8 images [N, C, H, W], cropped by the loader, are not square, or too small to blur."""
    height, width = images.shape[2:]
    if height != width:
        raise ValueError(
            f"uint8 views in a list must be square, not {height} x {width} pixels. Crop them in the loader, or yield "
            "one uint8 tensor, which is cropped here."
        )
    if height <= BLUR_RADIUS and view.blur_probability > 0:
        raise ValueError(f"views of {height} pixels are too small to be blurred. Set transform_apply_blur=False.")


def count_not_finite(batch: Any) -> int:
    """Return the number of images with pixels that are not finite in a batch of any format: in the worst view."""
    views = [part for part in tree_leaves(batch) if isinstance(part, Tensor) and part.dim() > 2]
    return max((int((~view.isfinite()).flatten(1).any(1).sum()) for view in views), default=0)


def check_floats(images: Tensor, params: EncoderAndDataParams) -> str:
    """Return a message if the values of float images do not seem to be normalized, else "".

    Raises:
        ValueError: values are not finite, or are pixels from 0 to 255.
    """
    if n := count_not_finite(images):
        raise ValueError(
            f"images={images.dtype} {list(images.shape)}: {n} of the images have pixels that are not finite. {REPAIR}."
        )
    low, high = float(images.min()), float(images.max())
    if low >= 0 and 1 < high <= 255 and bool((images == images.round()).all()):
        raise ValueError(
            f"images={images.dtype} with whole numbers from {low:g} to {high:g}: float images are not normalized here. "
            "Yield uint8 images, which are, or normalize them in the loader."
        )
    of_channels = images.detach().float().movedim(axes_of(images, params.dataset.of_videos).index("C"), 0).flatten(1)
    means, stds = of_channels.mean(1), of_channels.std(1)
    are_pixels = 0 <= low < high <= 1 and any(params.mean)
    if are_pixels or means.abs().max() > HIGHEST_MEAN or stds.max() > HIGHEST_STD or 0 < stds.max() < LOWEST_STD:
        mean, std = (", ".join(f"{value:.2g}" for value in values.tolist()) for values in (means, stds))
        return (
            f"the loader's float images do not seem to be normalized, and are not normalized here: values from "
            f"{low:.2g} to {high:.2g}, means of the channels {mean}, standard deviations {std}. Normalize them in the "
            f"loader (for values from 0 to 1 with image_mean={list(params.mean)} and image_std={list(params.std)}), or "
            "yield uint8 images."
        )
    return ""
