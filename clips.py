"""Which frames make a clip: pure functions of the times of a video's frames and of what is drawn.

A clip covers a span of `duration` seconds, times a speed, times a jitter. Of the frames that begin within it,
`n_frames` are taken, evenly spread from the first to the last (linspace, rounded down), as in PyTorchVideo. A span
longer than the video ends with it: the frames of a short video spread over the clip, repeated where they are fewer.
"""

from collections.abc import Sequence

import numpy as np
from attrs import frozen


@frozen
class Sampling:
    """How clips are taken from a video."""

    n_frames: int
    duration: float  # seconds
    speeds: Sequence[float]  # one is drawn for each clip: it covers that many times its duration
    jitter: float  # and 1 - jitter to 1 + jitter times that


def length(times: np.ndarray) -> float:
    """Seconds of a video with frames at these times: the last one lasts as long as its neighbours do."""
    return float(times[-1] + np.median(np.diff(times))) if len(times) > 1 else 0.0


def frames_in(times: np.ndarray, start: float, span: float, n_frames: int) -> np.ndarray:
    """Indices [n_frames] of the clip that starts there; where no frame begins within it, the one that is shown then."""
    first, after = np.searchsorted(times, (start, start + span))
    if first == after:
        first = max(first - 1, 0)
    return first + np.linspace(0, max(after - first - 1, 0), n_frames).astype(int)


def random_clip(rng: np.random.Generator, times: np.ndarray, sampling: Sampling) -> np.ndarray:
    """Indices [n_frames] of a clip that starts anywhere where it fits into the video."""
    speed = sampling.speeds[rng.integers(len(sampling.speeds))] * rng.uniform(1 - sampling.jitter, 1 + sampling.jitter)
    span = sampling.duration * speed
    start = rng.uniform(0, max(length(times) - span, 0))
    return frames_in(times, start, span, sampling.n_frames)


def even_clips(times: np.ndarray, n_clips: int, sampling: Sampling) -> np.ndarray:
    """Indices [n_clips, n_frames] of clips at speed 1, from the beginning of the video to its end; of 1, its middle."""
    latest = max(length(times) - sampling.duration, 0)
    starts = np.linspace(0, latest, n_clips) if n_clips > 1 else [latest / 2]
    return np.stack([frames_in(times, start, sampling.duration, sampling.n_frames) for start in starts])
