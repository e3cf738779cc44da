"""Data set of image files: found in class folders or by PASCAL VOC's lists, decoded, and cropped in loader workers.

PASCAL VOC 2007 has the layout of its archives: $DATA_PATH/voc07/VOCdevkit/VOC2007, with JPEGImages and ImageSets/Main.
"""

import math
import os
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.nn.functional import interpolate
from torch.utils.data import default_collate

from model_params import EncoderAndDataParams
from self_supervised.catalogue import ViewSettings
from self_supervised.data.array_files import (
    TIFF_SUFFIXES,
    WAY_OUT,
    check_range,
    is_array,
    opened_image,
    read_array,
    scaled_to_8_bits,
    suffix_of,
    to_upright,
    transposed,
)
from self_supervised.data.file_search import PassedOver, files_below, image_suffixes, log_counts
from self_supervised.data.files import File, LabeledFiles, OnDisk, Sample, class_numbers_of_split
from self_supervised.numerics import generator

CENTRAL = 7 / 8  # fraction of the shorter side that an evaluation sees
REDUCED_MARGIN = 1.25  # smallest ratio of a crop's side at reduced scale to its view's side, see ImageFiles
SWAP_SIDES = {Image.Transpose[name] for name in ("TRANSPOSE", "TRANSVERSE", "ROTATE_90", "ROTATE_270")}
Box = tuple[int, int, int, int]  # left, top, right, bottom
VOC_CLASSES = [
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
]


# ---- class folders ----


def samples_in_class_folders(split: Path) -> list[Sample]:
    """Return (path, class number) of the images in the class folders of a split; see `class_numbers_of_split`.

    Raises:
        ValueError: there are no images, a class has none, or the split has classes that train lacks.
    """
    passed_over = PassedOver()
    numbers = class_numbers_of_split(split)
    of_class = images_in_class_folders(split, numbers, image_suffixes(), passed_over)
    empty = [name for name, paths in of_class.items() if not paths]
    if empty or not of_class:
        none = f"{', '.join(empty[:5])} holds no images" if empty else "there are no folders"
        raise ValueError(f"{split} must hold one folder of images per class, but {none}{passed_over}")
    samples = [(os.path.join(split, path), numbers[name]) for name, paths in of_class.items() for path in paths]
    log_counts(split, len(samples), "images", passed_over)
    return samples


def images_in_class_folders(
    split: Path, names: Iterable[str], suffixes: Collection[str], passed_over: PassedOver
) -> dict[str, list[str]]:
    """Return class -> its files, as paths below `split`, sorted by directory and name.

    Args:
        names: the class folders.
        suffixes: file extensions.
    """
    of_class: dict[str, list[str]] = {name: [] for name in names}
    for path in files_below(split, suffixes, passed_over):
        name = path.split("/", 1)[0]
        if name in of_class:
            of_class[name].append(path)
        else:
            passed_over.add("outside the class folders", path)
    return {name: sorted(paths, key=lambda path: path.rpartition("/")) for name, paths in of_class.items()}


# ---- PASCAL VOC ----


def voc_lists(split: Path) -> list[Path]:
    """Return the files with the labels of each class for a split, such as $DATA_PATH/voc07/trainval.

    This path only names the split; there is no such directory.
    """
    main = split.parent / "VOCdevkit" / "VOC2007" / "ImageSets" / "Main"
    return [main / f"{name}_{split.name}.txt" for name in VOC_CLASSES]


def voc_is_there(split: Path) -> bool:
    return all(path.is_file() for path in voc_lists(split))


