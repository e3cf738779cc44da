"""Label-free measures of feature quality: (features [N, E] or views [N, V, E]) -> dict of scalars.

RankMe is in evaluation/validation.py. Spectra span many orders of magnitude and are computed in float64.
"""

import math

import torch
from torch import Tensor

from self_supervised.numerics import Scores, finite, unit

FIRST_RANK, LAST_RANK = 11, 100  # eigenvalues to which the power law of alpha-ReQ is fitted
KERNEL_T = 2.0  # t of uniformity


def alpha_req(x: Tensor) -> Scores:
    """Return the exponent alpha of the decay of the covariance's eigenvalues, lambda_i ~ i^-alpha; best near 1
    (alpha-ReQ, https://arxiv.org/abs/2202.05808).

    The slope of log lambda over log i is fitted from FIRST_RANK to LAST_RANK, or as far as they exist, each weighted by
    1 / i (Stringer et al., https://doi.org/10.1038/s41586-019-1346-5).
    """
    x = finite(x).double()
    eigenvalues = torch.linalg.eigvalsh((x - x.mean(0)).T @ (x - x.mean(0))).flip(0)
    significant = int((eigenvalues > eigenvalues[0] * 1e-12).sum())  # smaller eigenvalues are rounding errors
    last = min(LAST_RANK, significant)
    first = min(FIRST_RANK, max(1, last // 2))  # if there are few eigenvalues: their second half
    if last - first < 1:
        return {"alpha_req": math.nan}
    i = torch.arange(first, last + 1, dtype=x.dtype, device=x.device)
    w = (1 / i) / (1 / i).sum()
    a = i.log()
    b = eigenvalues[first - 1 : last].log()
    a = a - (w * a).sum()
    b = b - (w * b).sum()
    return {"alpha_req": float(-(w * a * b).sum() / (w * a * a).sum())}


def alignment(views: Tensor) -> Scores:
    """Return the mean squared distance on the unit sphere between two views of one image, over all pairs of views; 0
    if all views coincide (https://arxiv.org/abs/2005.10242, section 4.1, with alpha = 2)."""
    z = unit(finite(views).double())
    v = views.shape[1]
    lengths = z.any(2).sum(1)  # sum of |z|^2, which is 0 for a vector of zeros
    distances = 2 * (v * lengths - z.sum(1).square().sum(1)) / (v * (v - 1))  # [N]: mean over the pairs of an image
    return {"alignment": float(distances.mean())}


def uniformity(x: Tensor) -> Scores:
    """Return the log of the mean over pairs of images of exp(-2 |x - x'|^2) on the unit sphere: 0 for a single point,
    lower for more evenly spread features (https://arxiv.org/abs/2005.10242, section 4.1)."""
    z = unit(finite(x))
    n = len(x)
    if n < 2:
        return {"uniformity": math.nan}
    total = 0.0
    lengths = z.any(1).to(z.dtype)  # |z|^2, which is 0 for a vector of zeros
    for rows, own in zip(z.split(1000), lengths.split(1000), strict=True):  # 1000 x N distances fit into memory
        total += float((KERNEL_T * (2 * rows @ z.T - own[:, None] - lengths)).exp().sum(1).double().sum())
    return {"uniformity": math.log(max(total - n, 1e-300) / (n * (n - 1)))}  # - n: pairs of an image with itself


def lidar(views: Tensor, delta: float = 1e-4) -> Scores:
    """Return the effective rank of the between-image covariance, whitened by the covariance between views of one image
    (LiDAR, https://arxiv.org/abs/2312.04000, equations 1 to 4).

    It is exp of the entropy of the normalized eigenvalues of W^-1/2 B W^-1/2. B is the covariance of the images' means,
    and W is the covariance of the views around these means, plus delta on the diagonal.
    """
    views = finite(views).double()
    means = views.mean(1)
    between = covariance(means - means.mean(0))
    within = covariance((views - means[:, None]).flatten(0, 1))
    within.diagonal().add_(max(delta, 1e-12 * float(within.trace())))  # smaller eigenvalues are rounding errors
    factor = torch.linalg.cholesky(within)  # L^-1 B L^-T has the eigenvalues of W^-1/2 B W^-1/2
    half = torch.linalg.solve_triangular(factor, between, upper=False)
    eigenvalues = torch.linalg.eigvalsh(torch.linalg.solve_triangular(factor, half.T, upper=False)).clamp(min=0)
    p = eigenvalues / eigenvalues.sum().clamp(min=1e-300)
    return {"lidar": float(torch.special.entr(p).sum().exp())}


def covariance(centered: Tensor) -> Tensor:
    return centered.T @ centered / len(centered)
