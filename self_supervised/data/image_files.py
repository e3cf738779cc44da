"""PASCAL VOC 2007, as its archives unpack: `$DATA_PATH/voc07/VOCdevkit/VOC2007/` with JPEGImages and ImageSets/Main."""

import os
from collections.abc import Callable, Collection, Iterable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from self_supervised.catalogue import ViewSettings
from self_supervised.data.array_files import WAY_OUT, is_array, of_16_bits, opened_image, read_array
from self_supervised.data.file_search import PassedOver, files_below, image_suffixes, tell
from self_supervised.data.files import File, LabeledFiles, OnDisk, Sample, class_numbers_of_split
from self_supervised.views.augmentations import draw_crops, generator

CENTRAL = 7 / 8  # of the shorter side: what an evaluation sees
REDUCED_MARGIN = 1.25  # of a crop at a reduced scale over its view, see ImageFiles
Box = tuple[int, int, int, int]  # left, top, right, bottom


def class_folders(split: Path) -> list[Sample]:
    """Return (path, class) of the images in class folders, numbered as `class_numbers_of_split` does.

    Raises:
        ValueError: there are no images, or none of a class; there are classes that train lacks.
    """
    passed_over = PassedOver()
    numbers = class_numbers_of_split(split)
    of_class = images_in_class_folders(split, numbers, image_suffixes(), passed_over)
    empty = [name for name, paths in of_class.items() if not paths]
    if empty or not of_class:
        none = f"{', '.join(empty[:5])} holds none" if empty else "there is no folder"
        raise ValueError(f"{split} must hold one folder of images per class: {none}{passed_over}")
    found = [(os.path.join(split, path), numbers[name]) for name, paths in of_class.items() for path in paths]
    tell(split, len(found), "images", passed_over)
    return found


def images_in_class_folders(
    split: Path, names: Iterable[str], suffixes: Collection[str], passed_over: PassedOver
) -> dict[str, list[str]]:
    """Return class -> its files, as paths below `split`, of every class folder; sorted by folder, then name."""
    of_class: dict[str, list[str]] = {name: [] for name in names}
    for path in files_below(split, suffixes, passed_over):
        name = path.split("/", 1)[0]
        if name in of_class:
            of_class[name].append(path)
        else:
            passed_over.add("beside the class folders", path)
    return {name: sorted(paths, key=lambda path: path.rpartition("/")) for name, paths in of_class.items()}


class ImageFiles(LabeledFiles):
    """Image files, by default in class folders. With views: one random resized crop a view, drawn from (seed, epoch,
    image). Without: the central square, after the shorter side was resized to 8/7 of `size`.

    A JPEG is decoded at 1/2, 1/4 or 1/8 of its size where every crop then still has 1.25 times the pixels of its view a
    side (with views of 224, all crops have at least 560). That changes the views in two ways: the highest frequencies
    are dropped before the antialiased resizing instead of by it, which makes 1 to 2 of 255 gray levels on average, as
    much as bicubic instead of bilinear; and corners of crops are rounded to the reduced pixels. The central square is
    always taken from the whole image.

    Args:
        skip_unreadable: take the next readable image in place of one that cannot be read, instead of stopping.
        samples: finds the images of a split, and their labels.
        pixel_range: see array_files.read_array, by which images of other than 1 or 3 channels are read, and .npy.
        source: opens them; default: the disk.

    Raises:
        ValueError: no images; a class without images; when indexed, an image that cannot be read. Names the path.
    """

    def __init__(
        self,
        split: Path,
        channels: int,
        size: int,
        views: list[ViewSettings],
        seed: int,
        skip_unreadable: bool = False,
        samples: Callable[[Path], list[Sample]] = class_folders,
        pixel_range: list[float] | None = None,
        source: OnDisk | None = None,
    ):
        super().__init__(samples(split), "image", skip_unreadable, not views, source)
        self.channels = channels
        self.size = size
        self.views = views
        self.seed = seed
        self.pixel_range = pixel_range

    def __getitem__(self, index: int) -> tuple[Tensor | list[Tensor], int]:
        (image, boxes), label = self.readable(index)
        if not self.views:
            return central_square(image, self.size), label
        pixels = torch.from_numpy(np.atleast_3d(np.array(image)))
        sizes = (view.crop_size for view in self.views)
        return [resized_box(pixels, box, size) for box, size in zip(boxes, sizes, strict=True)], label

    def read(self, index: int) -> tuple[Image.Image | np.ndarray, list[Box]]:
        """An image and the box of each view. A large JPEG is decoded at the scale that its views have use for."""
        path = self.files[index][0]
        how = (self.channels, self.pixel_range)
        boxes = []
        file = self.source.open(path)
        if self.views and not is_array(path, *how) and (size := jpeg_size(file)):
            boxes = self.boxes(index, size)
            scale = reduction(boxes, self.views)
            if scale > 1:
                return read_reduced(file, self.channels, scale), [reduced(box, scale) for box in boxes]
        image = read_any(path, file, *how)
        size = image.size if isinstance(image, Image.Image) else image.shape[1::-1]
        return image, boxes or self.boxes(index, size)

    def boxes(self, index: int, size: tuple[int, int]) -> list[Box]:
        """One box a view in an image of (width, height), drawn from (seed, epoch, index)."""
        rng = generator((self.seed, self.epoch, index))
        return [draw_box(rng, size, view) for view in self.views]


