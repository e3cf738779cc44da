"""Numbers as pure functions of the optimizer step: no counters, hence nothing to restore when a run is resumed."""

import math


def cosine(start: float, end: float, progress: float) -> float:
    """Half a cosine from `start` (progress 0) to `end` (progress 1); `end` ever after."""
    return end + (start - end) * (1 + math.cos(math.pi * min(progress, 1.0))) / 2


def line(start: float, end: float, progress: float) -> float:
    """A straight line from `start` (progress 0) to `end` (progress 1); `end` ever after."""
    return end + (start - end) * (1 - min(progress, 1.0))


def constant(start: float, end: float, progress: float) -> float:
    """`start`, whatever the progress."""
    return start


CURVES = {"constant": constant, "linear": line, "cosine": cosine}


def warmup(step: int, warmup_steps: float, start: float = 0.0) -> float:
    """A straight line up to 1 over `warmup_steps`, from `start`, where it is one step before the first."""
    return min(1.0, start + (1 - start) * ((step + 1) / warmup_steps)) if step < warmup_steps else 1.0


def warmup_cosine(step: int, total_steps: int, warmup_steps: float, peak: float, end: float) -> float:
    """A straight line up to `peak` over `warmup_steps`, then half a cosine down to `end` at `total_steps`."""
    if step < warmup_steps:
        return peak * warmup(step, warmup_steps)
    return cosine(peak, end, after_warmup(step, total_steps, warmup_steps))


def after_warmup(step: int, total_steps: int, warmup_steps: float) -> float:
    """Progress from the end of the warm-up (0) to the end of the training (1)."""
    return (step - warmup_steps) / max(1, total_steps - warmup_steps)


def warmup_then(
    step: int, total_steps: int, warmup_steps: float, start: float, value: float, end: float, warmup: str, then: str
) -> float:
    """From `start` at step 0 to `value` after `warmup_steps`, then to `end` at `total_steps`.

    Args:
        warmup, then: keys of CURVES, the ways to `value` and to `end`; constant: `value` to the last step.
    """
    if step < warmup_steps:
        return CURVES[warmup](start, value, step / warmup_steps)
    return CURVES[then](value, end, after_warmup(step, total_steps, warmup_steps))


def steps_down(progress: float, milestones: tuple[float, ...], factor: float) -> float:
    """1, multiplied by `factor` at each milestone (a fraction of the training) that `progress` has reached."""
    return factor ** sum(progress >= milestone for milestone in milestones)