def voc_samples(split: Path) -> list[tuple[str, np.ndarray]]:
    """Return (path, labels [20]) of the images. A label is 1 (class present), -1 (absent) or 0 (difficult).

    Raises:
        ValueError: the lists of the classes have different images, or hold something else.
    """
    names = None
    columns = []
    for path in voc_lists(split):
        rows = [line.split() for line in path.read_text().splitlines() if line.strip()]
        if not rows or any(len(row) != 2 or row[1] not in ("-1", "0", "1") for row in rows):
            raise ValueError(f"{path} must hold the name of an image and -1, 0 or 1 in each line. Unpack it again.")
        names = names or [name for name, _ in rows]
        if names != [name for name, _ in rows]:
            raise ValueError(f"{path} lists other images than {voc_lists(split)[0].name}. Unpack both again.")
        columns.append([int(label) for _, label in rows])
    images = split.parent / "VOCdevkit" / "VOC2007" / "JPEGImages"
    log_counts(voc_lists(split)[0].parent, len(names), f"images of {split.name}", PassedOver())
    return [(str(images / f"{name}.jpg"), row) for name, row in zip(names, np.array(columns).T, strict=True)]


# ---- data set ----


class ImageFiles(LabeledFiles):
    """Data set of image files.

    With views, an item is one random resized crop per view, drawn from (seed, epoch, index). Without views, it is the
    central square: the shorter side is resized to 8/7 of `size`, and the center is cropped.

    A JPEG is decoded at 1/2, 1/4 or 1/8 of its size if each side of every crop then still has 1.25 times the pixels of
    its view (with views of 224 pixels, from crops of 560 pixels on). This changes views in two ways. The highest
    frequencies are dropped before the antialiased resizing instead of by it, a difference of 1 to 2 of 255 gray levels
    on average, about that between bicubic and bilinear. Corners of crops are rounded to the reduced pixels; if an image
    is turned upright, they may be off by one more. The central square is always taken from the full image.

    Args:
        root: directory of the images.
        samples: (path, label) of each image.
        size: side of the central square in pixels.
        skip_unreadable: replace an image that cannot be read with the next readable one, instead of raising.
        pixel_range: see array_files.read_array, which reads .npy files and images without 1 or 3 channels.
        source: opens the files; default: the disk.
        exif_orientation: turn images upright, before they are cropped.

    Raises:
        ValueError: when indexed: an image cannot be read.
    """

    def __init__(
        self,
        root: Path,
        samples: list[Sample],
        channels: int,
        size: int,
        views: list[ViewSettings],
        seed: int,
        skip_unreadable: bool = False,
        pixel_range: list[float] | None = None,
        source: OnDisk | None = None,
        exif_orientation: bool = True,
    ):
        super().__init__(samples, "image", skip_unreadable, not views, source)
        self.channels = channels
        self.size = size
        self.views = views
        self.seed = seed
        self.pixel_range = pixel_range
        self.exif_orientation = exif_orientation
        self.root = root
        self.packed_pixels: Callable[[int], np.ndarray | None] | None = None  # set by packed_files.py

    def subset(self, indices: np.ndarray) -> Self:
        part = super().subset(indices)
        part.packed_pixels = None  # it goes by the indices of the whole set
        return part

    def __getitem__(self, index: int) -> tuple[Tensor | list[Tensor], int]:
        (image, boxes), label = self.readable(index)
        if not self.views:
            return image if isinstance(image, Tensor) else central_square(image, self.size), label
        pixels = torch.from_numpy(np.atleast_3d(np.require(image, requirements="W")))  # copies unless it is writable
        sizes = (view.crop_size for view in self.views)
        return [resized_box(pixels, box, size) for box, size in zip(boxes, sizes, strict=True)], label

    def read(self, index: int) -> tuple[Image.Image | np.ndarray | Tensor, list[Box]]:
        """Return an image and the box of each view. A large JPEG is decoded at a reduced scale if the views allow.

        If the image is packed, return its packed pixels: with views an array, without them the central square.
        """
        if self.packed_pixels is not None and (pixels := self.packed_pixels(index)) is not None:
            return (pixels, self.boxes(index, pixels.shape[1::-1])) if self.views else (torch.from_numpy(pixels), [])
        path = self.files[index][0]
        boxes = []
        file = self.source.open(path)
        upright = self.exif_orientation
        may_be_jpeg = self.views and not is_array(path, file, self.channels, self.pixel_range)
        if may_be_jpeg and (size := jpeg_size(file, upright)):
            boxes = self.boxes(index, size)
            scale = reduction(boxes, self.views)
            if scale > 1:
                return read_reduced(file, self.channels, scale, upright), [reduced(box, scale) for box in boxes]
        image = read_any(path, file, self.channels, self.pixel_range, upright)
        size = image.size if isinstance(image, Image.Image) else image.shape[1::-1]
        return image, boxes or self.boxes(index, size)

    def boxes(self, index: int, size: tuple[int, int]) -> list[Box]:
        """Return one box per view in an image of (width, height), drawn from (seed, epoch, index)."""
        rng = generator((self.seed, self.epoch, index))
        return [draw_box(rng, size, view) for view in self.views]


