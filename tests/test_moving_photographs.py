"""The set of moving photographs: the motions are those of their names, and nothing but the motion tells the class."""

import sys
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import affine_transform

from benchmarks import moving_photographs
from benchmarks.moving_photographs import FASTEST, FRAMES_PER_SECOND, MOTIONS, PHOTOGRAPHS, SLOWEST
from model_params import ModelParams
from self_supervised.data import data_sets
from self_supervised.numerics import generator

MIDDLE = moving_photographs.FRAMES // 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return moving_photographs.make(tmp_path_factory.mktemp("data"), {"train": 2, "val": 1}, size=32, seed=3)


def frames_of(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def moved(frame: np.ndarray, motion: tuple, seconds: float) -> np.ndarray:
    """What a camera would see of a gray frame [S, S] so much later, at the middle of all speeds."""
    right, down, zoom, turn = np.array(motion) * (np.array(SLOWEST) + FASTEST) / 2 * seconds
    size, (cos, sin) = len(frame), (np.cos(turn), np.sin(turn))
    matrix = np.exp(-zoom) * np.array([[cos, sin], [-sin, cos]])  # of (row, column): the camera's right turns downwards
    middle = np.full(2, (size - 1) / 2)
    return affine_transform(frame, matrix, middle + size * np.array([down, right]) - matrix @ middle, order=1, cval=-1)


@pytest.mark.parametrize("name", MOTIONS)
def test_the_motion_is_that_of_its_name(name):
    """Of all eight motions, it is the one that best predicts a frame from an earlier one."""
    right, rng = 0, generator(5)
    photographs = [moving_photographs.photograph(name) for name in PHOTOGRAPHS["train"]]
    for region in [region for _ in range(3) for region in moving_photographs.regions(photographs, rng)]:
        velocity = np.array(MOTIONS[name]) * rng.uniform(SLOWEST, FASTEST)
        gray = moving_photographs.shot(region, velocity, 64).astype(float).mean(3)
        before, after, seconds = gray[MIDDLE - 1], gray[MIDDLE + 1], 2 / FRAMES_PER_SECOND
        errors = {}
        for other, motion in MOTIONS.items():
            expected = moved(before, motion, seconds)
            errors[other] = np.abs(expected - after)[expected >= 0].mean()
        right += min(errors, key=errors.get) == name
    assert right >= 11  # of 12: one may be too smooth, or too fast


def test_no_motion_leaves_the_photograph():
    rng, sizes = (
        generator(1),
        {moving_photographs.photograph(name).size for names in PHOTOGRAPHS.values() for name in names},
    )
    white = [Image.new("RGB", size, (255, 255, 255)) for size in sizes] * 2  # PIL is black beyond it
    for region in [region for _ in range(5) for region in moving_photographs.regions(white, rng)]:
        for signs in MOTIONS.values():
            assert moving_photographs.shot(region, np.array(signs) * FASTEST, 16).min() == 255


def test_the_middle_frame_is_the_same_in_all_classes(folder):
    for split in ("train", "val"):
        numbers = sorted(path.name for path in (folder / split / "pan_left").iterdir())
        for number in numbers:
            videos = [frames_of(folder / split / motion / number) for motion in MOTIONS]
            assert all(
                video.shape == (moving_photographs.SHOTS * moving_photographs.FRAMES, 32, 32, 3) for video in videos
            )
            middles = np.stack([video[MIDDLE :: moving_photographs.FRAMES] for video in videos]).astype(int)
            codec = np.abs(middles - middles[0]).mean((1, 2, 3, 4)).max()
            assert codec < 2.5  # of 255
            first = np.stack([video[:: moving_photographs.FRAMES] for video in videos]).astype(int)
            assert np.abs(first[1:] - first[0]).mean((1, 2, 3, 4)).min() > max(5, 3 * codec)
            assert np.abs(middles[0, 1:] - middles[0, :-1]).mean((1, 2, 3)).min() > 8  # another photograph


def test_photographs_are_of_training_or_of_validation(folder):
    assert not set(PHOTOGRAPHS["train"]) & set(PHOTOGRAPHS["val"])
    assert [len(list((folder / split).glob("*/*.mp4"))) for split in ("train", "val")] == [2 * 8, 8]
    pixels = {
        name: np.asarray(moving_photographs.photograph(name)).reshape(-1, 3)
        for split in PHOTOGRAPHS.values()
        for name in split
    }
    assert len({tuple(x[::997].ravel().tolist()) for x in pixels.values()}) == 18  # real ones, all different
    assert min(len(np.unique(x, axis=0)) for x in pixels.values()) > 80


def test_it_is_the_set_that_the_library_reads(folder, monkeypatch):
    monkeypatch.setenv("DATA_PATH", str(folder.parent))
    params = ModelParams(dataset_name="kinetics", transform_crop_size=32, clip_duration=1.0, encoder_arch="s3d")
    dataset = data_sets.get_dataset(params, ("val",))
    assert [path.split("/")[-2] for path, _ in dataset.files] == sorted(MOTIONS)
    assert dataset[3][0].shape == (3, 8, 32, 32)


@pytest.mark.slow
def test_the_seed_decides_and_nothing_is_overwritten(folder, tmp_path, monkeypatch, capsys):
    n = {"train": 1, "val": 1}
    first, again, other = (moving_photographs.make(tmp_path / str(i), n, 32, seed) for i, seed in enumerate((3, 3, 4)))
    name = "train/roll_left/000.mp4"
    assert (first / name).read_bytes() == (again / name).read_bytes() != (other / name).read_bytes()
    with pytest.raises(ValueError, match="kinetics is there already"):
        moving_photographs.make(tmp_path / "0", n)
    with pytest.raises(ValueError, match="size=33 must be even"):
        moving_photographs.make(tmp_path / "x", n, 33)
    monkeypatch.setattr(sys, "argv", ["moving_photographs", str(tmp_path / "0")])
    with pytest.raises(SystemExit, match="choose another folder"):
        moving_photographs.main()
