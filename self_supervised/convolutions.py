"""Convolutions that are faster than PyTorch's where the output is small, with the same parameters and results."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PointConv2d(nn.Conv2d):
    """Convolution that is computed as a linear layer if its output is a single pixel.

    This happens in the last stage of a ResNet on small images. Most taps of the kernel see only padding there, so a
    linear layer over the other taps is many times faster than a convolution.
    """

    shared: dict[tuple[str, bool], Tensor] | None = None  # what the passes within `weights_shared` have in common

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if not self.is_plain:
            return super()._conv_forward(x, weight, bias)
        height, width = x.shape[-2:]
        if self.is_linear(height, width):
            p1, p2 = self.padding
            seen = (slice(None), slice(None), slice(p1, p1 + height), slice(p2, p2 + width))
            taps = self.once(f"taps {height} x {width}", lambda: taps_of(weight, seen))
            return F.linear(x.flatten(1), taps.flatten(1), bias)[:, :, None, None]
        if self.shared is None or bias is not None or not in_bfloat16(x):
            return super()._conv_forward(x, weight, bias)
        is_small = self.kernel_size[0] > 1 and self.outputs(0, height) <= 4 * self.stride[0]
        convolve = ByMatmul.apply if is_small and torch.is_grad_enabled() else F.conv2d
        return convolve(x, self.once("bfloat16", weight.bfloat16), bias, self.stride, self.padding)

    @property
    def is_plain(self) -> bool:
        of_numbers = not isinstance(self.padding, str) and self.padding_mode == "zeros"
        return of_numbers and self.dilation == (1, 1) and self.groups == 1

    def outputs(self, axis: int, size: int) -> int:
        return (size + 2 * self.padding[axis] - self.kernel_size[axis]) // self.stride[axis] + 1

    def is_linear(self, *sizes: int) -> bool:
        """Return whether inputs of this height and width have a single output pixel, and every tap sees one at most."""
        if not self.is_plain:
            return False
        return all(self.outputs(i, n) == 1 and self.padding[i] + n <= self.kernel_size[i] for i, n in enumerate(sizes))

    def once(self, name: str, make: Callable[[], Tensor]) -> Tensor:
        """Return make(), or its result of an earlier pass within `weights_shared`."""
        if self.shared is None:
            return make()
        key = name, torch.is_grad_enabled()  # a tensor that was made without a graph has none for a later pass
        if key not in self.shared:
            self.shared[key] = make()
        return self.shared[key]


def in_bfloat16(x: Tensor) -> bool:
    """Return whether a convolution of x is computed in bfloat16 by autocast on the CPU."""
    is_on = x.device.type == "cpu" and torch.is_autocast_enabled("cpu")
    return is_on and torch.get_autocast_dtype("cpu") == torch.bfloat16


def taps_of(weight: Tensor, seen: tuple[slice, ...]) -> Tensor:
    return Taps.apply(weight, seen) if torch.is_grad_enabled() else weight[seen]


class Taps(torch.autograd.Function):
    """Indexing weight[seen] with a gradient in the weight's memory format, which saves two copies."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, seen: tuple[slice, ...]) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.seen = seen
        return weight[seen].clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        whole = torch.zeros_like(*ctx.saved_tensors)
        whole[ctx.seen] = gradient
        return whole, None


class ByMatmul(torch.autograd.Function):
    """Convolution in bfloat16 whose weight gradient is a matrix product, which is faster than oneDNN's if the output is
    small (docs/performance.md)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: None, stride: tuple, padding: tuple) -> Tensor:
        x = x.to(weight.dtype)
        ctx.save_for_backward(x, weight)
        ctx.options = stride, padding
        return F.conv2d(x, weight, bias, stride, padding)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        stride, padding = ctx.options
        mask = [ctx.needs_input_grad[0], False, False]
        options = (stride, padding, (1, 1), False, (0, 0), 1, mask)
        of_x = torch.ops.aten.convolution_backward(gradient, x, weight, None, *options)[0]
        (n, outputs, *pixels), (_, inputs, k1, k2) = gradient.shape, weight.shape
        x = F.pad(x.permute(0, 2, 3, 1), (0, 0, padding[1], padding[1], padding[0], padding[0]))
        image, row, column, channel = x.stride()
        strides = (image, stride[0] * row, stride[1] * column, row, column, channel)
        patches = x.as_strided((n, *pixels, k1, k2, inputs), strides).reshape(-1, k1 * k2 * inputs)
        of_weight = gradient.permute(0, 2, 3, 1).reshape(-1, outputs).T @ patches
        return of_x, of_weight.view(outputs, k1, k2, inputs).permute(0, 3, 1, 2), None, None, None


@contextmanager
def weights_shared(*networks: nn.Module | None) -> Iterator[None]:
    """Convert the weights of plain convolutions, and select their taps, once for all passes within this context.

    Both have gradients, which are added up before they are converted back. Autocast itself converts weights that are
    not trained, such as those of a lagging model, in every pass. Compiled networks stay as they are.
    """
    eager = [network for network in networks if network is not None and network._compiled_call_impl is None]
    layers = [layer for network in eager for layer in network.modules() if type(layer) is PointConv2d]
    for layer in layers:
        layer.shared = {}
    try:
        yield
    finally:
        for layer in layers:
            layer.shared = None


def exchange_convolutions(module: nn.Module, kind: type[nn.Conv2d]) -> None:
    """Turn all plain convolutions of a module into another kind, in place."""
    for layer in module.modules():
        if type(layer) is nn.Conv2d:
            layer.__class__ = kind  # keeps parameters and initial values; only forward() changes