# ---- reading ----


def read_any(
    path: str, file: File, channels: int, pixel_range: list[float] | None, exif_orientation: bool = True
) -> Image.Image | np.ndarray:
    """Return the image in `file`, read by the reader for the extension of `path`."""
    if is_array(path, file, channels, pixel_range):
        return read_array(path, file, channels, pixel_range, exif_orientation)
    is_tiff = suffix_of(path, file) in TIFF_SUFFIXES
    try:
        return read_image(file, channels, pixel_range, exif_orientation)
    except UnidentifiedImageError as error:
        if not is_tiff:
            raise
        raise ValueError(f"it is corrupt, or the range of values of its type is unknown. {WAY_OUT}") from error


def read_image(
    file: File, channels: int, pixel_range: list[float] | None = None, exif_orientation: bool = True
) -> Image.Image:
    """Return an 8-bit gray or RGB image, which is turned upright if `exif_orientation` is set.

    Images of 16 bits are scaled down, with `pixel_range` as in array_files.read_array. Transparency is dropped, as in
    torchvision.

    Raises:
        ValueError: the image has too many pixels or values of unknown range, or is a TIFF with one channel or one image
            per page.
    """
    with opened_image(file) as image:
        if image.format == "TIFF" and has_equal_pages(image):
            if len(image.getbands()) > 1:
                raise ValueError(f"its {image.n_frames} pages are separate images. Write each into its own file.")
            raise ValueError(
                f"its {image.n_frames} pages of one size are channels. Set in_channels to their number, and "
                "pixel_range to the values of black and white ([0, 255] for 8 bits)."
            )
        check_range(image, pixel_range)
        image.load()
        operation = to_upright(image, exif_orientation)
        if image.mode == "P" and "transparency" in image.info:
            image = image.convert("RGBA")
        return transposed(in_mode(scaled_to_8_bits(image, pixel_range), channels), operation)


def has_equal_pages(image: Image.Image) -> bool:
    """Return whether the first two pages of a TIFF have one size; a smaller second page is a thumbnail of the first."""
    if image.n_frames == 1:
        return False
    size = image.size
    image.seek(1)
    are_equal = image.size == size
    image.seek(0)
    return are_equal


def in_mode(image: Image.Image, channels: int) -> Image.Image:
    """Return the image as gray or RGB; it is not copied if it already is."""
    image.load()
    mode = "L" if channels == 1 else "RGB"
    return image if image.mode == mode else image.convert(mode)


def jpeg_size(file: File, exif_orientation: bool = True) -> tuple[int, int] | None:
    """Return (width, height) of a gray or RGB JPEG, as `read_image` returns it, from its header; None for any other
    image."""
    with suppress(UnidentifiedImageError), opened_image(file) as image:
        if image.format == "JPEG" and image.mode in ("L", "RGB"):
            return image.size[::-1] if to_upright(image, exif_orientation) in SWAP_SIDES else image.size
    return None


