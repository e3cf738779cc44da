"""Batched image operations on any device, each with its own parameters for every image.

x is [N, C, H, W], floats from 0 to 1. Given the same parameters, each operation equals torchvision's v2 operation on
float images to 1e-5. A parameter is N numbers, drawn on the host. No branch and no size depends on a parameter, so
nothing waits for the device, and `torch.compile` can fuse a whole view. compiled_ops.py has the same operations for the
CPU.
"""

import numpy as np
import torch
from torch import Tensor

from self_supervised.catalogue import BLUR_RADIUS
from self_supervised.distributed import to_device

Draws = dict[str, np.ndarray | Tensor]  # parameter -> [N]; "order" -> [N, 4]
LUMA = (0.2989, 0.587, 0.114)  # torchvision's weights of red, green and blue
# Columns of the float32 matrix in which parameters are copied to the device at once, or passed to compiled loops
DRAW_COLUMNS = (
    "top", "left", "height", "width", "flip", "jitter", "brightness", "contrast", "saturation", "hue", "grayscale",
    "blur", "sigma", "solarize", "order0", "order1", "order2", "order3",
)  # fmt: skip


def to_matrix(draws: Draws) -> np.ndarray:
    """Return the parameters as a matrix [N, columns], float32. Columns without parameters, such as a box, are 0."""
    orders = {f"order{i}": draws["order"][:, i] for i in range(4)}
    matrix = np.zeros((len(draws["flip"]), len(DRAW_COLUMNS)), np.float32)
    for i, name in enumerate(DRAW_COLUMNS):
        matrix[:, i] = orders.get(name, draws.get(name, 0))
    return matrix


def from_matrix(matrix: Tensor) -> Draws:
    """Return the parameters in a matrix: the reverse of `to_matrix`."""
    draws = dict(zip(DRAW_COLUMNS, matrix.unbind(1), strict=True))
    return {**draws, "order": torch.stack([draws[f"order{i}"] for i in range(4)], 1)}


def frames_of(images: Tensor) -> tuple[Tensor, int | None]:
    """Return the frames of clips [N, C, T, H, W] as ([N * T, C, H, W], T); images as (images, None)."""
    return (images, None) if images.dim() == 4 else (images.transpose(1, 2).flatten(0, 1), images.shape[2])


def clips_of(frames: Tensor, n_frames: int | None) -> Tensor:
    """Return clips from their frames: the reverse of `frames_of`."""
    return frames if n_frames is None else frames.unflatten(0, (-1, n_frames)).transpose(1, 2)


def to_column(values: np.ndarray | Tensor, like: Tensor) -> Tensor:
    """Return parameters [N] as [N, 1, 1, 1], with the type and on the device of `like`."""
    return to_device(torch.as_tensor(values).to(like.dtype), like.device).view(-1, 1, 1, 1)


