"""Colour operations of image_ops.py as loops, compiled by Numba. In place, on images [C, pixels] from 0 to 1."""

import warnings
from collections.abc import Callable
from functools import cache

import numpy as np
from numba import njit

from image_ops import COLUMNS, LUMA

OPTIONS = {"nogil": True, "fastmath": True, "error_model": "numpy"}


def compiled(function: Callable) -> Callable:
    """Compile with Numba, which keeps the machine code next to this file, or in the user's cache directory if this
    file's cannot be written. If it can write to neither, the loops are compiled anew in each process."""
    try:
        return njit(function, cache=True, **OPTIONS)
    except RuntimeError:  # no place for the cache
        say_uncached()
        return njit(function, **OPTIONS)


@cache
def say_uncached() -> None:
    """Once a process."""
    warnings.warn(
        "Numba cannot keep compiled code: neither the directory of this library nor the user's cache directory can be "
        "written. Each start compiles for some seconds. Set NUMBA_CACHE_DIR to a directory that can be written.",
        stacklevel=3,
    )


ZERO, ONE, FOUR, SIX = (np.float32(value) for value in (0, 1, 4, 6))  # with Python's numbers all were float64
RED, GREEN, BLUE = (np.float32(value) for value in LUMA)
STRENGTHS, ORDER = map(COLUMNS.index, ("brightness", "order0"))


@compiled
def color_jitter(x, d):
    for position in range(4):
        which = int(d[ORDER + position])
        strength = d[STRENGTHS + which]
        if which == 0:
            blend(x, ZERO, strength)
        elif which == 1:
            blend(x, mean_gray(x), strength)
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
def blend(x, other, factor):
    """Brightness blends with black, contrast with the image's mean gray."""
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
def solarize(x, threshold):
    for c in range(x.shape[0]):
        plane = x[c]
        for k in range(plane.size):
            plane[k] = ONE - plane[k] if plane[k] >= threshold else plane[k]
