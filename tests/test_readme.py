"""Every Python block of the README runs, in order, as a notebook would; on small data and a few batches."""

import re
from pathlib import Path

import attrs
import numpy as np
import pytest
import pytorch_lightning as pl
from conftest import QUIET

from self_supervised.data import loading, packed
from self_supervised.training.checkpoints import newest

README = (Path(__file__).parents[1] / "README.md").read_text()


@pytest.mark.filterwarnings("ignore:collapse", "ignore:the warm-up of 2 epochs")
def test_python_blocks(monkeypatch, tmp_path):
    rng = np.random.default_rng(0)

    def read():  # CIFAR-10 in small
        def arrays(n):
            return rng.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8), np.arange(n) % 10

        return {"train": arrays(8), "test": arrays(8)}

    class ShortTrainer(pl.Trainer):
        def __init__(self, **options):
            assert options.pop("max_epochs") > 1
            super().__init__(**{**options, **QUIET, "max_epochs": 1, "limit_train_batches": 1, "limit_val_batches": 1})

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DATA_PATH", raising=False)
    monkeypatch.setitem(packed.READERS, "cifar10", read)
    monkeypatch.setattr(pl, "Trainer", ShortTrainer)
    get_loader = loading.get_loader
    monkeypatch.setattr(
        loading, "get_loader", lambda p, *rest, **kw: get_loader(attrs.evolve(p, batch_size=4), *rest, **kw)
    )
    blocks, names = re.findall(r"```python\n(.*?)```", README, re.DOTALL), {}
    assert len(blocks) == 5
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    assert (tmp_path / "example.ckpt").exists() and names["embeddings"].shape == (64, 512)
    assert newest(tmp_path / "runs" / "first").name == "step_000000001.ckpt"
    assert (tmp_path / "data" / "cifar10" / "train" / "images.npy").exists()


def test_every_file_that_the_readme_mentions_exists():
    root = Path(__file__).parents[1]
    for name in re.findall(r"`((?:[\w]+/)*\w+\.py)`", README) + re.findall(r"\]\(([^)h][^)#]*)", README):
        assert (root / name).exists(), name
