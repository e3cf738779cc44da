"""Numerics of features and weights: unit vectors of any scale, ranks of labels, checks for NaN and infinity, dtype and
device of losses and scores, tensors of views and terms joined, and random generators."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

EXPONENT = {torch.float32: (torch.int32, 0x7F800000), torch.float64: (torch.int64, 0x7FF0000000000000)}  # IEEE 754
STATISTICS = ("running_mean", "running_var", "running_std")

Scores = dict[str, float]  # name of a metric -> value


class NotFinite(ValueError):
    """Error for NaN or infinity where a score or a file needs finite numbers."""


def unit(x: Tensor) -> Tensor:
    """Return vectors [..., E] divided by their lengths, in float32 or float64. Zero vectors stay zero.

    F.normalize alone turns vectors below 1e-12 and above 1e19 into zeros. In between, the result is bit-identical to
    that of F.normalize, because the division by a power of two before it is exact.
    """
    x = at_least_float32(x)
    largest = x.detach().abs().amax(-1, keepdim=True)
    return F.normalize(x / power_of_two(largest), dim=-1)


def rank_of(labels: Tensor, logits: Tensor) -> Tensor:
    """Return how many other classes have a logit at least as high as the image's own class, [N], from logits [N, C].
    Ties and NaN count against the image, so that rank 0 means a strict maximum."""
    return (~(logits < logits.gather(1, labels.unsqueeze(1)))).sum(1) - 1


def power_of_two(largest: Tensor) -> Tensor:
    """Return the power of two at or below each number. It is read from the bits of the exponent, so the host does not
    wait for the device."""
    integer, exponent = EXPONENT[largest.dtype]
    power = (largest.view(integer) & exponent).view(largest.dtype)
    return power.clamp(min=torch.finfo(largest.dtype).tiny)  # for 0


def rescaled(x: Tensor) -> Tensor:
    """Return all numbers divided by one power of two, so that the largest is from 1 to 2 and sums of squares stay
    finite."""
    return x / power_of_two(x.abs().amax())


def finite(x: Tensor, what: str = "features", names: Sequence[str] | None = None) -> Tensor:
    """Return x [N, ...] in float32 or float64, after a check for NaN and infinity.

    Args:
        x: features or other rows of numbers.
        what: name of x in the error.
        names: names of the rows; default: their indices.

    Raises:
        NotFinite: there are NaN or infinite numbers. The message counts their rows.
    """
    bad = ~x.isfinite().flatten(1).all(1)
    if bad.any():
        rows = bad.nonzero().flatten().tolist()
        first = rows[0] if names is None else names[rows[0]]
        raise NotFinite(
            f"{what}: {len(rows):,} of {len(x):,} rows are not finite (the first: {first}). Choose an earlier "
            "checkpoint, or precision 32-true if half precision overflows."
        )
    return at_least_float32(x)


def not_finite(module: nn.Module) -> list[str]:
    """Return the names of weights and running statistics with NaN or infinity, and of other buffers with NaN. Infinity
    in those is intended, for example in attention masks."""
    good = {name: weight.isfinite().all() for name, weight in module.named_parameters()}
    for name, buffer in module.named_buffers():
        known = buffer if name.endswith(STATISTICS) else buffer.nan_to_num(math.nan, 0, 0)
        good[name] = known.isfinite().all()
    flags = torch.stack(list(good.values())).tolist() if good else []  # waits for the device once
    return [name for name, is_good in zip(good, flags, strict=True) if not is_good]


def at_least_float32(values: Tensor) -> Tensor:
    """Return half precision as float32 and float64 as it is: losses and scores are computed in these."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def on_scoring_device(x: Tensor | None) -> Tensor | None:
    """Return x, copied to the host if it is on Apple's MPS, which lacks float64 and most of torch.linalg."""
    return x.cpu() if x is not None and x.device.type == "mps" else x


def in_parts(x: Tensor, size: int | None) -> tuple[Tensor, ...]:
    """Return the rows of x [N, ...] in parts of nearly the same size, at most `size`; None: in one part."""
    return x.tensor_split(-(-len(x) // (size or len(x))))


def stacked(of_views: dict[int, Tensor]) -> Tensor:
    """Return the tensors of all views as one, in the order of the views' numbers."""
    return torch.stack([of_views[i] for i in sorted(of_views)])


def as_tensors(values: dict[str, float], like: Tensor) -> dict[str, Tensor]:
    """Return numbers as scalars with the dtype and device of a tensor."""
    return {name: like.new_full((), value) for name, value in values.items()}


def mean_of_each(of_pairs: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return the mean of each scalar over the pairs of views."""
    return {name: torch.stack([scalars[name] for scalars in of_pairs]).mean() for name in of_pairs[0]}


def with_sum(terms: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the terms of a loss, and their sum as "loss"."""
    return {"loss": torch.stack(list(terms.values())).sum(), **terms}


def generator(seed: int | tuple[int, ...]) -> np.random.Generator:
    """Return a counter-based generator (Philox): nearby seeds give unrelated streams, and there is no state to save."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(seed)))


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw from `seed` within the context, and leave the caller's generators of CPU and GPUs as they are.

    Those of CUDA are seeded only where they may be used, because a process that has initialized CUDA cannot be forked.
    """
    on_gpu = torch.cuda.is_initialized() or torch.get_default_device().type != "cpu"  # of `Trainer.init_module`
    with torch.random.fork_rng(range(torch.cuda.device_count()) if on_gpu else [], device_type="cuda"):
        (torch.manual_seed if on_gpu else torch.default_generator.manual_seed)(seed)
        yield
