"""Random draws belong to the image's place in the epoch: any number of processes, accumulated batches and workers sees
the same views, and any number of processes trains the same weights."""

import itertools

import numpy as np
import PIL.Image
import processes
import pytest
import pytorch_lightning as pl
import torch
from conftest import LONG
from test_ddp import SMALL, encoder, trainer

from moco import SelfSupervisedMethod
from model_params import PRESETS
from self_supervised.data import loading
from self_supervised.data.batches import ResumableSampler
from self_supervised.views.augmentations import ImageDraws

STEP = 12  # images of an optimizer step
SETTINGS = {**SMALL, "global_batch_size": STEP, "mlp_normalization": "ln", "evaluations": [], "K": 30}
IMAGES = [preset for preset in PRESETS if preset != "sce_video"]


class Seen(pl.Callback):
    """The views of each optimizer step, [images, views, ...], in the order of one process."""

    def __init__(self):
        self.batches = []

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        views = torch.stack(batch[0], 1)
        self.batches.append(module.all_gather(views).transpose(0, 1).flatten(0, 1) if trainer.world_size > 1 else views)

    def steps(self) -> torch.Tensor:
        return torch.cat(self.batches).unflatten(0, (-1, STEP))


def fitted(world: int, preset: str, n_steps: int, accumulated: int = 1, **settings) -> tuple[dict, torch.Tensor]:
    """Return the state of a model after some steps on its own loader, and the views that it saw."""
    seen = Seen()
    torch.manual_seed(1)
    method = SelfSupervisedMethod(PRESETS[preset](**{**SETTINGS, **settings}), encoder=encoder())
    options = {
        "precision": "64-true",
        "max_epochs": None,
        "max_steps": n_steps,
        "callbacks": [seen],
        "accumulate_grad_batches": accumulated,
    }
    trainer(world, **options).fit(method)
    return method.state_dict(), seen.steps()


def train_presets(rank: int, world: int, presets: list[str]) -> dict:
    return {preset: fitted(world, preset, 20)[0] for preset in presets}


@pytest.mark.parametrize(
    ("world", "presets"),
    [
        (2, ["moco_v2", "simclr", "vicreg"]),
        pytest.param(2, IMAGES, marks=pytest.mark.slow),
        pytest.param(4, IMAGES if LONG > 1 else ["moco_v2", "simclr", "vicreg"], marks=pytest.mark.slow),
    ],
)
def test_weights_do_not_depend_on_the_number_of_processes(world, presets, tmp_path):
    """20 steps on packed images, with a normalization that does not look across the batch. In float64, because LARS
    enlarges rounding."""
    (expected,) = processes.run(train_presets, 1, tmp_path / "1", 1, presets)
    for found in processes.run(train_presets, world, tmp_path / str(world), world, presets):
        for preset, state in expected.items():
            for name, value in state.items():
                largest = 1.0 if name.startswith("queue") else value.abs().max().item()
                assert torch.allclose(found[preset][name], value, rtol=1e-5, atol=1e-5 * largest), (preset, name)


def see_files(rank: int, world: int, folder: str, accumulated: int, workers: int) -> torch.Tensor:
    files = {"dataset_name": "folder", "data_path": folder, "in_channels": 1, "transform_crop_size": 8}
    return fitted(world, "moco_v2", 5, accumulated, **files, num_data_workers=workers, val_size=0, test_size=0)[1]


@pytest.mark.slow
def test_views_of_files_depend_neither_on_processes_nor_on_accumulated_batches_nor_on_workers(tmp_path):
    """The third step has images of the second epoch: 28 files have two whole steps."""
    (tmp_path / "photos" / "a").mkdir(parents=True)
    for i in range(28):
        pixels = np.random.default_rng(i).integers(0, 256, (14, 20), dtype=np.uint8)
        PIL.Image.fromarray(pixels).save(tmp_path / "photos" / "a" / f"{i}.png")
    settings = [(1, 1, 0), (1, 3, 2), (2, 1, 1), (3, 2, 0), (4, 1, 0)]
    found = [
        processes.run(see_files, world, tmp_path / str(world), world, str(tmp_path / "photos"), *others)[0]
        for world, *others in settings
    ]
    assert len(found[0]) == 5 and len(found[0].flatten(3).flatten(0, 2).unique(dim=0)) == 5 * STEP * 2
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=0, atol=0)


def test_order_of_shards_does_not_depend_on_the_number_of_processes(monkeypatch):
    monkeypatch.setattr("self_supervised.data.batches.WINDOW", 32)

    class Images(list):
        shards = np.repeat(np.arange(10), 20)

    images = Images(range(200))
    orders = []
    for world in (1, 2, 3, 4):
        dealt = [
            list(ResumableSampler(images, world, rank, seed=3, drop_last=True, step=STEP)) for rank in range(world)
        ]
        orders.append(list(itertools.chain.from_iterable(zip(*dealt, strict=True))))
    assert len(set(orders[0])) == 192 and orders[1:] == orders[:1] * 3
    images.shards = 3 * Images.shards + 2  # of a data set with shards in between that are of another split
    assert list(ResumableSampler(images, 1, 0, seed=3, drop_last=True, step=STEP)) == orders[0]


def test_evaluations_have_the_same_order_in_all_epochs(small):
    """Otherwise `limit_val_batches` would score other images each time, and the halves of probes would differ."""
    for training in (False, True):
        loader, orders = loading.get_loader(small(num_data_workers=0), list(range(50)), training), []
        for epoch in (0, 1):
            loader.sampler.set_epoch(epoch)
            orders.append(list(loader.sampler))
        assert (orders[0] == orders[1]) == (not training) and orders[0] != sorted(orders[0])


def test_draws_are_elements_of_split_mix_64():
    """Computed with Python's integers, from any image of the epoch. The first output for 1234567 is a published one."""

    def output(state: int) -> int:
        z = state % 2**64
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        return z ^ (z >> 31)

    step = 0x9E3779B97F4A7C15
    assert output(1234567 + step) == 6457827717110365317
    start = int(np.random.SeedSequence((7, 1)).generate_state(1, np.uint64)[0])
    draws = ImageDraws((7, 1), np.array([5, 900, 3]))
    found = np.concatenate(
        [draws.random((3, 10)), draws.random(3)[:, None], draws.random((3, 2, 30)).reshape(3, -1)], 1
    )
    for row, position in zip(found.tolist(), (5, 900, 3), strict=True):
        assert row == [(output(start + step * (position * 2**16 + n + 1)) >> 11) / 2**53 for n in range(71)]


def test_draws_of_images_and_columns_are_uniform_and_independent():
    u = ImageDraws(3, np.arange(100_000)).random((100_000, 8))
    assert np.abs(u.mean(0) - 0.5).max() < 0.004 and np.abs(u.var(0) - 1 / 12).max() < 0.001
    together = np.concatenate([u[1:], u[:-1], ImageDraws(4, np.arange(1, 100_000)).random((99_999, 8))], 1)
    correlations = np.corrcoef(together.T) - np.eye(24)
    assert np.abs(correlations).max() < 0.016  # five standard deviations
