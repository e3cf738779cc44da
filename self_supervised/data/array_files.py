"""Reading images as uint8 arrays: .npy and TIFF files of any number of channels, and 16-bit images of other formats.

All readers of images share Pillow's limit on the number of pixels (`opened_image`, `check_size`).
"""

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image

from self_supervised.data.file_search import ARRAY_SUFFIX

TIFF_SUFFIXES = (".tif", ".tiff")
# first bytes of a file
MAGIC = {b"\x93NUMPY": ARRAY_SUFFIX, **dict.fromkeys((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"), ".tiff")}
BITS_PER_SAMPLE, PHOTOMETRIC, SAMPLE_FORMAT = 258, 262, 339  # TIFF tags
# which Pillow knows and tifffile does not
MEANINGS_OF_TIFF = {
    0: "white where they are 0",
    3: "indices of a palette",
    6: "YCbCr",
    **dict.fromkeys((8, 9, 10), "L*a*b*"),
}
JPEG_OF_TIFF = (6, 7, 33007, 34892)  # compressions whose YCbCr tifffile converts
PIL_MODES = {2: "LA", 4: "RGBA"}  # number of channels -> mode, for formats other than .npy and TIFF
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # EXIF orientation -> operation that turns the image upright
WAY_OUT = "Set pixel_range to the values of black and white"  # end of messages, which the name of the file precedes


@contextmanager
def opened_image(file: str | BinaryIO) -> Iterator[Image.Image]:
    """Open an image with Pillow, and close it afterwards. Only the header is read.

    Raises:
        ValueError: the image has more pixels than Pillow's limit.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            with Image.open(file) as image:
                yield image
        except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
            raise ValueError(too_large()) from error


def to_upright(image: Image.Image, exif_orientation: bool = True) -> Image.Transpose | None:
    """Return the operation that turns an image upright, by its EXIF (or XMP) orientation; None if there is nothing to
    do, or if `exif_orientation` is False.

    The orientation is that of the pixels only after `image.load()`: Pillow turns TIFF files upright when it loads them.
    """
    if not exif_orientation:
        return None
    try:
        return UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation))
    except Exception:  # Pillow raises many kinds of errors on corrupt metadata, which do not harm the pixels
        return None


def transposed(image: Image.Image, operation: Image.Transpose | None) -> Image.Image:
    return image if operation is None else image.transpose(operation)


def check_size(n_pixels: int) -> None:
    """Raise ValueError if there are more pixels than Pillow's limit."""
    if Image.MAX_IMAGE_PIXELS is not None and n_pixels > Image.MAX_IMAGE_PIXELS:
        raise ValueError(too_large())


def too_large() -> str:
    limit = f"{Image.MAX_IMAGE_PIXELS:,} pixels"
    return f"the image has more than {limit}. Make it smaller, or raise PIL.Image.MAX_IMAGE_PIXELS"


def suffix_of(path: str, file: str | BinaryIO) -> str:
    """Return the extension of an image in lower case. A row of a table has none: its content decides."""
    suffix = Path(path if not isinstance(file, str) else file).suffix.lower()
    if suffix or isinstance(file, str):
        return suffix
    file.seek(0)  # another reader may have tried it
    start = file.read(6)
    file.seek(0)
    return next((extension for magic, extension in MAGIC.items() if start.startswith(magic)), "")


def is_array(path: str, file: str | BinaryIO, channels: int, pixel_range: list[float] | None) -> bool:
    """Return whether `read_array` reads an image. Gray and RGB TIFFs without `pixel_range` are read by PIL."""
    suffix = suffix_of(path, file)
    return suffix == ARRAY_SUFFIX or channels not in (1, 3) or (suffix in TIFF_SUFFIXES and pixel_range is not None)


def read_array(
    path: str, file: str | BinaryIO, channels: int, pixel_range: list[float] | None, exif_orientation: bool
) -> np.ndarray:
    """Return an image as uint8 [H, W, C].

    The array in the file is [H, W], [H, W, C], or [C, H, W] if only its first axis has the length C. uint8 values are
    kept, uint16 values are divided by 257, and floats from 0 to 1 are scaled to 0 to 255.

    Args:
        path: the image's name, whose extension chooses the reader.
        file: its path or content.
        pixel_range: the values that become 0 and 255. Values in between are scaled linearly and rounded, values
            outside are clipped. In formats other than .npy and TIFF, it applies to 16-bit images only, which must be
            gray.
        exif_orientation: turn images upright that Pillow reads: those of formats other than .npy and TIFF.

    Raises:
        ValueError: the array has another shape or type, or holds floats outside 0 to 1, or `pixel_range` does not fit.
    """
    suffix = suffix_of(path, file)
    if suffix == ARRAY_SUFFIX:
        pixels = read_npy(file, channels)
    elif suffix in TIFF_SUFFIXES:
        pixels = read_tiff(file, channels)
    else:
        if channels not in PIL_MODES:
            raise ValueError(
                f"in_channels={channels}: images with this number of channels can be read from .npy and TIFF files "
                "only. Convert the images."
            )
        with opened_image(file) as image:
            check_range(image, pixel_range)
            image.load()
            pixels = scaled_to_8_bits(image, pixel_range).convert(PIL_MODES[channels])
            return np.asarray(transposed(pixels, to_upright(image, exif_orientation)))
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
        raise ValueError("TIFF files with many bands are read with tifffile. Run pip install tifffile.") from error
    with tifffile.TiffFile(file) as tiff:
        check_size(math.prod(tiff.series[0].shape) // channels)
        page = tiff.pages.first
        meaning = MEANINGS_OF_TIFF.get(int(page.photometric))
        if meaning and not (meaning == "YCbCr" and page.compression in JPEG_OF_TIFF):
            raise ValueError(f"its pixels are {meaning}. Convert it to gray or RGB.")
        pixels = tiff.asarray()
        has_alpha = page.samplesperpixel in (2, 4) and any(kind != 0 for kind in page.extrasamples)
        if has_alpha and pixels.shape[-1] == page.samplesperpixel != channels:
            return pixels[..., :-1]
        return pixels


def scaled_to_8_bits(image: Image.Image, pixel_range: list[float] | None) -> Image.Image:
    """Return a 16-bit image scaled to 8 bits, since PIL would clip its values at 255. Other images are unchanged."""
    if not image.mode.startswith("I"):
        return image
    pixels = np.asarray(image)
    if pixels.min() < 0 or pixels.max() > 65535:
        raise ValueError(f"its pixels from {pixels.min()} to {pixels.max()} do not fit into 16 bits. Scale them.")
    return Image.fromarray(in_8_bits(pixels.astype(np.uint16), pixel_range))


def check_range(image: Image.Image, pixel_range: list[float] | None) -> None:
    """Raise ValueError if Pillow would not keep the values of an opened image: floats, in a TIFF also signed integers,
    another number of bits than 8 or 16, and inverted ones of 16 bits; and values that `pixel_range` is about but Pillow
    has scaled."""
    if pixel_range is not None and scales_16_bits(image):
        raise ValueError("pixel_range cannot be applied: Pillow scales these 16 bits. Convert it to .npy or TIFF.")
    if image.format == "FITS" and image.mode != "L":
        raise ValueError("Pillow does not keep the values of FITS. Convert it to .npy or TIFF.")
    if image.mode == "F":
        way_out = WAY_OUT if image.format == "TIFF" else "Convert it to .npy or TIFF."
        raise ValueError(f"the range of floating-point pixels is unknown. {way_out}")
    if image.format == "TIFF":
        formats, bits = (np.ravel(image.tag_v2.get(tag, 1)) for tag in (SAMPLE_FORMAT, BITS_PER_SAMPLE))
        if (formats != 1).any() or (bits.max() > 8 and bits.max() != 16):
            kind = f"{'u' if (formats == 1).all() else ''}int{bits.max()}"
            raise ValueError(f"the range of values of type {kind} is unknown. {WAY_OUT}")
        if image.mode.startswith("I") and image.tag_v2.get(PHOTOMETRIC) == 0:
            raise ValueError(f"its 16-bit pixels are {MEANINGS_OF_TIFF[0]}. Convert it to gray or RGB.")


def scales_16_bits(image: Image.Image) -> bool:
    """Return whether Pillow will scale the values of an opened image of 16 bits: those of PNGs with colors or alpha,
    and of SGI images, to 8 bits, and those of PGMs and JPEG 2000 to 16 whole bits."""
    modes = [str(part) for tile in image.tile for part in np.ravel(tile.args or "")]
    if image.format == "PPM" and image.mode == "I":
        return modes != ["I;16B"]
    if image.format == "JPEG2000":  # its number of bits, which may be 16, is not known here
        return image.mode.startswith("I")
    of_sgi = any(tile.codec_name == "SGI16" for tile in image.tile)
    return of_sgi or any(";16" in mode and not mode.startswith("I") for mode in modes)


def channels_last(pixels: np.ndarray, channels: int) -> np.ndarray:
    """Return pixels [H, W], [H, W, C] or [C, H, W] as [H, W, C]; gray ones are repeated for RGB."""
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    if pixels.ndim == 3 and pixels.shape[0] == channels != pixels.shape[2]:
        pixels = pixels.transpose(1, 2, 0)
    if pixels.ndim == 3 and pixels.shape[2] == 1 and channels == 3:  # a gray image for an RGB encoder
        pixels = pixels.repeat(3, axis=2)
    if pixels.ndim != 3 or pixels.shape[2] != channels or 0 in pixels.shape:
        raise ValueError(f"an array of shape {pixels.shape} is not an image with in_channels={channels}")
    return np.ascontiguousarray(pixels)


def in_8_bits(pixels: np.ndarray, pixel_range: list[float] | None) -> np.ndarray:
    """Return pixels scaled to uint8; see `read_array`."""
    if pixel_range is None and pixels.dtype == np.uint8:
        return pixels
    if pixel_range is None and pixels.dtype.kind == "u" and pixels.dtype.itemsize == 2:  # of either byte order
        return (pixels // 257).astype(np.uint8)
    if pixels.dtype.kind not in "uif":
        raise ValueError(f"values of type {pixels.dtype} are not pixels")
    if not np.isfinite(pixels).all():
        raise ValueError("some pixels are not finite")
    if pixel_range is None and pixels.dtype.kind != "f":
        raise ValueError(f"the range of values of type {pixels.dtype} is unknown. {WAY_OUT}")
    low, high = pixel_range or (0.0, 1.0)
    if pixel_range is None and (pixels.min() < 0 or pixels.max() > 1):
        raise ValueError(f"values from {pixels.min():g} to {pixels.max():g} are not within 0 to 1. {WAY_OUT}")
    scaled = (pixels.astype(np.float64) - low) * (255 / (high - low))
    return np.round(scaled).clip(0, 255).astype(np.uint8)
