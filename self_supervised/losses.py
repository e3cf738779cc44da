"""Losses as pure functions of tensors, and the table that binds each of them to its settings.

Sizes: N queries on this process, W processes, D dimensions, K keys in the queue. Each loss returns a dict of scalars:
"loss" is minimized, the others are logged. Inputs are in at least float32 (`moco.py` converts them under autocast).
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from model_params import DROP_LAST, LOSSES, ModelParams
from self_supervised import distributed
from self_supervised.numerics import in_parts, unit, with_sum

Scalars = dict[str, Tensor]
PairLoss = Callable[[Tensor, Tensor, Tensor | None], Scalars]
ALL_ROWS = slice(None)


def similarities(
    q: Tensor,
    k: Tensor,
    queue: Tensor | None = None,
    in_batch: bool = False,
    same_view: bool = False,
    rows: slice = ALL_ROWS,
) -> Tensor:
    """Return the inner products of each query with its positive key and with its negatives, [N, 1 + negatives].

    Args:
        q, k: queries and keys [N, D]. Row n of k is the positive key of row n of q, whose product is in column 0.
        queue: K negatives of all queries [K, D], or None.
        in_batch: use the keys of all other images in the batches of all processes as negatives (W N - 1).
        same_view: use the other queries as negatives (W N - 1). With `in_batch` these are the 2 W N - 2 negatives of
            NT-Xent (SimCLR, https://arxiv.org/abs/2002.05709, equation 1).
        rows: the queries that have a row in the result; all are negatives.
    """
    chosen = q[rows]
    columns = [(chosen * k[rows]).sum(1, keepdim=True)]
    others = (x for x, is_used in ((k, in_batch), (q, same_view)) if is_used)
    columns += [_without_own_column(chosen @ x.T, rows) for x in distributed.gather_each(*others)]
    if queue is not None:
        columns.append(chosen @ queue.T)
    return torch.cat(columns, dim=1)


def _without_own_column(products: Tensor, rows: slice = ALL_ROWS) -> Tensor:
    """Remove the column of its own image from each of these rows, [n, W N] -> [n, W N - 1]."""
    m = products.shape[1]
    own = distributed.own_rows(torch.arange(m, device=products.device))[rows].unsqueeze(1)
    others = torch.arange(m - 1, device=products.device).unsqueeze(0)
    return products.gather(1, others + (others >= own))  # a boolean mask would wait for the device


def _n_closer(negatives: Tensor, own: Tensor) -> Tensor:
    """Return how many negatives [N, M] of each query are at least as similar as its positive key [N, 1]; NaN counts."""
    return (~(negatives < own)).sum(1)


def _accuracies(sim: Tensor, n_closer_in_queue: Tensor | int = 0) -> Scalars:
    """Return the percentage of queries whose positive key is the most similar, or among the five most similar.

    Ties count against the positive key, so that the accuracies are 0 if all keys are equal or NaN.
    """
    n_closer = _n_closer(sim[:, 1:], sim[:, :1]) + n_closer_in_queue
    return {f"step_train_acc{k}": (n_closer < k).float().mean() * 100 for k in (1, 5)}


class QueueLogit(torch.autograd.Function):
    """The keys of a queue as a single negative: log sum exp(q key / temperature), [N, 1], and `_n_closer` of the keys.

    The queue is read once, in chunks whose similarities stay in a CPU's cache, and nothing of size N x K is stored. The
    gradient with respect to q, a mean of the keys weighted by their softmax, is accumulated with the sum. The queue has
    none.
    """

    CHUNK = 2048  # keys: 2 MB of similarities with 256 queries

    @staticmethod
    def forward(ctx, q: Tensor, queue: Tensor, own: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        largest = q.new_full((len(q), 1), -math.inf)
        total, mean, n_closer = torch.zeros_like(largest), torch.zeros_like(q), 0
        for keys in queue.split(QueueLogit.CHUNK if q.device.type == "cpu" else len(queue)):
            sim = q @ keys.T
            n_closer = n_closer + _n_closer(sim, own)
            before, largest = largest, torch.maximum(largest, sim.amax(1, keepdim=True) / temperature)
            weights = sim.div_(temperature).sub_(largest).exp_()
            shrink = (before - largest).exp_()
            total.mul_(shrink).add_(weights.sum(1, keepdim=True))
            mean.mul_(shrink).addmm_(weights, keys)
        ctx.save_for_backward(mean.div_(total * temperature))
        ctx.mark_non_differentiable(n_closer)
        return largest + total.log(), n_closer

    @staticmethod
    def backward(ctx, gradient: Tensor, _: Tensor) -> tuple[Tensor, None, None, None]:
        return gradient * ctx.saved_tensors[0], None, None, None


def cross_entropy(
    sim: Tensor,
    temperature: float,
    eqco_alpha: float | None = None,
    q: Tensor | None = None,
    queue: Tensor | None = None,
) -> Scalars:
    """InfoNCE: -log softmax(sim / temperature)[:, 0] (MoCo, https://arxiv.org/abs/1911.05722, equation 1).

    With `eqco_alpha`, the negatives count as if there were alpha of them (EqCo, https://arxiv.org/abs/2010.01929,
    equation 5): log(alpha / number of negatives) is added to their logits.

    Args:
        sim: `similarities` of the queries, [N, 1 + M].
        q, queue: queries [N, D] and K more negatives [K, D] of each. The result is as if `sim` had K more columns, but
            without the N x K matrices that these would need.
    """
    logits = sim / temperature
    n_negatives = sim.shape[1] - 1
    n_closer_in_queue = 0
    if queue is not None:
        queue_logit, n_closer_in_queue = QueueLogit.apply(q, queue, sim[:, :1].detach(), temperature)
        logits = torch.cat([logits, queue_logit], dim=1)
        n_negatives += len(queue)
    if eqco_alpha is not None:
        margin = math.log(eqco_alpha / max(1, n_negatives))  # 0 negatives if the last batch has one image
        logits = torch.cat([logits[:, :1], logits[:, 1:] + margin], dim=1)
    loss = F.cross_entropy(logits, logits.new_zeros(len(logits), dtype=torch.long))
    return {"loss": loss, **_accuracies(sim, n_closer_in_queue)}


def decoupled(sim: Tensor, temperature: float, sigma: float | None) -> Scalars:
    """Decoupled contrastive loss: InfoNCE whose denominator has the negatives alone (DCL,
    https://arxiv.org/abs/2110.06848, equation 6).

    With `sigma`, the product s of a query and its positive key has the weight 2 - exp(s / sigma) / mean of
    exp(s / sigma) over the images of all processes (DCLW, equation 7).
    """
    own = sim[:, 0]
    weight: Tensor | float = 1.0
    if sigma is not None:
        of_all = distributed.gather(own)
        weight = distributed.own_rows(2 - len(of_all) * torch.softmax(of_all / sigma, dim=0))
    loss = torch.logsumexp(sim[:, 1:] / temperature, dim=1) - weight * own / temperature
    loss = loss if sim.shape[1] > 1 else 0 * own  # if the last batch has one image
    return {"loss": loss.mean(), **_accuracies(sim)}


def binary_cross_entropy(sim: Tensor, temperature: float) -> Scalars:
    """Binary cross entropy of similarities s.

    -log sigmoid(s / temperature) of the positive key, plus the mean of -log sigmoid(-s / temperature) over negatives.
    """
    logits = sim / temperature
    loss = F.softplus(-logits[:, 0]).mean()
    if sim.shape[1] == 1:
        return {"loss": loss}
    return {"loss": loss + F.softplus(logits[:, 1:]).mean(), **_accuracies(sim)}


def supervised(sim: Tensor, same_class: Tensor, temperature: float) -> Scalars:
    """Supervised contrastive loss (SupCon, https://arxiv.org/abs/2004.11362, equation 2).

    Args:
        sim: `similarities` of the queries, [N, 1 + M].
        same_class: whether these columns show the query's class, [N, 1 + M] (`same_class_mask`); column 0 always does.
    """
    log_softmax = F.log_softmax(sim / temperature, dim=1)
    loss = -(log_softmax * same_class).sum(1) / same_class.sum(1)
    of_nearest = same_class.gather(1, sim.argmax(1, keepdim=True))
    return {"loss": loss.mean(), "step_train_acc1": of_nearest.float().mean() * 100}


def same_class_mask(labels: Tensor | None, n_kinds: int) -> Tensor:
    """Return which columns of `similarities`, with `n_kinds` kinds of negatives, show the class of the query.

    An image with the label -1 is of no class, and its positive key is the only one like it. Without one label per
    image, a ValueError is raised.
    """
    if labels is None or labels.numel() != len(labels):
        raise ValueError("loss_type='supcon' needs one label per image. Yield (images, labels); -1: unlabeled.")
    labels = labels.flatten()
    same = (labels[:, None] == distributed.gather(labels)) & (labels[:, None] >= 0)
    own = torch.ones_like(same[:, :1])
    return torch.cat([own, *[_without_own_column(same)] * n_kinds], dim=1)


def to_prototypes(scores: Tensor, target: Tensor, temperature: float) -> Scalars:
    """Cross entropy of softmax(scores / temperature) over P prototypes and a key's target distribution, both [N, P]
    (SwAV, https://arxiv.org/abs/2006.09882, equation 2; DINO, https://arxiv.org/abs/2104.14294, equation 2).

    "step_prototypes" is the number of prototypes over which the targets are spread: exp(entropy of their mean).
    """
    entropy = torch.special.entr(target.mean(0)).sum()
    return {"loss": F.cross_entropy(scores / temperature, target), "step_prototypes": entropy.exp()}


def inner_product(sim: Tensor) -> Scalars:
    """1 - s of the positive key, plus the mean of 1 + s over negatives, where s are similarities.

    Without negatives this is half of BYOL's loss (2 - 2 cos, https://arxiv.org/abs/2006.07733, equation 2).
    """
    loss = 1 - sim[:, 0].mean()
    if sim.shape[1] == 1:
        return {"loss": loss}
    return {"loss": loss + 1 + sim[:, 1:].mean(), **_accuracies(sim)}


def sce(
    sim: Tensor, key_sim: Tensor, temperature: float, target_temperature: float, coefficient: float | None
) -> Scalars:
    """Similarity contrastive estimation (https://arxiv.org/abs/2111.14585, equations 4 to 7).

    The target distribution of a query has `coefficient` on its positive key. The rest is spread over the other keys by
    a softmax over their similarities to the positive key.

    Coefficient 1 is InfoNCE. Coefficient 0 is ReSSL (https://arxiv.org/abs/2107.09282, equation 5), where the positive
    key is also removed from the query's candidates, as in its authors' code. For any coefficient above 0 it remains a
    candidate (proposition 1), so the loss drops at the step at which a schedule reaches 0. Without in-batch keys,
    eztorch gives the positive key a similarity of 0 in that softmax; this function leaves it out. With the coefficient
    None the positive key is weighed as all others are, by its similarity to itself (SEED,
    https://arxiv.org/abs/2101.04731).

    Args:
        sim: `similarities` of the queries, [N, 1 + M].
        key_sim: `similarities` of the keys, with the same columns. Column 0 is a key with itself.
    """
    key_sim = key_sim.detach()
    if coefficient is None:
        target = torch.softmax(key_sim / target_temperature, dim=1)
    else:
        relations = torch.softmax(key_sim[:, 1:] / target_temperature, dim=1) * (1 - coefficient)
        target = torch.cat([torch.full_like(sim[:, :1], coefficient), relations], dim=1)
    first = 1 if coefficient == 0 and sim.shape[1] > 1 else 0  # column of the first candidate; 0 is the positive key
    loss = F.cross_entropy(sim[:, first:] / temperature, target[:, first:])
    return {"loss": loss, **_accuracies(sim)}


def _at_least_two(z: Tensor) -> Tensor:
    if len(z) < 2:
        raise ValueError(f"loss_type='vic' and 'barlow' need two images, but a batch has one. Set {DROP_LAST}.")
    return z


def vicreg(a: Tensor, b: Tensor, invariance: float, variance: float, covariance: float, epsilon: float) -> Scalars:
    """Variance-invariance-covariance regularization (https://arxiv.org/abs/2105.04906, equations 1 to 6).

    The variance term is the sum over both views, as in equation 6. The authors' code halves it, so their weight of 25
    is 12.5 here. The invariance is the mean over dimensions, as in the authors' code; equation 5 has their sum.

    Args:
        a, b: projections of both views, [N, D], from all processes. N is at least 2.
    """
    n, d = _at_least_two(a).shape

    def spread(z: Tensor) -> tuple[Tensor, Tensor]:
        centered = z - z.mean(0)
        matrix = centered.T @ centered / (n - 1)
        std = (matrix.diagonal() + epsilon).sqrt()
        return F.relu(1 - std).mean(), (matrix.square().sum() - matrix.diagonal().square().sum()) / d

    (variance_a, covariance_a), (variance_b, covariance_b) = spread(a), spread(b)
    terms = {
        "loss_invariance": invariance * F.mse_loss(a, b),
        "loss_variance": variance * (variance_a + variance_b),
        "loss_covariance": covariance * (covariance_a + covariance_b),
    }
    return with_sum(terms)


def barlow_twins(a: Tensor, b: Tensor, redundancy_weight: float) -> Scalars:
    """Barlow Twins (https://arxiv.org/abs/2103.03230, equation 1): cross-correlation of the views against the identity.

    Args:
        a, b: projections of both views, [N, D], from all processes. N is at least 2. They are standardized with the
            biased variance + 1e-5, as by the authors' batch norm.
    """

    def standardize(z: Tensor) -> Tensor:
        return (z - z.mean(0)) / (z.var(0, correction=0) + 1e-5).sqrt()

    correlation = standardize(_at_least_two(a)).T @ standardize(b) / len(a)
    on_diagonal = (correlation.diagonal() - 1).square().sum()
    off_diagonal = correlation.square().sum() - correlation.diagonal().square().sum()
    return with_sum({"loss_invariance": on_diagonal, "loss_redundancy": redundancy_weight * off_diagonal})


@torch.no_grad()
def cosines(z: Tensor, k: Tensor) -> Scalars:
    """Return the mean cosine of z [N, D] with positive keys k [N, D] and with other images' keys, and the spread of z.

    The spread is the standard deviation of z / |z| times sqrt(D): 1 if the projections are spread evenly over the
    sphere, 0 if they are a single point, which is a collapse.
    """
    z, k = unit(z), unit(k)
    n = len(z)
    own = (z * k).sum()
    others = z.sum(0) @ k.sum(0) - own  # sum over all pairs, without an N x N matrix
    spread = (1 - z.mean(0).square().sum()).clamp(min=0).sqrt()  # of unit vectors, the variances add up to its square
    spread = spread if n > 1 else torch.full_like(spread, math.nan)
    return {
        "step_pos_cos": own / n,
        "step_neg_cos": others / max(1, n * (n - 1)),
        "step_projection_std": spread,
    }


def get_loss(
    params: ModelParams,
    sce_coefficient: float | None = None,
    sce_target_T: float | None = None,
    labels: Tensor | None = None,
    rows: slice = ALL_ROWS,
) -> PairLoss:
    """Return the function loss(q, k, queue_keys) that `params` selects. Each row shows which settings a loss reads.

    Args:
        sce_coefficient, sce_target_T: values at this step, if they change during training; None: those of `params`.
        labels: classes of the images [N], for the losses that read them.
        rows: the queries over which a loss that is computed `by_rows` is a mean.
    """
    p = params
    coefficient = p.sce_coefficient if sce_coefficient is None else sce_coefficient
    target_T = p.sce_target_T if sce_target_T is None else sce_target_T

    from_batch = (p.use_negative_examples_from_batch, p.use_negative_examples_from_same_view)

    def negatives_of(queue: Tensor | None) -> Tensor | None:
        return queue if p.use_negative_examples_from_queue else None

    def sim(q: Tensor, k: Tensor, queue: Tensor | None) -> Tensor:
        q, k = (k, q) if p.use_nearest_keys else (q, k)  # NNCLR's softmax is over the queries of a key
        return similarities(q, k, negatives_of(queue), *from_batch, rows=rows)

    alpha = p.eqco_alpha if p.use_eqco_margin else None
    vic_weights = (p.invariance_loss_weight, p.variance_loss_weight, p.covariance_loss_weight, p.variance_loss_epsilon)
    losses = {
        # The queue is read in chunks instead of through sim, so that N x K similarities are never stored. It holds no
        # negatives if use_nearest_keys swaps q and k.
        "ce": lambda q, k, queue: cross_entropy(sim(q, k, None), p.T, alpha, q[rows], negatives_of(queue)),
        "dcl": lambda q, k, queue: decoupled(sim(q, k, queue), p.T, p.dcl_sigma),
        "bce": lambda q, k, queue: binary_cross_entropy(sim(q, k, queue), p.T),
        "ip": lambda q, k, queue: inner_product(sim(q, k, queue)),
        "supcon": lambda q, k, _: supervised(sim(q, k, None), same_class_mask(labels, sum(from_batch)), p.T),
        **dict.fromkeys(("swav", "dino"), lambda scores, target, _: to_prototypes(scores, target, p.T)),
        "sce": lambda q, k, queue: sce(sim(q, k, queue), sim(k, k, queue), p.T, target_T, coefficient),
        "seed": lambda q, k, queue: sce(sim(q, k, queue), sim(k, k, queue), p.T, target_T, None),
        "vic": lambda q, k, _: vicreg(*distributed.gather_each(q, k), *vic_weights),
        "barlow": lambda q, k, _: barlow_twins(*distributed.gather_each(q, k), p.redundancy_loss_weight),
    }
    return losses[p.loss_type]


def get_loss_in_parts(params: ModelParams, **arguments: Any) -> PairLoss:
    """Return the function of `get_loss`, with less memory if `micro_batch_size` is set: similarities of so many queries
    at a time, which are computed again in the backward pass. Losses that are not `by_rows` are computed at once."""
    size = params.micro_batch_size
    if size is None or not LOSSES[params.loss_type].by_rows:
        return get_loss(params, **arguments)

    def loss(q: Tensor, k: Tensor, queue: Tensor | None) -> Scalars:
        scalars_of_parts = []
        for part in in_parts(torch.arange(len(q)), size):
            of_rows = get_loss(params, **arguments, rows=slice(int(part[0]), int(part[-1]) + 1))
            scalars = checkpoint(of_rows, q, k, queue, use_reentrant=False, preserve_rng_state=False)
            scalars_of_parts.append({name: value * (len(part) / len(q)) for name, value in scalars.items()})
        return {name: torch.stack([part[name] for part in scalars_of_parts]).sum() for name in scalars_of_parts[0]}

    return loss