# ---- reading ----


def read_any(path: str, file: File, channels: int, pixel_range: list[float] | None) -> Image.Image | np.ndarray:
    """The image in `file`, by the reader for the extension of `path`."""
    if is_array(path, channels, pixel_range):
        return read_array(path, channels, pixel_range, file)
    return read_image(file, channels, pixel_range)


def read_image(file: File, channels: int, pixel_range: list[float] | None = None) -> Image.Image:
    """An image of 8 bits, gray or RGB. Deeper ones are scaled down, by `pixel_range` as in array_files.read_array;
    transparency is dropped, as torchvision does.

    Raises:
        ValueError: too many pixels; values of no known range; a TIFF with channels, or images, in pages of their own.
    """
    with opened_image(file) as image:
        if image.format == "TIFF" and has_equal_pages(image):
            if len(image.getbands()) > 1:
                raise ValueError(f"its {image.n_frames} pages are images of their own: write each into its own file")
            raise ValueError(
                f"its {image.n_frames} pages of one size are channels: set in_channels to their number, and "
                "pixel_range to the values of black and white, which of 8 bits are [0, 255]"
            )
        if image.mode == "F":
            raise ValueError(f"floating-point pixels have no known range: {WAY_OUT}")
        if image.mode == "P" and "transparency" in image.info:
            image = image.convert("RGBA")
        return in_mode(of_16_bits(image, pixel_range), channels)


def has_equal_pages(image: Image.Image) -> bool:
    """A smaller page would be the same image once more, reduced."""
    size = image.size
    several = image.n_frames > 1
    if several:
        image.seek(1)
        several = image.size == size
        image.seek(0)
    return several


def in_mode(image: Image.Image, channels: int) -> Image.Image:
    """Gray or RGB, without a copy of what is so already."""
    image.load()
    mode = "L" if channels == 1 else "RGB"
    return image if image.mode == mode else image.convert(mode)


def jpeg_size(file: File) -> tuple[int, int] | None:
    """(width, height) in the header of a gray or RGB JPEG; None for any other image."""
    with opened_image(file) as image:
        return image.size if image.format == "JPEG" and image.mode in ("L", "RGB") else None