def apply_matrices(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Return rows @ x @ columns^T for each image and channel, [N, C, h, w], of rows [N, h, H] and columns [N, w, W]."""
    n, c, height, width = x.shape
    x = (x.reshape(n, c * height, width) @ columns.transpose(1, 2)).view(n, c, height, -1)
    x = x.transpose(2, 3).reshape(n, -1, height) @ rows.transpose(1, 2)
    return x.view(n, c, -1, rows.shape[1]).transpose(2, 3)


def resize_matrix(start: Tensor, length: Tensor, size: int, source: int) -> Tensor:
    """Return matrices [N, size, source] that interpolate pixels [start, start + length) of `source` to `size` pixels.

    Interpolation is linear and antialiased.
    """
    scale = length / size
    centers = torch.arange(size, dtype=scale.dtype, device=start.device).add_(0.5).view(1, -1, 1) * scale
    pixels = torch.arange(source, device=start.device).view(1, 1, -1) - start
    weights = (1 - (pixels + 0.5 - centers).abs() / scale.clamp(min=1)).clamp_(min=0)
    weights = weights * ((pixels >= 0) & (pixels < length))
    return weights / weights.sum(2, keepdim=True)


def resized_crop(x: Tensor, boxes: Draws, size: int, flip: np.ndarray | Tensor | None = None) -> Tensor:
    """Return the box of each image, resized to size x size, and mirrored where `flip` is above 0.

    This takes two small matrices per image.
    """
    top, left, height, width = (to_column(boxes[name], x)[:, 0] for name in ("top", "left", "height", "width"))
    rows = resize_matrix(top, height, size, x.shape[2])
    columns = resize_matrix(left, width, size, x.shape[3])
    if flip is not None:
        columns = torch.where(to_column(flip, x)[:, 0] > 0, columns.flip(1), columns)
    return apply_matrices(x, rows, columns)


def gray(x: Tensor) -> Tensor:
    """Return the luma [N, 1, H, W] of RGB images; images without three channels are unchanged."""
    if x.shape[1] != 3:
        return x
    return x[:, 0:1] * LUMA[0] + x[:, 1:2] * LUMA[1] + x[:, 2:3] * LUMA[2]


def blend(x: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    """Return factor * x + (1 - factor) * other, clipped to 0 to 1."""
    return torch.lerp(other, x, factor).clamp_(0, 1)


def adjust_brightness(x: Tensor, factor: Tensor) -> Tensor:
    return (x * factor).clamp_(0, 1)


def adjust_contrast(x: Tensor, factor: Tensor) -> Tensor:
    return blend(x, gray(x).mean((1, 2, 3), keepdim=True), factor)


def adjust_saturation(x: Tensor, factor: Tensor) -> Tensor:
    return blend(x, gray(x), factor)


def adjust_hue(x: Tensor, turn: Tensor) -> Tensor:
    """Return images with the hue shifted by `turn` of the color wheel, which is exact in HSV and has no branches."""
    r, g, b = x.unbind(1)
    value = x.amax(1)
    chroma = value - x.amin(1)
    safe = chroma.clamp(min=1e-12)
    sector = torch.where(value == g, 2 + (b - r) / safe, 4 + (r - g) / safe)
    sector = torch.where(value == r, (g - b) / safe, sector) + 6 * turn.view(-1, 1, 1)
    starts = torch.arange(5, 0, -2, device=x.device).view(1, 3, 1, 1)  # created there, since a copy would wait
    wheel = (sector.unsqueeze(1) + starts).remainder_(6)
    wheel = torch.minimum(wheel, 4 - wheel).clamp_(0, 1)
    return value.unsqueeze(1) - chroma.unsqueeze(1) * wheel


def blur(x: Tensor, sigma: Tensor) -> Tensor:
    """Return images after a Gaussian blur with reflected borders, as two banded matrices per image.

    H and W must be above BLUR_RADIUS = 6 pixels.
    """
    offsets = torch.arange(-BLUR_RADIUS, BLUR_RADIUS + 1, device=x.device)
    kernels = torch.exp(-0.5 * (offsets / sigma.view(-1, 1)) ** 2)
    kernels = kernels / kernels.sum(1, keepdim=True)

    def banded(size: int) -> Tensor:
        target = torch.arange(size, device=x.device).unsqueeze(1)
        source = (target + offsets).abs()
        source = torch.where(source >= size, 2 * (size - 1) - source, source)
        shape = (len(x), size, len(offsets))
        return x.new_zeros(len(x), size, size).scatter_add_(2, source.expand(shape), kernels.unsqueeze(1).expand(shape))

    return apply_matrices(x, banded(x.shape[2]), banded(x.shape[3]))


def color_jitter(x: Tensor, draws: Draws) -> Tensor:
    """Return images after brightness, contrast, saturation and hue, in each image's own order.

    Images without three channels get brightness and contrast only.
    """
    operations = [
        (adjust_brightness, draws["brightness"]),
        (adjust_contrast, draws["contrast"]),
        (adjust_saturation, draws["saturation"]),
        (adjust_hue, draws["hue"]),
    ]
    jitter = to_column(draws["jitter"], x) > 0
    for position in range(4):
        which = to_column(draws["order"][:, position], x)
        before = x
        for i, (operation, parameter) in enumerate(operations[: 4 if x.shape[1] == 3 else 2]):
            x = torch.where(jitter & (which == i), operation(before, to_column(parameter, x)), x)
    return x


def solarize(x: Tensor, threshold: float) -> Tensor:
    """Return images with all values from the threshold on inverted."""
    return torch.where(x >= threshold, 1 - x, x)


def check_channels(x: Tensor, mean: tuple[float, ...]) -> None:
    """Raise ValueError unless there is one mean per channel."""
    if x.shape[1] != len(mean):
        raise ValueError(
            f"images of {x.shape[1]} channels cannot be normalized with {len(mean)} means. Set image_mean and "
            f"image_std to {x.shape[1]} numbers, or yield float views from the loader."
        )


def normalize(x: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Return normalized images, in channels_last memory.

    `mean` and `std` stay Python numbers, since copying them to the device as tensors would wait for it.
    """
    check_channels(x, mean)
    channels = zip(x.unbind(1), mean, std, strict=True)
    return torch.stack([(plane - m) / s for plane, m, s in channels], dim=3).permute(0, 3, 1, 2)