def read_reduced(file: File, channels: int, scale: int, exif_orientation: bool = True) -> Image.Image:
    """Return a JPEG decoded at 1/scale of its size, from 8/scale x 8/scale frequencies of each 8 x 8 block."""
    with opened_image(file) as image:
        image.draft(None, (image.width // scale, image.height // scale))
        return transposed(in_mode(image, channels), to_upright(image, exif_orientation))


# ---- cropping ----


def draw_box(rng: np.random.Generator, size: tuple[int, int], view: ViewSettings) -> Box:
    """Return a random crop of an image of (width, height): that of augmentations.draw_crops, in a fifth of its time."""
    width, height = size
    areas = height * width * rng.uniform(*view.crop_scale, 10)
    ratios = np.exp(rng.uniform(*np.log(view.crop_ratio), 10))
    y, x = rng.random(2).tolist()
    for area, ratio in zip(areas.tolist(), ratios.tolist(), strict=True):
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(x * (width - w + 1)), int(y * (height - h + 1))
            return left, top, left + w, top + h
    low, high = view.crop_ratio
    central = min(max(width / height, low), high)
    w, h = min(width, round(height * central)), min(height, round(width / central))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def reduction(boxes: list[Box], views: list[ViewSettings]) -> int:
    """Return the largest factor (8, 4, 2 or 1) by which a JPEG can be reduced.

    Every crop must then be REDUCED_MARGIN times as large as its view.
    """
    sides = [min(right - left, bottom - top) for left, top, right, bottom in boxes]
    room = min(side / view.crop_size for side, view in zip(sides, views, strict=True)) / REDUCED_MARGIN
    return next((scale for scale in (8, 4, 2) if scale <= room), 1)


def reduced(box: Box, scale: int) -> Box:
    return tuple(round(edge / scale) for edge in box)


def resized_box(pixels: Tensor, box: Box, size: int) -> Tensor:
    """Return the box of an image [H, W, C] as [C, size, size], whose memory still has the order H, W, C."""
    left, top, right, bottom = box
    return resized(pixels[None, top:bottom, left:right], size)[0]


def collate_crops(samples: list[tuple[list[Tensor], Any]]) -> list:
    """Return [batches of crops [N, C, size, size], labels] of samples of `ImageFiles` with views.

    It is `default_collate` without the change to another order in memory, which takes as long as resizing.
    """
    crops, labels = zip(*samples, strict=True)
    pixels = [default_collate([crop.permute(1, 2, 0) for crop in view]) for view in zip(*crops, strict=True)]
    return [[batch.permute(0, 3, 1, 2) for batch in pixels], default_collate(labels)]


def resized(images: Tensor, size: int | tuple[int, int]) -> Tensor:
    """Return images [N, H, W, C] as [N, C, size, size], or [N, C, *size].

    The result equals PIL's `resize` up to one gray level, and is faster.
    """
    return interpolate(images.permute(0, 3, 1, 2), size, mode="bilinear", antialias=True)


def central_square(image: Image.Image | np.ndarray, size: int, part: float = CENTRAL) -> Tensor:
    """Return the central square of an image, whose side is the fraction `part` of the shorter side: [C, size, size]."""
    if isinstance(image, np.ndarray):  # PIL supports at most four channels
        planes = [Image.fromarray(np.ascontiguousarray(plane)) for plane in np.moveaxis(image, 2, 0)]
        return torch.cat([central_square(plane, size, part) for plane in planes])
    side = min(image.size) * part
    left, top = (image.width - side) / 2, (image.height - side) / 2
    box = (left, top, left + side, top + side)
    pixels = np.array(image.resize((size, size), Image.Resampling.BILINEAR, box=box))
    return torch.from_numpy(pixels).view(size, size, -1).permute(2, 0, 1).contiguous()


def part_kept(params: EncoderAndDataParams) -> float:
    """Return the side of the central square that an encoder sees, relative to the image's shorter side: the same as in
    evaluations during training."""
    return 1.0 if params.dataset.is_packed else CENTRAL


def preprocessing(params: EncoderAndDataParams) -> dict[str, Any]:
    """Return the record of how an image file becomes the encoder's input (docs/export.md), as `central_square` and the
    normalization do it. `pixel_range` is as in the settings."""
    return {
        "exif_orientation": params.exif_orientation,
        "central_crop": part_kept(params),
        "size": params.crop_size,
        "interpolation": "bilinear",
        "antialias": True,
        "channels": params.channels,
        "channel_order": {1: "L", 3: "RGB"}.get(params.channels, "file"),
        "value_range": [0, 1],
        "pixel_range": params.pixel_range,
        "mean": list(params.mean),
        "std": list(params.std),
    }
