"""What several tests share: the digits packed once, small settings, a quiet Trainer."""

import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import nn

from model_params import PRESETS
from self_supervised.data import data_sets
from self_supervised.training.checkpoints import Checkpoints

os.environ.setdefault("SELF_SUPERVISED_PRECISION", "32-true")  # what "auto" means, also in processes that tests start
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of these processes
torch.set_num_threads(1)  # the tests' tensors are too small to share, and waiting threads slow others down

HOLD = (
    "import os, sys, time; from pathlib import Path; from self_supervised.folder_lock import locked; "
    "l = locked(Path(sys.argv[1])); l.__enter__(); print(1, flush=True); "
)

LONG = int(os.environ.get("LONG", "1"))  # `make test-long`: that many times as many cases

SMALL = {
    "dataset_name": "digits",
    "encoder_arch": "small_cnn",
    "batch_size": 16,
    "global_batch_size": None,
    "K": 64,
    "dim": 16,
    "mlp_hidden_dim": 32,
    "warmup_epochs": 0,
    "seed": 0,
}
FEW_PROTOTYPES = {"n_prototypes": 24, "prototypes_frozen_epochs": 0}
SMALL_OF = {
    "swav": {**FEW_PROTOTYPES, "queue_from_epoch": 0},
    "dino": {**FEW_PROTOTYPES, "lr_scaling": None},
    **dict.fromkeys(("fastsiam", "lejepa", "visreg", "emp_ssl", "distill"), {"n_large_views": 2}),
    "nnclr": {"projection_mlp_hidden_dims": [], "prediction_mlp_hidden_dims": []},
}
VECTORS = 6, 5, 9  # N, D, K of `vectors`
QUIET = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)

FIRST = ("test_launch", "test_installation", "test_benchmarks", "test_notebooks", "test_resume", "test_ddp")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start with the files that take longest, so that no process ends long after the others."""
    items.sort(key=lambda item: item.path.stem not in FIRST)


class TinyEncoder(nn.Module):
    """Encoder [N, 1, 8, 8] -> [N, 6] that counts its forward passes in train mode."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 6))
        self.passes = 0

    def forward(self, x):
        self.passes += self.training
        return self.net(x)


def normalized_encoder() -> nn.Module:
    """Encoder [N, 1, 8, 8] -> [N, 6] with a batch norm."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 6), nn.BatchNorm1d(6), nn.ReLU())


def save_checkpoint(method: pl.LightningModule, path: Path, **more: Any) -> Path:
    """Write what a checkpoint has of a method that was not trained."""
    torch.save({"state_dict": method.state_dict(), "hyper_parameters": dict(method.hparams), **more}, path)
    return path


def assert_same(found: torch.Tensor, expected: torch.Tensor, *inputs: torch.Tensor) -> None:
    """Equal values, and equal gradients with respect to the inputs."""
    assert found.item() == pytest.approx(expected.item(), abs=1e-10)
    pairs = zip(*(torch.autograd.grad(x, inputs, retain_graph=True) for x in (found, expected)), strict=True)
    assert all(torch.allclose(ours, theirs, atol=1e-10) for ours, theirs in pairs)


@pytest.fixture
def vectors():
    """q and k on the sphere with gradient, and a queue, in float64."""
    n, d, k = VECTORS
    q, k, queue = (F.normalize(torch.randn(rows, d, dtype=torch.float64), dim=1) for rows in (n, n, k))
    return q.requires_grad_(), k.requires_grad_(), queue


@pytest.fixture(scope="session")
def digits_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DATA_PATH", str(path))
        data_sets.prepare_data("digits")
    return path


@pytest.fixture(scope="module")
def finished_run(digits_path, tmp_path_factory):
    """finished_run("vicreg --out {out} ..."): the folder of a run of train.py with these arguments."""

    def make(arguments: str) -> Path:
        from self_supervised import train as train_program

        out = tmp_path_factory.mktemp("runs") / "first"
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("DATA_PATH", str(digits_path))
            options = arguments.format(out=out).split()
            patch.setattr(sys, "argv", ["self-supervised", "train", *options])  # what command.txt says
            train_program.main(options)
        return out

    return make


@pytest.fixture(autouse=True)
def data_path(digits_path, monkeypatch, tmp_path):
    """Every test finds the digits, writes into its own folder, and starts from the same random state."""
    monkeypatch.setenv("DATA_PATH", str(digits_path))
    monkeypatch.chdir(tmp_path)
    logging.getLogger("pytorch_lightning").setLevel(logging.INFO)  # programs and benchmarks make it quiet
    torch.manual_seed(0)
    return digits_path


@pytest.fixture
def small():
    """small("byol", lr=0.1): a preset at the size of a test."""
    return lambda preset="moco_v2", **fields: PRESETS[preset](**{**SMALL, **SMALL_OF.get(preset, {}), **fields})


@pytest.fixture
def trainer():
    """trainer(max_steps=2): two steps and one batch of validation, unless told otherwise."""

    def build(**options) -> pl.Trainer:
        size = {"max_epochs": 1, "limit_train_batches": 2, "limit_val_batches": 1, "num_sanity_val_steps": 0}
        return pl.Trainer(accelerator="cpu", **{**QUIET, **size, **options})

    return build


@pytest.fixture
def resumes_as_uninterrupted(trainer, tmp_path):
    """resumes_as_uninterrupted(model_of): two epochs of model_of(workers=0) give the weights that model_of(workers=2)
    has which goes on after the third of the five steps of the first epoch."""

    def weights(model: pl.LightningModule, checkpoint: Path | None = None) -> torch.Tensor:
        saving = [Checkpoints(tmp_path, every_n_steps=3, keep=99)] if checkpoint is None else []
        trainer(max_epochs=2, limit_train_batches=1.0, callbacks=saving).fit(model, ckpt_path=checkpoint)
        return torch.cat([p.flatten() for p in model.state_dict().values()])

    def compare(model_of: Callable[[int], pl.LightningModule]) -> None:
        uninterrupted = weights(model_of(0))
        (after_three,) = tmp_path.glob("step_*03.ckpt")
        assert torch.equal(weights(model_of(2), after_three), uninterrupted)

    return compare


@pytest.fixture
def holder():
    """holder(folder, code): another process that holds the lock of a folder and runs some code, until it is killed."""
    started = []

    def start(folder: Path, code: str = "") -> subprocess.Popen:
        command = [sys.executable, "-c", f"{HOLD}{code}; time.sleep(60)".replace("; ;", ";"), str(folder)]
        started.append(subprocess.Popen(command, cwd=Path(__file__).parents[1], stdout=subprocess.PIPE, text=True))
        assert started[-1].stdout.readline()
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()