def read_reduced(file: File, channels: int, scale: int) -> Image.Image:
    """A JPEG at 1/scale of its size, from the lowest frequencies of its blocks: 8/scale x 8/scale of 8 x 8."""
    with opened_image(file) as image:
        image.draft(None, (image.width // scale, image.height // scale))
        return in_mode(image, channels)


# ---- cropping ----


def draw_box(rng: np.random.Generator, size: tuple[int, int], view: ViewSettings) -> Box:
    """A random crop of an image of (width, height)."""
    box = {name: int(value[0]) for name, value in draw_crops(rng, 1, size[1], size[0], view).items()}
    return box["left"], box["top"], box["left"] + box["width"], box["top"] + box["height"]


def reduction(boxes: list[Box], views: list[ViewSettings]) -> int:
    """The largest scale of JPEG after which every crop is still larger than its view, by MARGIN."""
    sides = [min(right - left, bottom - top) for left, top, right, bottom in boxes]
    room = min(side / view.crop_size for side, view in zip(sides, views, strict=True)) / REDUCED_MARGIN
    return next((scale for scale in (8, 4, 2) if scale <= room), 1)


def reduced(box: Box, scale: int) -> Box:
    return tuple(round(edge / scale) for edge in box)


def resized_box(pixels: Tensor, box: Box, size: int) -> Tensor:
    """[H, W, C] -> [C, size, size]"""
    left, top, right, bottom = box
    return resized(pixels[None, top:bottom, left:right], size)[0].contiguous()


def resized(images: Tensor, size: int) -> Tensor:
    """[N, H, W, C] -> [N, C, size, size], as PIL's `resize` to one gray level, but three times as fast."""
    return interpolate(images.permute(0, 3, 1, 2), (size, size), mode="bilinear", antialias=True)


def central_square(image: Image.Image | np.ndarray, size: int, part: float = CENTRAL) -> Tensor:
    """[C, size, size]: the square in the middle of an image, of `part` of its shorter side."""
    if isinstance(image, np.ndarray):  # PIL knows no more than four channels
        planes = [Image.fromarray(np.ascontiguousarray(plane)) for plane in np.moveaxis(image, 2, 0)]
        return torch.cat([central_square(plane, size, part) for plane in planes])
    side = min(image.size) * part
    left, top = (image.width - side) / 2, (image.height - side) / 2
    box = (left, top, left + side, top + side)
    pixels = np.array(image.resize((size, size), Image.Resampling.BILINEAR, box=box))
    return torch.from_numpy(pixels).view(size, size, -1).permute(2, 0, 1).contiguous()


# ---- PASCAL VOC 2007, as its archives unpack: $DATA_PATH/voc07/VOCdevkit/VOC2007 with JPEGImages, ImageSets/Main ----


VOC_CLASSES = [
    "aeroplane",
    "bicycle",
    "bird",
    "boat",
    "bottle",
    "bus",
    "car",
    "cat",
    "chair",
    "cow",
    "diningtable",
    "dog",
    "horse",
    "motorbike",
    "person",
    "pottedplant",
    "sheep",
    "sofa",
    "train",
    "tvmonitor",
]


def voc_lists(split: Path) -> list[Path]:
    """Of `$DATA_PATH/voc07/trainval` (a name, no folder) the files with the labels of each class."""
    main = split.parent / "VOCdevkit" / "VOC2007" / "ImageSets" / "Main"
    return [main / f"{name}_{split.name}.txt" for name in VOC_CLASSES]


def voc_is_there(split: Path) -> bool:
    return all(path.is_file() for path in voc_lists(split))


def voc_samples(split: Path) -> list[tuple[str, np.ndarray]]:
    """Images, and of each class whether it is there: 1, not: -1, or only in a way that is hard to see: 0.

    Raises:
        ValueError: the lists of the classes are not of the same images, or hold something else.
    """
    names = None
    columns = []
    for path in voc_lists(split):
        rows = [line.split() for line in path.read_text().splitlines() if line.strip()]
        if not rows or any(len(row) != 2 or row[1] not in ("-1", "0", "1") for row in rows):
            raise ValueError(f"{path} must hold the name of an image and -1, 0 or 1 in each line")
        names = names or [name for name, _ in rows]
        if names != [name for name, _ in rows]:
            raise ValueError(f"{path} lists other images than {voc_lists(split)[0].name}")
        columns.append([int(label) for _, label in rows])
    images = split.parent / "VOCdevkit" / "VOC2007" / "JPEGImages"
    tell(voc_lists(split)[0].parent, len(names), f"images of {split.name}", PassedOver())
    return [(str(images / f"{name}.jpg"), row) for name, row in zip(names, np.array(columns).T, strict=True)]
