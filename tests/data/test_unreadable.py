"""unreadable_images="skip": evaluations leave unreadable images out and name them, and never replace them."""

import time
from pathlib import Path

import attrs
import numpy as np
import processes
import pytest
import pytorch_lightning as pl
import torch
from conftest import QUIET
from PIL import Image
from torch import nn

from linear_classifier import LinearClassifierMethod
from moco import SelfSupervisedMethod
from model_params import ModelParams
from self_supervised.data import data_sets, facts
from self_supervised.data.files import UNREADABLE, Samples, readable_rows
from self_supervised.data.image_files import ImageFiles
from self_supervised.evaluation import features
from self_supervised.networks.frozen_encoder import Encoder, Report

BROKEN = ("train/a/0.png", "train/b/3.png", "test/a/0.png", "test/a/1.png", "test/b/4.png")
pytestmark = pytest.mark.filterwarnings("ignore:.*files could not be read and were left out")


def write(root: Path, broken: tuple[str, ...] = ()) -> Path:
    rng = np.random.default_rng(0)
    for split, n in (("train", 9), ("test", 7)):
        for label in "ab":
            for i in range(n):
                pixels = rng.integers(0, 200, (20, 20, 3)) + 2 * (label == "b")
                name = f"{split}/{label}/{i}.png"
                (root / name).parent.mkdir(parents=True, exist_ok=True)
                if name not in BROKEN:
                    Image.fromarray(pixels.astype(np.uint8)).save(root / name)
                elif name in broken:
                    (root / name).write_bytes(b"broken")
    return root


@pytest.fixture(scope="module")
def roots(tmp_path_factory) -> tuple[Path, Path]:
    """Two data sets of the same readable images; the second one has corrupt ones, too."""
    folder = tmp_path_factory.mktemp("images")
    return write(folder / "good"), write(folder / "mixed", BROKEN)


def encoder() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, 12))


def params(root: Path, **fields) -> ModelParams:
    settings = {"batch_size": 3, "transform_crop_size": 16, "num_data_workers": 0, "K": 16, "dim": 8, "seed": 0}
    settings |= {"evaluations": ["knn", "rank_me"], "probe_on_training_set": True, "unreadable_images": "skip"}
    return ModelParams(
        **{**settings, **fields}, dataset_name="folder", data_path=str(root), encoder_arch="module", mlp_hidden_dim=16
    )


def scores(rank: int, world: int, root: Path) -> dict[str, float]:
    how = {"accelerator": "cpu", "devices": world, "strategy": "ddp" if world > 1 else "auto", "max_epochs": 1}
    found = {}
    for method in (
        SelfSupervisedMethod(params(root), encoder=encoder()),
        LinearClassifierMethod(
            encoder=encoder(), dataset_name="folder", data_path=str(root), transform_crop_size=16, num_data_workers=0,
            batch_size=3, seed=0, unreadable_images="skip",
        ),
    ):  # fmt: skip
        trainer = pl.Trainer(**how, **QUIET)
        found |= trainer.validate(method, verbose=False)[0]
        if isinstance(method, SelfSupervisedMethod):
            found |= trainer.test(method, verbose=False)[0]
    return found


@pytest.mark.filterwarnings("ignore:Starting from v1.9.0")
def test_scores_are_those_of_the_readable_images(roots, tmp_path):
    good, mixed = roots
    expected = scores(0, 1, good)
    assert {"test_knn20_acc", "valid_knn20_acc_trainset", "valid_rank_me", "valid_acc1", "valid_loss"} <= set(expected)
    assert 0 < expected["valid_knn20_acc_trainset"] < 100
    assert scores(0, 1, mixed) == pytest.approx(expected, rel=1e-4)
    for found in processes.run(scores, 2, tmp_path / "two", 2, mixed):
        assert found == pytest.approx(expected, rel=1e-4)


def test_features_are_those_of_the_readable_images_and_the_others_are_named(roots, tmp_path, capsys):
    good, mixed = (params(root, num_data_workers=workers) for root, workers in zip(roots, (0, 2), strict=True))
    model = Encoder(encoder(), good, Report("tiny", "test", "module", 12, ()))
    expected = features.extract(model, good, ("test",), tmp_path / "good")
    with pytest.warns(UserWarning, match="3 files could not be read and were left out: .*test/a/0.png, .*test/a/1.png"):
        found = features.extract(model, mixed, ("test",), tmp_path / "mixed")
    assert torch.equal(found.x, expected.x) and torch.equal(found.y, expected.y) and len(found.y) == 11
    capsys.readouterr()
    assert len(features.extract(model, mixed, ("test",), tmp_path / "mixed").x) == 11  # kept
    assert "3 unreadable images left out" in capsys.readouterr().out
    stopped = attrs.evolve(mixed, unreadable_images="stop", num_data_workers=0)
    with pytest.raises(ValueError, match="test/a/0.png could not be read"):
        features.extract(model, stopped, ("test",), tmp_path / "mixed")
    views = features.extract_views(
        model, mixed, ("test",), tmp_path / "mixed", features.SampledViews(2, 0, n_images=14)
    ).x
    assert views.shape == (11, 2, 12) and len(views.unique(dim=0)) == 11


