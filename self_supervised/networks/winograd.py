"""3 x 3 convolutions on the CPU with a quarter of the multiplications: Winograd's F(4 x 4, 3 x 3), and its gradients.

The gradients are convolutions of the same kind: that of the input with the mirrored weights, and that of the weight the
transpose of the forward formula. The loops are in winograd_ops.py.
"""

import ctypes
import os
import statistics
import time
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numba import cfunc, from_dtype, types
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from self_supervised.convolutions import PointConv2d
from self_supervised.networks.modules import in_eval_mode
from self_supervised.networks.winograd_ops import (
    LANES,
    PANEL,
    POINTS,
    PRODUCT_ROWS,
    WORK,
    convolve_units,
    sum_weight_gradients,
)
from self_supervised.views.compiled_ops import pool

WEIGHTS_IN_CACHE, TILES_IN_CACHE = 2_500_000, 600_000  # bytes of transformed weights and tiles of a unit
MARGIN = 1.15  # least gain in speed for which a convolution is changed


# ---- threads ----


@cache
def c_function(loop: Callable) -> Any:
    """Return a loop as a C function of the address of its work."""

    @cfunc(types.void(types.CPointer(from_dtype(WORK))))
    def run(work):
        loop(work)

    return run


@cache
def openmp() -> Callable | None:
    """Return OpenMP's function that runs a C function in PyTorch's threads, or None where PyTorch has another OpenMP.

    Other threads would compete with PyTorch's, which keep a core busy for some milliseconds after their work.
    """
    try:
        parallel = ctypes.CDLL("libgomp.so.1", mode=os.RTLD_NOLOAD).GOMP_parallel
    except (OSError, AttributeError):
        return None
    parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    parallel.restype = None
    return parallel


