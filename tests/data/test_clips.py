"""Clip sampling against the formulas of PyTorchVideo and against the distributions."""

import math

import numpy as np
import pytest
from scipy import stats

from self_supervised.data import video_files
from self_supervised.data.video_files import Sampling
from self_supervised.numerics import generator


def at_rate(n: int, fps: float = 30) -> np.ndarray:
    return np.arange(n) / fps


def pytorchvideo_frames(start: float, span: float, n: int, fps: float, n_frames: int) -> list[int]:
    """Return the frames of PyTorchVideo's decoder: linspace over ceil(start fps) to ceil(end fps), rounded down."""
    end = min(start + span, n / fps)
    inside = list(range(math.ceil(fps * start), math.ceil(fps * end)))
    return [inside[int(i)] for i in np.linspace(0, len(inside) - 1, n_frames)]


@pytest.mark.parametrize(
    "n, fps, span, n_frames", [(300, 30, 2.56, 8), (100, 25, 2.56, 16), (40, 7, 9.0, 8), (5, 30, 2, 8)]
)
def test_frames_are_those_of_pytorchvideo(n, fps, span, n_frames):
    times = at_rate(n, fps)
    for start in generator(0).uniform(0, max(n / fps - span, 0.1), 200):
        expected = pytorchvideo_frames(start, span, n, fps, n_frames)
        assert video_files.frames_in(times, start, span, n_frames).tolist() == expected


def test_a_clip_starts_anywhere_where_it_fits():
    rng, sampling = generator(1), Sampling(2, 2.0, [1.0], 0.0)
    times = at_rate(1000, 100)
    first = [video_files.random_clip(rng, times, sampling)[0] / 100 for _ in range(2000)]
    assert stats.kstest(first, stats.uniform(0, 8).cdf).pvalue > 0.01


def test_speed_and_jitter_stretch_the_span():
    rng, times = generator(5), at_rate(10_000, 100)

    def spans(speeds: list[float], jitter: float) -> np.ndarray:
        found = [video_files.random_clip(rng, times, Sampling(2, 2.0, speeds, jitter)) for _ in range(1500)]
        return np.array([(last - first) / 100 for first, last in found])

    each, counts = np.unique(np.round(spans([1, 2, 4.0], 0.0) / 2, 1), return_counts=True)
    assert each.tolist() == [1, 2, 4] and stats.chisquare(counts).pvalue > 0.01
    assert stats.kstest(spans([1.0], 0.25), stats.uniform(1.5, 1.0).cdf).pvalue > 0.001


@pytest.mark.parametrize("n_clips", [1, 2, 10])
def test_even_clips_reach_from_the_beginning_to_the_end(n_clips):
    times, sampling = at_rate(307), Sampling(8, 2.56, [1.0], 0.0)
    found = video_files.even_clips(times, n_clips, sampling)
    latest = 307 / 30 - 2.56
    starts = [latest * k / (n_clips - 1) for k in range(n_clips)] if n_clips > 1 else [latest / 2]
    assert found.tolist() == [pytorchvideo_frames(start, 2.56, 307, 30, 8) for start in starts]
    assert n_clips == 1 or (found[0, 0] == 0 and found[-1, -1] == 306)


def test_short_videos_spread_over_the_clip_and_gaps_show_the_frame_before():
    sampling = Sampling(8, 2.56, [1.0], 0.0)
    assert video_files.random_clip(generator(0), at_rate(4), sampling).tolist() == [0, 0, 0, 1, 1, 2, 2, 3]
    assert video_files.random_clip(generator(0), at_rate(1), sampling).tolist() == [0] * 8
    assert video_files.even_clips(at_rate(1), 3, sampling).tolist() == [[0] * 8] * 3
    still = np.array([0.0, 1.0, 9.0, 10.0])  # no frame from 1 to 9 s
    assert video_files.frames_in(still, 3.0, 2.0, 2).tolist() == [1, 1]
    assert video_files.frames_in(still, 8.5, 2.0, 2).tolist() == [2, 3]


def test_length_counts_the_last_frame():
    assert video_files.clip_length(at_rate(300)) == pytest.approx(10)
    assert video_files.clip_length(np.array([0.0])) == 0