def test_statistics_are_those_of_the_readable_images(roots):
    found = [facts.channel_statistics(data_sets.get_dataset(params(root), ("train",)), seed=0) for root in roots]
    np.testing.assert_allclose(found[0], found[1])


def test_a_missing_file_is_left_out_too(roots, tmp_path):
    p = params(write(tmp_path / "own", BROKEN))
    dataset = data_sets.get_dataset(p, ("test",))
    (tmp_path / "own" / "test/a/0.png").unlink()
    assert len(list(dataset.signatures())) == 14 and dataset[0][1] == UNREADABLE
    model = Encoder(encoder(), p, Report("tiny", "test", "module", 12, ()))
    assert len(features.extract(model, p, ("test",), tmp_path / "kept").x) == 11


@pytest.mark.parametrize("action", ["skip", "stop"])
def test_a_dangling_link_is_left_to_unreadable_images(action, tmp_path):
    for i in range(6):
        Image.new("RGB", (20, 20)).save(tmp_path / f"{i}.png")
    (tmp_path / "link.png").symlink_to(tmp_path / "nowhere.png")
    p = attrs.evolve(params(tmp_path), splits_path=str(tmp_path / "splits"), unreadable_images=action)
    for _ in ("drawn", "read from splits_path"):
        datasets = [data_sets.get_dataset(p, (split,), p.views) for split in ("train", "val", "test")]
        found = next((d, i) for d in datasets for i in range(len(d)) if d.files[i][0].endswith("link.png"))
        if action == "stop":
            with pytest.raises(ValueError, match="link.png could not be read"):
                found[0][found[1]]
        else:
            found[0][found[1]]
            assert found[0].skipped() == [str(tmp_path / "link.png")]


def test_in_training_the_next_readable_image_takes_the_place(roots):
    p = params(roots[1])
    dataset = data_sets.get_dataset(p, ("train",), p.views)
    assert dataset[0][1] == 0 and len(list(dataset)) == len(dataset)
    assert UNREADABLE not in [dataset[i][1] for i in range(len(dataset))]
    assert [Path(path).name for path in dataset.skipped()] == ["0.png", "3.png"]


def test_skipping_takes_about_a_step_for_each_unreadable_file(tmp_path):
    n = 5_000
    Image.new("RGB", (8, 8)).save(tmp_path / "good.png")
    missing = [(str(tmp_path / f"{i}.png"), 0) for i in range(n)]
    for files in ([*missing, (str(tmp_path / "good.png"), 1)], [(str(tmp_path / "good.png"), 1), *missing]):
        dataset, opened = ImageFiles(tmp_path, files, 3, 8, [], 0, skip_unreadable=True), []
        read = dataset.read
        dataset.read = lambda index, opened=opened, read=read: opened.append(index) or read(index)
        start = time.monotonic()
        found = [int(dataset[i][1]) for i in range(files.index(missing[0]), n, 20)]
        assert time.monotonic() - start < 20 and len(opened) <= n + len(found) and set(found) <= {UNREADABLE, 1}
        assert len(dataset.skipped()) == n and dataset[files.index((str(tmp_path / "good.png"), 1))][1] == 1


def test_names_of_any_kind_and_labels_of_any_shape_are_kept():
    samples = [("a/ä b.png", 3), ("a/\udcff\ud800.png", -1), ("", 0)]
    assert list(Samples(samples)) == samples and Samples(samples)[-2] == samples[1] and len(Samples([])) == 0
    multi_hot = Samples([("a", np.array([1, 0])), ("b", np.array([1, 1]))])
    assert multi_hot.labels.tolist() == [[1, 0], [1, 1]] and multi_hot[1][1].tolist() == [1, 1]
    blocks = [type(value) for value in vars(multi_hot).values()]
    assert blocks == [bytes, np.ndarray, np.ndarray]  # workers would copy objects, because reading counts references


def test_rows_of_unreadable_images():
    labels, x = torch.tensor([0, UNREADABLE, -1, 2]), torch.arange(4)
    assert [part.tolist() for part in readable_rows(labels, x)] == [[0, 2, 3], [0, -1, 2]]
    assert readable_rows(None, x)[1] is None and readable_rows(labels[2:], x[2:])[0].tolist() == [2, 3]
    presences = torch.tensor([[1, -1], [UNREADABLE] * 2])
    assert readable_rows(presences, x[:2])[1].tolist() == [[1, -1]]
