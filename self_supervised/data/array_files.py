"""Images of any number of channels, from .npy, TIFF and whatever else holds them, as arrays of 8 bits."""

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image

from self_supervised.data.file_search import ARRAY_SUFFIX

TIFF_SUFFIXES = (".tif", ".tiff")
PIL_MODES = {2: "LA", 4: "RGBA"}  # of other files
WAY_OUT = "set pixel_range to the values of black and white"


@contextmanager
def opened_image(file: str | BinaryIO) -> Iterator[Image.Image]:
    """Image.open, whose limit of pixels is also that of all other readers; it is decided by the header."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            with Image.open(file) as image:
                yield image
        except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
            raise ValueError(too_large()) from error


def check_size(n_pixels: int) -> None:
    """Raise ValueError for more pixels than Pillow's limit."""
    if Image.MAX_IMAGE_PIXELS is not None and n_pixels > Image.MAX_IMAGE_PIXELS:
        raise ValueError(too_large())


def too_large() -> str:
    return f"it has more than {Image.MAX_IMAGE_PIXELS:,} pixels: make it smaller, or raise PIL.Image.MAX_IMAGE_PIXELS"


def is_array(path: str, channels: int, pixel_range: list[float] | None) -> bool:
    """Whether an image is read here. Gray or RGB TIFFs are read by PIL, unless their range is told."""
    suffix = Path(path).suffix.lower()
    return suffix == ARRAY_SUFFIX or channels not in (1, 3) or (suffix in TIFF_SUFFIXES and pixel_range is not None)


def read_array(
    path: str, channels: int, pixel_range: list[float] | None = None, file: str | BinaryIO | None = None
) -> np.ndarray:
    """uint8 [H, W, C]. `file` holds the image where `path` is but its name.

    Files hold H x W, H x W x C, or C x H x W where only the first axis has the length C. Values of uint8 stay what they
    are; uint16 is divided by 257; floats go from 0 to 1. With `pixel_range`, the values from its first to its second
    become 0 to 255, rounded, and those beyond are cut off; of other files than .npy and TIFF, those of 16 bits only.

    Raises:
        ValueError: another shape, another type, or floats out of 0 to 1.
    """
    suffix = Path(path).suffix.lower()
    file = path if file is None else file
    if suffix == ARRAY_SUFFIX:
        pixels = read_npy(file, channels)
    elif suffix in TIFF_SUFFIXES:
        pixels = read_tiff(file, channels)
    else:
        if channels not in PIL_MODES:
            raise ValueError(f"in_channels={channels} are read from .npy and TIFF files only")
        with opened_image(file) as image:
            return np.asarray(of_16_bits(image, pixel_range).convert(PIL_MODES[channels]))
    return in_8_bits(channels_last(pixels, channels), pixel_range)


def read_npy(file: str | BinaryIO, channels: int) -> np.ndarray:
    with Path(file).open("rb") if isinstance(file, str) else nullcontext(file) as content:
        version = np.lib.format.read_magic(content)
        headers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        if version in headers:
            check_size(math.prod(headers[version](content)[0]) // channels)
        content.seek(0)
        return np.load(content, allow_pickle=False)


def read_tiff(file: str | BinaryIO, channels: int) -> np.ndarray:
    try:
        import tifffile  # optional
    except ImportError as error:
        raise ValueError("TIFF files of many bands need tifffile: pip install tifffile") from error
    with tifffile.TiffFile(file) as tiff:
        check_size(math.prod(tiff.series[0].shape) // channels)
        return tiff.asarray()


def of_16_bits(image: Image.Image, pixel_range: list[float] | None) -> Image.Image:
    """Such an image in 8 bits, because PIL would clip it at 255; another one as it is."""
    if not image.mode.startswith("I"):
        return image
    pixels = np.asarray(image)
    if pixels.min() < 0 or pixels.max() > 65535:
        raise ValueError(f"pixels from {pixels.min()} to {pixels.max()} are not 16 bits")
    return Image.fromarray(in_8_bits(pixels.astype(np.uint16), pixel_range))


def channels_last(pixels: np.ndarray, channels: int) -> np.ndarray:
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    if pixels.ndim == 3 and pixels.shape[0] == channels != pixels.shape[2]:
        pixels = pixels.transpose(1, 2, 0)
    if pixels.ndim == 3 and pixels.shape[2] == 1 and channels == 3:  # gray, for an encoder of colors
        pixels = pixels.repeat(3, axis=2)
    if pixels.ndim != 3 or pixels.shape[2] != channels or 0 in pixels.shape:
        raise ValueError(f"an array of shape {pixels.shape} is no image of in_channels={channels}")
    return np.ascontiguousarray(pixels)


def in_8_bits(pixels: np.ndarray, pixel_range: list[float] | None) -> np.ndarray:
    if pixel_range is None and pixels.dtype == np.uint8:
        return pixels
    if pixel_range is None and pixels.dtype == np.uint16:
        return (pixels // 257).astype(np.uint8)
    if pixels.dtype.kind not in "uif":
        raise ValueError(f"values of type {pixels.dtype} are no pixels")
    if not np.isfinite(pixels).all():
        raise ValueError("there are values that are not finite")
    if pixel_range is None and pixels.dtype.kind != "f":
        raise ValueError(f"values of type {pixels.dtype} have no known range: {WAY_OUT}")
    low, high = pixel_range or (0.0, 1.0)
    if pixel_range is None and (pixels.min() < 0 or pixels.max() > 1):
        raise ValueError(f"values from {pixels.min():g} to {pixels.max():g} are not within 0 to 1: {WAY_OUT}")
    scaled = (pixels.astype(np.float64) - low) * (255 / (high - low))
    return np.round(scaled).clip(0, 255).astype(np.uint8)
