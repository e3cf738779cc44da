"""Image operations with one parameter an image, for whole batches on any device.

x is [N, C, H, W], floats from 0 to 1. Given the same parameters, each operation equals torchvision's v2 operation on
float images to 1e-5. Parameters are N numbers each, drawn on the host. There are no branches and no sizes that depend
on them: nothing waits for the device, and `torch.compile` can fuse a whole view. compiled_ops.py has the same for
the CPU.
"""

import numpy as np
import torch
from torch import Tensor

from self_supervised.catalogue import BLUR_RADIUS
from self_supervised.distributed import to_device

Draws = dict[str, np.ndarray | Tensor]
LUMA = (0.2989, 0.587, 0.114)  # torchvision's weights of red, green, blue


# Of the matrix [N, columns] in which the draws of N images travel: to the device in one copy, or into compiled loops.
DRAW_COLUMNS = (
    *("top", "left", "height", "width", "flip", "jitter", "brightness", "contrast", "saturation", "hue"),
    *("grayscale", "blur", "sigma", "solarize", "order0", "order1", "order2", "order3"),
)


def to_matrix(draws: Draws) -> np.ndarray:
    """[N, columns] in float32. Without a box: the columns of one are 0."""
    orders = {f"order{i}": draws["order"][:, i] for i in range(4)}
    matrix = np.zeros((len(draws["flip"]), len(DRAW_COLUMNS)), np.float32)
    for i, name in enumerate(DRAW_COLUMNS):
        matrix[:, i] = orders.get(name, draws.get(name, 0))
    return matrix


def from_matrix(matrix: Tensor) -> Draws:
    draws = dict(zip(DRAW_COLUMNS, matrix.unbind(1), strict=True))
    return {**draws, "order": torch.stack([draws[f"order{i}"] for i in range(4)], 1)}


def frames_of(images: Tensor) -> tuple[Tensor, int | None]:
    """Clips [N, C, T, H, W] -> (their frames [N T, C, H, W], T); images as they are, and None."""
    return (images, None) if images.dim() == 4 else (images.transpose(1, 2).flatten(0, 1), images.shape[2])


def clips_of(frames: Tensor, n_frames: int | None) -> Tensor:
    """The reverse of `frames_of`."""
    return frames if n_frames is None else frames.unflatten(0, (-1, n_frames)).transpose(1, 2)


def to_column(values: np.ndarray | Tensor, like: Tensor) -> Tensor:
    return to_device(torch.as_tensor(values).to(like.dtype), like.device).view(-1, 1, 1, 1)


def apply_matrices(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """rows @ x @ columns^T for each image and channel. rows: [N, h, H], columns: [N, w, W] -> [N, C, h, w]."""
    n, c, height, width = x.shape
    x = (x.reshape(n, c * height, width) @ columns.transpose(1, 2)).view(n, c, height, -1)
    x = x.transpose(2, 3).reshape(n, -1, height) @ rows.transpose(1, 2)
    return x.view(n, c, -1, rows.shape[1]).transpose(2, 3)


def resize_matrix(start: Tensor, length: Tensor, size: int, source: int) -> Tensor:
    """[N, size, source]: antialiased linear interpolation of source pixels [start, start + length) to `size` pixels."""
    scale = length / size
    centers = (torch.arange(size, device=start.device).view(1, -1, 1) + 0.5) * scale
    pixels = torch.arange(source, device=start.device).view(1, 1, -1) - start
    weights = (1 - (pixels + 0.5 - centers).abs() / scale.clamp(min=1)).clamp_(min=0)
    weights = weights * ((pixels >= 0) & (pixels < length))
    return weights / weights.sum(2, keepdim=True)


def resized_crop(x: Tensor, boxes: Draws, size: int, flip: np.ndarray | Tensor | None = None) -> Tensor:
    """Crop each image by its box, resize to size x size, mirror the flipped ones: two small matrices an image."""
    top, left, height, width = (to_column(boxes[name], x)[:, 0] for name in ("top", "left", "height", "width"))
    rows, columns = resize_matrix(top, height, size, x.shape[2]), resize_matrix(left, width, size, x.shape[3])
    if flip is not None:
        columns = torch.where(to_column(flip, x)[:, 0] > 0, columns.flip(1), columns)
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
    """Shift of the hue by `turn` of the color wheel, exact in HSV, without branches."""
    r, g, b = x.unbind(1)
    value = x.amax(1)
    chroma = value - x.amin(1)
    safe = chroma.clamp(min=1e-12)
    sector = torch.where(value == g, 2 + (b - r) / safe, 4 + (r - g) / safe)
    sector = torch.where(value == r, (g - b) / safe, sector) + 6 * turn.view(-1, 1, 1)
    starts = torch.arange(5, 0, -2, device=x.device).view(1, 3, 1, 1)  # made there: a copy would have to wait
    wheel = (sector.unsqueeze(1) + starts).remainder_(6)
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
    jitter = to_column(draws["jitter"], x) > 0
    for position in range(4):
        which, before = to_column(draws["order"][:, position], x), x
        for i, (operation, parameter) in enumerate(operations[: 4 if x.shape[1] == 3 else 2]):
            x = torch.where(jitter & (which == i), operation(before, to_column(parameter, x)), x)
    return x


def solarize(x: Tensor, threshold: float) -> Tensor:
    return torch.where(x >= threshold, 1 - x, x)


def check_channels(x: Tensor, mean: tuple[float, ...]) -> None:
    if x.shape[1] != len(mean):
        raise ValueError(
            f"images of {x.shape[1]} channels cannot be normalized with {len(mean)} means: choose a dataset_name of as "
            "many channels, or let the loader yield float views"
        )


def normalize(x: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """In channels_last memory. The statistics stay numbers: to make a tensor of them would wait for the device."""
    check_channels(x, mean)
    channels = zip(x.unbind(1), mean, std, strict=True)
    return torch.stack([(plane - m) / s for plane, m, s in channels], dim=3).permute(0, 3, 1, 2)