def plan(x: Tensor, outputs: int, in_panels: int, others: int) -> dict[str, int]:
    """Divide a convolution of x into units of some panels of channels and a range of tiles.

    Args:
        x: images [N, inputs, H, W].
        outputs: channels of the convolution's output.
        in_panels: channels that are divided into panels (outputs, or inputs for the weight's gradient).
        others: number of the other channels.
    """
    n, inputs, height, width = x.shape
    tiles, n_panels, threads = n * -(-height // 4) * -(-width // 4), in_panels // PANEL, torch.get_num_threads()
    panels = max(1, min(n_panels, WEIGHTS_IN_CACHE // (4 * POINTS * others * PANEL)))
    parts = -(-n_panels // panels)
    ranges = 1 if threads == 1 else max(1, min(-(-2 * threads // parts), tiles // 16))
    most = min(TILES_IN_CACHE // (4 * POINTS * others), -(-tiles // ranges) + PRODUCT_ROWS - 1)
    block = max(1, most // PRODUCT_ROWS) * PRODUCT_ROWS
    sizes = {"height": height, "width": width, "inputs": inputs, "outputs": outputs, "tiles": tiles, "ranges": ranges}
    return sizes | {"units": parts * ranges, "panels": panels, "block": block}


def run_units(loop: Callable, x: Tensor, y: Tensor, weight: Tensor, others: int, numbers: dict[str, int]) -> None:
    """Run a loop over all units in as many threads as PyTorch uses."""
    threads = min(torch.get_num_threads(), numbers["units"])
    width = numbers["panels"] * PANEL
    size = POINTS * (others * width + numbers["block"] * (others + width)) + 128 + LANES * 9 * PANEL
    space = torch.empty(threads * size)  # of PyTorch, which aligns it and keeps it for the next call
    zeros, unused = torch.zeros(x.shape[1] + y.shape[1]), torch.empty(y.shape[1])
    tensors = {"x": x, "y": y, "weight": weight, "zeros": zeros, "unused": unused, "space": space}
    work = np.zeros(1, WORK)
    for name, value in {**numbers, **{name: tensor.data_ptr() for name, tensor in tensors.items()}}.items():
        work[name] = value
    work["space_size"] = 4 * size
    function, address = c_function(loop), work.ctypes.data
    if threads > 1 and openmp():
        openmp()(function.address, address, threads, 0)
    else:
        list(pool(threads, os.getpid()).map(function.ctypes, [work.ctypes.data_as(ctypes.c_void_p)] * threads))


# ---- convolutions ----


def in_layout(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last)


def convolve(x: Tensor, weight: Tensor, mirrored: bool = False) -> Tensor:
    """Return the convolution of x [N, C, H, W] with padding 1. `mirrored`: x is the gradient of y; return that of x."""
    x, weight = in_layout(x), in_layout(weight)
    outputs = weight.shape[1 if mirrored else 0]
    y = torch.empty(len(x), outputs, *x.shape[2:], memory_format=torch.channels_last)
    numbers = plan(x, outputs, outputs, x.shape[1]) | {"mirrored": int(mirrored)}
    run_units(convolve_units, x, y, weight, x.shape[1], numbers)
    return y


def weight_gradient(x: Tensor, gradient: Tensor) -> Tensor:
    """Return the gradient of the weight [K, C, 3, 3] for an input [N, C, H, W] and the gradient [N, K, H, W] of y."""
    x, gradient = in_layout(x), in_layout(gradient)
    inputs, outputs = x.shape[1], gradient.shape[1]
    numbers = plan(x, outputs, inputs, outputs)
    sums = torch.empty(numbers["ranges"], outputs, 3, 3, inputs)
    run_units(sum_weight_gradients, x, gradient, sums, outputs, numbers)
    return (sums.sum(0) if len(sums) > 1 else sums[0]).permute(0, 3, 1, 2)


class Winograd(torch.autograd.Function):
    """Convolution of x [N, C, H, W] with a weight [K, C, 3, 3], stride 1 and padding 1."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return convolve(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight = ctx.needs_input_grad
        return (
            convolve(gradient, weight, mirrored=True) if needs_x else None,
            weight_gradient(x, gradient) if needs_weight else None,
        )


class WinogradConv2d(PointConv2d):
    """Convolution that trains in float32 on a CPU by Winograd's method; otherwise it is a PointConv2d."""

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        plain = x.dtype == weight.dtype == torch.float32 and x.device.type == "cpu" and self.training
        if not plain or torch.is_autocast_enabled("cpu") or not saves(x.shape):
            return super()._conv_forward(x, weight, bias)
        y = Winograd.apply(x, weight)
        return y if bias is None else y + bias[:, None, None]


def saves(shape: Sequence[int]) -> bool:
    """Return whether there are enough tiles of images [N, C, H, W], and enough of their pixels are used."""
    n, _, height, width = shape
    tiles = -(-height // 4) * -(-width // 4)
    return n * tiles >= 16 and height * width >= 8 * tiles


# ---- encoders ----


def suits(layer: nn.Module) -> bool:
    """Return whether a module is a plain convolution that WinogradConv2d can compute."""
    return (
        type(layer) in (nn.Conv2d, PointConv2d, WinogradConv2d)
        and (layer.kernel_size, layer.stride, layer.padding, layer.dilation) == ((3, 3), (1, 1), (1, 1), (1, 1))
        and (layer.groups, layer.padding_mode) == (1, "zeros")
        and layer.in_channels % PANEL == layer.out_channels % PANEL == 0
    )


def seconds(convolution: Callable[[Tensor, Tensor], Tensor], x: Tensor, weight: Tensor) -> float:
    """Return the time of forward and backward."""
    start = time.perf_counter()
    convolution(x, weight).sum().backward()
    return time.perf_counter() - start


@cache
def is_faster(n: int, inputs: int, outputs: int, height: int, width: int, threads: int) -> bool:
    """Measure whether Winograd's method is at least MARGIN times as fast as PyTorch's convolution, with `threads`."""
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        x = in_layout(torch.randn(n, inputs, height, width)).requires_grad_()
        weight = in_layout(torch.randn(outputs, inputs, 3, 3)).requires_grad_()
    direct = partial(F.conv2d, padding=1)
    times = [(seconds(direct, x, weight), seconds(Winograd.apply, x, weight)) for _ in range(4)][1:]
    return statistics.median(a / b for a, b in times) >= MARGIN


def use_winograd(encoder: nn.Module, image: Tensor, n: int, measured: bool) -> int:
    """Turn convolutions of an encoder into WinogradConv2d, in place, and return their number.

    Args:
        encoder: the encoder.
        image: image [1, C, H, W], from which the size of each convolution's input is known.
        n: images in a batch.
        measured: only those that are measured to be faster.
    """
    shapes: dict[nn.Module, tuple[int, int]] = {}
    layers = [layer for layer in encoder.modules() if suits(layer)]

    def keep(layer: nn.Module, inputs: tuple[Tensor], _: Tensor) -> None:
        shapes[layer] = inputs[0].shape[2:]

    hooks = [layer.register_forward_hook(keep) for layer in layers]
    with torch.no_grad(), in_eval_mode(encoder):
        encoder(image)
    for hook in hooks:
        hook.remove()
    changed = 0
    for layer, size in shapes.items():
        channels = (layer.in_channels, layer.out_channels)
        if saves((n, 0, *size)) and (not measured or is_faster(n, *channels, *size, torch.get_num_threads())):
            layer.__class__ = WinogradConv2d  # keeps parameters; only forward() changes
            changed += 1
    return changed
