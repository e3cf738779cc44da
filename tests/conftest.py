"""What several tests share: the digits packed once, small settings, a quiet Trainer."""

import os

import pytest
import pytorch_lightning as pl
import torch

import data
from model_params import PRESETS

torch.set_num_threads(1)  # the tests' tensors are too small to share, and waiting threads slow others down

LONG = int(os.environ.get("LONG", "1"))  # `make test-long`: that many times as many cases

SMALL = {
    "dataset_name": "digits",
    "encoder_arch": "shufflenet_v2_x0_5",
    "batch_size": 16,
    "global_batch_size": None,
    "K": 64,
    "dim": 16,
    "mlp_hidden_dim": 32,
    "warmup_epochs": 0,
    "seed": 0,
}


@pytest.fixture(scope="session")
def digits_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DATA_PATH", str(path))
        data.prepare_data("digits")
    return path


@pytest.fixture(autouse=True)
def data_path(digits_path, monkeypatch, tmp_path):
    """Every test finds the digits, writes into its own folder, and starts from the same random state."""
    monkeypatch.setenv("DATA_PATH", str(digits_path))
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    return digits_path


@pytest.fixture
def small():
    """small("byol", lr=0.1): a preset at the size of a test."""
    return lambda preset="moco_v2", **fields: PRESETS[preset](**{**SMALL, **fields})


@pytest.fixture
def trainer():
    """trainer(max_steps=2): two steps and one batch of validation, unless told otherwise."""

    def build(**options) -> pl.Trainer:
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        size = {"max_epochs": 1, "limit_train_batches": 2, "limit_val_batches": 1, "num_sanity_val_steps": 0}
        return pl.Trainer(accelerator="cpu", enable_model_summary=False, **{**quiet, **size, **options})

    return build
