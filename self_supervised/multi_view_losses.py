"""Losses that see all views of an image at once, as one table: `get_loss_of_views`. V views, L of them large.

They get queries [V, N, D] and keys [L, N, D] of this process and return a dict of scalars, as those of `losses.py` do.
"""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from model_params import ModelParams
from self_supervised import distributed
from self_supervised.losses import Scalars
from self_supervised.numerics import with_sum

N_SLICES, LAST_FREQUENCY, N_FREQUENCIES = 256, 3.0, 17  # of SIGReg: those of the authors' code
N_SORTED_SLICES, STD_EPSILON = 1024, 1e-4  # of VISReg
CODING_PRECISION = 0.2  # epsilon of EMP-SSL's coding rate: that of the authors' code


def get_loss_of_views(params: ModelParams, seed: tuple[int, ...]) -> Callable[[Tensor, Tensor], Scalars]:
    """Return the function loss(queries, keys) that `params` selects. `seed` is that of this step."""
    p = params
    table = {
        "fastsiam": fastsiam,
        "lejepa": lambda q, _: lejepa(joined_rows(q), p.n_large_views, p.sigreg_weight, seed),
        "visreg": lambda q, _: visreg(joined_rows(q), p.n_large_views, p.sigreg_weight, seed),
        "emp": lambda q, _: emp_ssl(joined_rows(q), p.invariance_loss_weight),
        "frossl": lambda q, _: frossl(joined_rows(q), p.invariance_loss_weight),
        "mmcr": lambda q, k: mmcr(
            joined_rows(torch.cat([q, k]) if p.use_lagging_model else q), p.invariance_loss_weight
        ),
    }
    return table[p.loss_type]


def joined_rows(z: Tensor) -> Tensor:
    """Return the rows of all processes: [V, N, D] -> [V, W N, D]."""
    return distributed.gather(z.transpose(0, 1)).transpose(0, 1)


def fastsiam(q: Tensor, k: Tensor) -> Scalars:
    """FastSiam (https://link.springer.com/chapter/10.1007/978-3-031-16788-1_4, equation 4): 1 - cosine of each query
    and the mean of the other views' keys."""
    of_small = k.mean(0).expand(len(q) - len(k), -1, -1)
    others = torch.cat([(k.sum(0) - k) / (len(k) - 1), of_small])
    return {"loss": 1 - F.cosine_similarity(q, others, dim=2).mean()}


def lejepa(z: Tensor, n_large: int, weight: float, seed: tuple[int, ...]) -> Scalars:
    """LeJEPA (https://arxiv.org/abs/2511.08544, algorithm 2): normally distributed views near the mean of the large.

    Args:
        z: projections [V, N, D]; the large views are the first.
        weight: weight of SIGReg; that of the squared distances is 1 - weight.
        seed: of the directions, in which all processes must agree.
    """
    return near_large_views(z, n_large, weight, {"loss_sigreg": sigreg(z, seed)})


def near_large_views(z: Tensor, n_large: int, weight: float, terms: Scalars) -> Scalars:
    """Return (1 - weight) times the squared distance to the mean of the large views, plus `weight` times all terms."""
    invariance = (z - z[:n_large].mean(0)).square().mean()
    weighted = {"loss_invariance": (1 - weight) * invariance, **{name: weight * x for name, x in terms.items()}}
    return with_sum(weighted)


def sigreg(z: Tensor, seed: tuple[int, ...]) -> Tensor:
    """Return how far z [V, N, D] is from a standard normal distribution (LeJEPA, algorithm 1).

    It is the mean over views and N_SLICES random directions of Epps and Pulley's statistic, N times the integral of the
    squared distance between both characteristic functions (trapezoidal rule).
    """
    t = torch.linspace(0, LAST_FREQUENCY, N_FREQUENCIES, dtype=z.dtype, device=z.device)
    angles = slices(z, N_SLICES, seed).unsqueeze(3) * t
    normal = torch.exp(-t.square() / 2)
    distances = (angles.cos().mean(1) - normal).square() + angles.sin().mean(1).square()
    return 2 * z.shape[1] * torch.trapezoid(distances * normal, t).mean()


def slices(z: Tensor, number: int, seed: tuple[int, ...]) -> Tensor:
    """Return z [V, N, D] along random directions [V, N, number]."""
    drawn = np.random.default_rng(seed).standard_normal((z.shape[2], number))
    return z @ F.normalize(distributed.to_device(torch.from_numpy(drawn).to(z.dtype), z.device), dim=0)


def visreg(z: Tensor, n_large: int, weight: float, seed: tuple[int, ...]) -> Scalars:
    """VISReg (https://arxiv.org/abs/2606.02572, algorithm 1): LeJEPA with other terms in place of SIGReg.

    In every dimension, the batch of a view should have the mean 0 (equation 6) and the standard deviation 1 (equation
    1), and along random directions, divided by it, the quantiles of a standard normal distribution (equation 5).
    """
    mean, std = z.mean(1, keepdim=True), z.std(1, correction=0, keepdim=True)
    places = torch.arange(1, z.shape[1] + 1, dtype=torch.float64) / (z.shape[1] + 1)  # not on MPS, which lacks float64
    quantiles = distributed.to_device(torch.special.ndtri(places).to(z.dtype), z.device)[:, None]
    shape = slices((z - mean) / (std.detach() + STD_EPSILON), N_SORTED_SLICES, seed).sort(1).values - quantiles
    terms = {"loss_center": mean, "loss_scale": 1 - std, "loss_shape": shape}
    return near_large_views(z, n_large, weight, {name: x.square().mean() for name, x in terms.items()})


def emp_ssl(z: Tensor, invariance: float) -> Scalars:
    """EMP-SSL (https://arxiv.org/abs/2304.03977, equation 4): views [V, N, D] near their mean, with a high coding
    rate."""
    _, n, d = z.shape
    gram = torch.eye(d, dtype=z.dtype, device=z.device) + d / (n * CODING_PRECISION) * z.mT @ z
    terms = {
        "loss_invariance": -invariance * F.cosine_similarity(z, z.mean(0, keepdim=True), dim=2).mean(),
        "loss_coding_rate": -torch.logdet(gram).mean() / 2,
    }
    return with_sum(terms)


def frossl(z: Tensor, invariance: float) -> Scalars:
    """FroSSL (https://arxiv.org/abs/2310.02903): views [V, N, D] near their mean, with covariances of a small norm."""
    v, n, d = z.shape
    z = F.normalize(z, dim=1)
    covariance = z.mT @ z if n > d else z @ z.mT
    covariance = covariance / covariance.diagonal(dim1=1, dim2=2).sum(1).detach()[:, None, None]
    terms = {
        "loss_invariance": invariance * v**2 * d * (z - z.mean(0)).square().mean(),
        "loss_entropy": covariance.square().sum((1, 2)).log().sum(),
    }
    return with_sum(terms)


def mmcr(z: Tensor, local: float) -> Scalars:
    """MMCR (https://arxiv.org/abs/2303.03307, equation 3): mean views of N images have a large nuclear norm, and the
    views [V, N, D] of one image a small one, of the weight `local`."""
    terms = {"loss_centroids": -torch.linalg.svdvals(z.mean(0)).sum()}
    if local:
        terms["loss_views"] = local * torch.linalg.svdvals(z.transpose(0, 1)).sum() / z.shape[1]
    return with_sum(terms)
