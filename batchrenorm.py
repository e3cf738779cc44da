"""Batch renormalization (Ioffe, https://arxiv.org/abs/1702.03275): batch norm corrected by running statistics."""

import torch
from torch import Tensor, nn

from self_supervised.numerics import at_least_float32


class BatchRenorm(nn.Module):
    """Batch renormalization over all axes but the second: ((x - mean) / std * r + d) * weight + bias.

    `mean` and `std` are those of the batch. r and d correct them toward the running statistics (algorithm 1) and have
    no gradient. They are clipped to [1 / rmax, rmax] and [-dmax, dmax]. These intervals widen with the number of
    batches: before batch 5,000 the layer is exactly batch norm. std is sqrt(biased variance + eps). All statistics are
    in at least float32.

    Args:
        num_features: C, the size of the second axis.
        eps: added to the variance before the square root.
        momentum: weight of a batch in the running statistics.
        affine: whether there are a weight and a bias, [C] each.
    """

    dimensions: tuple[int, ...] = ()  # allowed numbers of axes of the input

    def __init__(self, num_features: int, eps: float = 1e-5, momentum: float = 0.01, affine: bool = True):
        super().__init__()
        self.eps = eps
        self.momentum = momentum
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_std", torch.ones(num_features))
        self.register_buffer("num_batches_tracked", torch.tensor(0))
        self.weight = nn.Parameter(torch.ones(num_features)) if affine else None
        self.bias = nn.Parameter(torch.zeros(num_features)) if affine else None

    @property
    def rmax(self) -> Tensor:
        return (25 / 35 + 2 / 35000 * self.num_batches_tracked).clamp(1.0, 3.0)

    @property
    def dmax(self) -> Tensor:
        return (-25 / 20 + 5 / 20000 * self.num_batches_tracked).clamp(0.0, 5.0)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() not in self.dimensions:
            expected = " or ".join(f"{d}D" for d in self.dimensions)
            raise ValueError(
                f"{type(self).__name__} expects {expected} input, got {x.dim()}D input of shape {tuple(x.shape)}"
            )
        dtype = x.dtype
        x = at_least_float32(x)
        column = (1, -1) + (1,) * (x.dim() - 2)  # shape in which statistics broadcast along axis 1
        if self.training:
            x = self._renormalized(x, column)
        else:
            x = (x - self.running_mean.view(column)) / self.running_std.view(column)
        if self.weight is not None:
            x = x * self.weight.view(column) + self.bias.view(column)
        return x.to(dtype)

    def _renormalized(self, x: Tensor, column: tuple[int, ...]) -> Tensor:
        axes = [axis for axis in range(x.dim()) if axis != 1]
        if x.numel() == x.shape[1]:  # as PyTorch's batch norm
            raise ValueError(f"Expected more than 1 value per channel when training, got input size {x.shape}")
        mean = x.mean(axes)
        std = (x.var(axes, correction=0) + self.eps).sqrt()
        with torch.no_grad():
            r = torch.clamp(std / self.running_std, 1 / self.rmax, self.rmax)
            d = torch.clamp((mean - self.running_mean) / self.running_std, -self.dmax, self.dmax)
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
            self.running_std.lerp_(std.to(self.running_std.dtype), self.momentum)
            self.num_batches_tracked += 1
        return (x - mean.view(column)) / std.view(column) * r.view(column) + d.view(column)


class BatchRenorm1d(BatchRenorm):
    """Batch renormalization of [N, C] or [N, C, L]."""

    dimensions = (2, 3)


class BatchRenorm2d(BatchRenorm):
    """Batch renormalization of [N, C, H, W]."""

    dimensions = (4,)


class BatchRenorm3d(BatchRenorm):
    """Batch renormalization of [N, C, T, H, W]."""

    dimensions = (5,)
