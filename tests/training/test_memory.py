"""A long run needs no more memory and no more open files at its end than at its start."""

import os
from pathlib import Path

import processes
import pytest
import pytorch_lightning as pl
from conftest import LONG, QUIET, SMALL
from pytorch_lightning.loggers import CSVLogger
from torch import nn

from moco import SelfSupervisedMethod
from model_params import PRESETS
from self_supervised.training.checkpoints import Checkpoints

STEPS = 300 if LONG == 1 else 3000
EPOCH = 50  # steps


def measure() -> tuple[int, int]:
    """Return the resident bytes and the number of open files."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE"), len(os.listdir("/proc/self/fd"))


def long_run(rank: int, preset: str, folder: str) -> list[tuple[int, int]]:
    found = []

    class Measure(pl.Callback):
        def on_train_epoch_end(self, trainer, module):
            found.append(measure())

    params = PRESETS[preset](**{**SMALL, "evaluations": ["rank_me", "knn"], "lr": 0.01})
    encoder = nn.Sequential(nn.Conv2d(1, 16, 3, stride=2), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten())
    size = {"max_epochs": STEPS // EPOCH, "limit_train_batches": EPOCH, "limit_val_batches": 4, "log_every_n_steps": 10}
    with_logger = {**QUIET, "logger": CSVLogger(folder)}
    callbacks = [Checkpoints(f"{folder}/run", every_n_steps=20), Measure()]
    trainer = pl.Trainer(accelerator="cpu", callbacks=callbacks, **with_logger, **size)
    trainer.fit(SelfSupervisedMethod(params, encoder=encoder))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["moco_v2"] if LONG == 1 else ["moco_v2", "vicreg"])
def test_memory_is_flat(preset, tmp_path):
    (found,) = processes.run(long_run, 1, tmp_path, preset, str(tmp_path))
    memory, files = zip(*found, strict=True)
    settled = memory[len(memory) // 5]
    print(f"{STEPS} steps: {settled / 2**20:.1f} MB settled, {memory[-1] / 2**20:.1f} MB at the end, {files[-1]} files")
    assert memory[-1] < 1.02 * settled and files[-1] <= files[1]
    assert len(found) == STEPS // EPOCH
