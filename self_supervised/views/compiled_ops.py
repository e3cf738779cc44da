"""Views of uint8 images on the CPU: the operations of tensor_ops.py as loops over one image, compiled by Numba.

An image stays in the processor's cache from the first operation to the last, operations that are not applied to it cost
nothing, and it is written once, normalized. The same tests compare both implementations with torchvision.
"""

import os
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numpy as np
import torch
from numba import njit
from torch import Tensor

from self_supervised.catalogue import BLUR_RADIUS
from self_supervised.views.tensor_ops import DRAW_COLUMNS, LUMA, check_channels

OPTIONS = {"nogil": True, "fastmath": True, "error_model": "numpy"}
# Python's numbers would make all results float64
ZERO, HALF, ONE, FOUR, SIX = (np.float32(value) for value in (0, 0.5, 1, 4, 6))
RED, GREEN, BLUE = (np.float32(value) for value in LUMA)
# Columns of a row of draws. Contrast, saturation and hue follow brightness, and the order has four columns.
BRIGHTNESS, ORDER = map(DRAW_COLUMNS.index, ("brightness", "order0"))
TOP, LEFT, HEIGHT, WIDTH, FLIP = map(DRAW_COLUMNS.index, ("top", "left", "height", "width", "flip"))
JITTER, GRAYSCALE, BLUR, SIGMA, SOLARIZE = map(DRAW_COLUMNS.index, ("jitter", "grayscale", "blur", "sigma", "solarize"))


# ---- compiling ----


def compiled(function: Callable) -> Callable:
    """Return a function, compiled by Numba at its first call.

    Numba stores the machine code next to this file, or else in the user's cache directory. If neither can be written,
    each process compiles again.
    """
    try:
        return njit(function, cache=True, **OPTIONS)
    except RuntimeError:  # no directory for the cache
        warn_uncached()
        return njit(function, **OPTIONS)


@cache
def warn_uncached() -> None:
    """Warn, once per process, that compiled code is not stored."""
    warnings.warn(
        "Numba cannot store compiled code: neither the directory of this library nor the user's cache directory can be "
        "written. Each start compiles for some seconds. Set NUMBA_CACHE_DIR to a directory that can be written.",
        stacklevel=3,
    )


# ---- views of a batch ----


