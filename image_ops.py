"""Image operations with one parameter an image, for whole batches on any device.

x is [N, C, H, W], floats from 0 to 1. Given the same parameters, each operation equals torchvision's v2 operation on
float images to 1e-5. Parameters are NumPy arrays of N numbers, drawn on the host, so that it knows without waiting
which images an operation concerns.
"""

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor

Draws = dict[str, np.ndarray]
BLUR_RADIUS = 6  # 3 sigma of the strongest blur: kernels of 13 pixels
LUMA = (0.2989, 0.587, 0.114)  # torchvision's weights of red, green, blue


def on_some(x: Tensor, chosen: np.ndarray, operation: Callable[..., Tensor], *parameters: np.ndarray) -> Tensor:
    """operation(x, *parameters) for the chosen images, in place. The host knows which: nothing waits for the device."""
    indices = np.flatnonzero(chosen)
    if len(indices) == 0:
        return x
    if len(indices) == len(x):
        return operation(x, *(to_column(p, x) for p in parameters))
    where = torch.from_numpy(indices).to(x.device, non_blocking=True)
    return x.index_copy_(0, where, operation(x[where], *(to_column(p[indices], x) for p in parameters)))


def to_column(values: np.ndarray, like: Tensor) -> Tensor:
    return torch.from_numpy(values).to(like.device, like.dtype, non_blocking=True).view(-1, 1, 1, 1)


def apply_matrices(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """rows @ x @ columns^T for each image and channel. rows: [N, h, H], columns: [N, w, W] -> [N, C, h, w]."""
    n, c, height, width = x.shape
    x = (x.reshape(n, c * height, width) @ columns.transpose(1, 2)).view(n, c, height, -1)
    x = x.transpose(2, 3).reshape(n, -1, height) @ rows.transpose(1, 2)
    return x.view(n, c, -1, rows.shape[1]).transpose(2, 3)


def resize_matrix(start: np.ndarray, length: np.ndarray, size: int, source: int, device: torch.device) -> Tensor:
    """[N, size, source]: antialiased linear interpolation of source pixels [start, start + length) to `size` pixels."""
    start, length = (torch.from_numpy(v).to(device, torch.float32).view(-1, 1, 1) for v in (start, length))
    scale = length / size
    centers = (torch.arange(size, device=device).view(1, -1, 1) + 0.5) * scale
    pixels = torch.arange(source, device=device).view(1, 1, -1) - start
    weights = (1 - (pixels + 0.5 - centers).abs() / scale.clamp(min=1)).clamp_(min=0)
    weights = weights * ((pixels >= 0) & (pixels < length))
    return weights / weights.sum(2, keepdim=True)


def resized_crop(x: Tensor, boxes: Draws, size: int, flip: np.ndarray | None = None) -> Tensor:
    """Crop each image by its box, resize to size x size, mirror the flipped ones: two small matrices an image."""
    rows = resize_matrix(boxes["top"], boxes["height"], size, x.shape[2], x.device)
    columns = resize_matrix(boxes["left"], boxes["width"], size, x.shape[3], x.device)
    if flip is not None:
        columns = on_some(columns.unsqueeze(1), flip, partial(torch.flip, dims=[2])).squeeze(1)
    return apply_matrices(x, rows, columns)


def gray(x: Tensor) -> Tensor:
    """[N, C, H, W] -> [N, 1, H, W] luma; images without three channels are taken as gray already."""
    if x.shape[1] != 3:
        return x
    return x[:, 0:1] * LUMA[0] + x[:, 1:2] * LUMA[1] + x[:, 2:3] * LUMA[2]


def blend(x: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    return torch.lerp(other, x, factor).clamp_(0, 1)


def adjust_brightness(x: Tensor, factor: Tensor) -> Tensor:
    return (x * factor).clamp_(0, 1)


def adjust_contrast(x: Tensor, factor: Tensor) -> Tensor:
    return blend(x, gray(x).mean((1, 2, 3), keepdim=True), factor)


def adjust_saturation(x: Tensor, factor: Tensor) -> Tensor:
    return blend(x, gray(x), factor)


def adjust_hue(x: Tensor, turn: Tensor) -> Tensor:
    """Shift of the hue by `turn` of the colour wheel, exact in HSV, without branches."""
    r, g, b = x.unbind(1)
    value = x.amax(1)
    chroma = value - x.amin(1)
    safe = chroma.clamp(min=1e-12)
    sector = torch.where(value == g, 2 + (b - r) / safe, 4 + (r - g) / safe)
    sector = torch.where(value == r, (g - b) / safe, sector) + 6 * turn.view(-1, 1, 1)
    wheel = (sector.unsqueeze(1) + torch.tensor([5.0, 3.0, 1.0], device=x.device).view(1, 3, 1, 1)).remainder_(6)
    wheel = torch.minimum(wheel, 4 - wheel).clamp_(0, 1)
    return value.unsqueeze(1) - chroma.unsqueeze(1) * wheel


def blur(x: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian blur with reflected borders, as two banded matrices an image; H and W must be above 6 pixels."""
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
    """Each image's four adjustments in its own order. Without three channels there is no saturation and no hue."""
    operations = [
        (adjust_brightness, draws["brightness"]),
        (adjust_contrast, draws["contrast"]),
        (adjust_saturation, draws["saturation"]),
        (adjust_hue, draws["hue"]),
    ]
    for position in range(4):
        for i, (operation, parameter) in enumerate(operations[: 4 if x.shape[1] == 3 else 2]):
            x = on_some(x, draws["jitter"] & (draws["order"][:, position] == i), operation, parameter)
    return x


def solarize(x: Tensor, threshold: float) -> Tensor:
    return torch.where(x >= threshold, 1 - x, x)


def normalize(x: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    if x.shape[1] != len(mean):
        raise ValueError(
            f"images of {x.shape[1]} channels cannot be normalized with {len(mean)} means: choose a dataset_name of as "
            "many channels, or let the loader yield float views"
        )
    statistics = torch.tensor([mean, std], device=x.device).view(2, 1, -1, 1, 1)
    return (x - statistics[0]) / statistics[1]