def compiled_view(images: Tensor, draws: np.ndarray, size: int, threshold: float, mean: tuple, std: tuple) -> Tensor:
    """Return normalized views [N, C, size, size] of uint8 images [N, C, H, W], with one row of `draws` per image."""
    check_channels(images, mean)
    pixels = images.permute(0, 2, 3, 1).contiguous().numpy()
    n = len(pixels)
    channels = pixels.shape[3]
    out = np.empty((n, size, size, channels), np.float32)
    mean = np.array(mean, np.float32)
    std = np.array(std, np.float32)
    threads = max(1, min(torch.get_num_threads(), n // 8))  # for less than 8 images, a thread costs more than it saves
    parts = [slice(n * i // threads, n * (i + 1) // threads) for i in range(threads)]

    def work(part: slice) -> None:
        write_views(pixels[part], draws[part], np.float32(threshold), mean, std, out[part])

    list(pool(threads, os.getpid()).map(work, parts))  # compiled loops release Python's global lock
    return torch.from_numpy(out).permute(0, 3, 1, 2)


@cache
def pool(threads: int, process: int) -> ThreadPoolExecutor:
    """Return the threads of a process. They are kept, since starting them takes as long as a few views.

    `process` is part of the cache's key: a forked process has no threads of its parent.
    """
    return ThreadPoolExecutor(threads)


@compiled
def write_views(images, draws, threshold, mean, std, out):
    """Write the views of images [N, H, W, C], uint8, to out [N, size, size, C], float32."""
    size = out.shape[1]
    channels = out.shape[3]
    x = np.empty((channels, size, size), np.float32)
    scratch = np.empty((size, size), np.float32)
    planes = x.reshape(channels, -1)
    for n in range(len(images)):
        d = draws[n]
        crop_loop(images[n], int(d[TOP]), int(d[LEFT]), int(d[HEIGHT]), int(d[WIDTH]), d[FLIP] > 0, x)
        if d[JITTER] > 0:
            jitter_pixels(planes, d)
        if d[GRAYSCALE] > 0 and channels == 3:
            grayscale(planes)
        if d[BLUR] > 0:
            blurred_crop(x, d[SIGMA], scratch)
        if d[SOLARIZE] > 0:
            solarize_pixels(planes, threshold)
        pixels = out[n].reshape(-1, channels)
        for c in range(channels):
            scale = ONE / std[c]
            plane = planes[c]
            for k in range(plane.size):
                pixels[k, c] = (plane[k] - mean[c]) * scale


# ---- crop ----


@compiled
def interpolation(length, size):
    """Return the antialiased linear interpolation of `length` pixels to `size`: (first, weights).

    Output i mixes the pixels from first[i] on, with weights[i]; first is [size], weights [size, taps]. Centers are
    float32 as in torchvision, since exact ones differ by 1e-5 at the far end of an image.
    """
    scale = np.float32(length) / np.float32(size)
    reach = max(scale, ONE)
    first = np.empty(size, np.int64)
    weights = np.zeros((size, int(np.ceil(2 * reach)) + 1), np.float32)
    for i in range(size):
        center = (np.float32(i) + HALF) * scale
        first[i] = min(max(int(np.floor(center - reach + HALF)), 0), length - 1)
        for t in range(min(weights.shape[1], length - first[i])):
            distance = abs(np.float32(first[i] + t) + HALF - center)
            weights[i, t] = max(ONE - distance / reach, ZERO)
        weights[i] /= weights[i].sum()
    return first, weights


@compiled
def crop_loop(image, top, left, height, width, flip, x):
    """Write the box of image [H, W, C], resized, to x [C, size, size], with values from 0 to 1."""
    channels = x.shape[0]
    size = x.shape[1]
    first_row, row_weights = interpolation(height, size)
    first_column, column_weights = interpolation(width, size)
    n = width * channels
    taps = column_weights.shape[1]
    rows = image.reshape(image.shape[0], -1)[top:, left * channels : left * channels + n]
    line = np.zeros(n + taps * channels, np.float32)  # zeros after n, for taps of weight 0
    for i in range(size):
        line[:n] = 0
        for t in range(row_weights.shape[1]):
            weight = row_weights[i, t] / np.float32(255)
            if weight > 0:
                row = rows[first_row[i] + t]
                for k in range(n):
                    line[k] += weight * np.float32(row[k])
        if channels == 3:
            three_channels(line, first_column, column_weights, flip, x, i)
        else:
            for c in range(channels):
                for j in range(size):
                    total = ZERO
                    for t in range(taps):
                        total += column_weights[j, t] * line[(first_column[j] + t) * channels + c]
                    x[c, i, size - 1 - j if flip else j] = total


@compiled
def three_channels(line, first, weights, flip, x, i):
    """Write row i of x from a line of interleaved channels: the usual case, with all three in one loop."""
    size = x.shape[2]
    for j in range(size):
        red, green, blue = ZERO, ZERO, ZERO
        k = first[j] * 3
        for t in range(weights.shape[1]):
            weight = weights[j, t]
            red += weight * line[k]
            green += weight * line[k + 1]
            blue += weight * line[k + 2]
            k += 3
        at = size - 1 - j if flip else j
        x[0, i, at], x[1, i, at], x[2, i, at] = red, green, blue


# ---- color ----


@compiled
def jitter_pixels(x, d):
    """Jitter the colors of x [C, pixels] in place, in the order and with the strengths of the row d of draws."""
    for position in range(4):
        which = int(d[ORDER + position])
        strength = d[BRIGHTNESS + which]
        if which == 0:
            blend_pixels(x, ZERO, strength)
        elif which == 1:
            blend_pixels(x, mean_gray(x), strength)
        elif which == 2 and x.shape[0] == 3:
            saturation(x, strength)
        elif which == 3 and x.shape[0] == 3:
            hue(x, strength)


@compiled
def clamp(value):
    return min(max(value, ZERO), ONE)


@compiled
def mean_gray(x):
    if x.shape[0] != 3:
        return np.float32(x.mean())
    total = ZERO
    for k in range(x.shape[1]):
        total += RED * x[0, k] + GREEN * x[1, k] + BLUE * x[2, k]
    return total / np.float32(x.shape[1])


@compiled
def blend_pixels(x, other, factor):
    """Blend with one value: brightness with black (0), contrast with the image's mean gray."""
    rest = (ONE - factor) * other
    for c in range(x.shape[0]):
        plane = x[c]
        for k in range(plane.size):
            plane[k] = clamp(factor * plane[k] + rest)


@compiled
def saturation(x, factor):
    r, g, b = x[0], x[1], x[2]
    for k in range(r.size):
        rest = (ONE - factor) * (RED * r[k] + GREEN * g[k] + BLUE * b[k])
        r[k], g[k], b[k] = clamp(factor * r[k] + rest), clamp(factor * g[k] + rest), clamp(factor * b[k] + rest)


@compiled
def hue(x, turn):
    r, g, b = x[0], x[1], x[2]
    for k in range(r.size):
        red, green, blue = r[k], g[k], b[k]
        value = max(red, max(green, blue))
        chroma = value - min(red, min(green, blue))
        difference, sector = red - green, FOUR
        if value == green:
            difference, sector = blue - red, np.float32(2)
        if value == red:
            difference, sector = green - blue, ZERO
        sector += difference / max(chroma, np.float32(1e-12)) + SIX * turn
        r[k] = value - chroma * wheel(sector + np.float32(5))
        g[k] = value - chroma * wheel(sector + np.float32(3))
        b[k] = value - chroma * wheel(sector + ONE)


@compiled
def wheel(sector):
    sector -= SIX * np.floor(sector / SIX)
    return clamp(min(sector, FOUR - sector))


@compiled
def grayscale(x):
    for k in range(x.shape[1]):
        x[0, k] = x[1, k] = x[2, k] = RED * x[0, k] + GREEN * x[1, k] + BLUE * x[2, k]


@compiled
def solarize_pixels(x, threshold):
    for c in range(x.shape[0]):
        plane = x[c]
        for k in range(plane.size):
            plane[k] = ONE - plane[k] if plane[k] >= threshold else plane[k]


# ---- blur ----


@compiled
def blurred_crop(x, sigma, columns_done):
    """Blur x [C, size, size] in place, first its columns and then its rows, with reflected borders.

    The kernel is symmetric, so half of it suffices. `columns_done` [size, size] holds the columns' result.
    """
    size = x.shape[1]
    kernel = np.exp(np.float32(-0.5) * (np.arange(BLUR_RADIUS + 1) / sigma) ** 2).astype(np.float32)
    kernel /= 2 * kernel.sum() - kernel[0]
    line = np.empty(size + 2 * BLUR_RADIUS, np.float32)
    for c in range(x.shape[0]):
        plane = x[c]
        for i in range(size):
            target = columns_done[i]
            row = plane[i]
            for j in range(size):
                target[j] = kernel[0] * row[j]
            for k in range(1, BLUR_RADIUS + 1):
                above = plane[abs(i - k)]
                below = plane[size - 1 - abs(size - 1 - i - k)]
                for j in range(size):
                    target[j] += kernel[k] * (above[j] + below[j])
        for i in range(size):
            target = plane[i]
            row = columns_done[i]
            line[:BLUR_RADIUS] = row[BLUR_RADIUS:0:-1]
            line[BLUR_RADIUS : BLUR_RADIUS + size] = row
            line[BLUR_RADIUS + size :] = row[size - 1 - BLUR_RADIUS : size - 1][::-1]
            for j in range(size):
                total = kernel[0] * line[BLUR_RADIUS + j]
                for k in range(1, BLUR_RADIUS + 1):
                    total += kernel[k] * (line[BLUR_RADIUS + j - k] + line[BLUR_RADIUS + j + k])
                target[j] = total
