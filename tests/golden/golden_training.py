"""A training from weights and views that anyone can make again, by the rules with which authors.json was made.

A number follows from the name of its tensor alone, through NumPy's RandomState, whose streams never change. All of them
are float32, so that trainings in float32 and float64 start from the same numbers.
"""

import json
import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from moco import SelfSupervisedMethod
from model_params import ModelParams

METHODS: dict[str, dict[str, Any]] = json.loads((Path(__file__).parent / "authors.json").read_text())["methods"]
N_IMAGES, SIDE, BLOCK, BATCH_SIZE = 96, 4, 8, 16
# benchmarks.parity, which imports this module, runs without conftest.py
QUIET = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
FINISHING: dict[str, Callable[[np.ndarray], np.ndarray]] = {  # by the last part of the name: a draw -> a tensor
    "keys": lambda x: (x / np.linalg.norm(x.astype(np.float64), axis=1, keepdims=True)).astype(np.float32),
    "running_var": lambda x: 1 + np.float32(0.1) * np.abs(x),
    "running_mean": lambda x: np.float32(0.1) * x,
    "bias": lambda x: np.float32(0.1) * x,
    "weight": lambda x: 1 + np.float32(0.1) * x if x.ndim == 1 else x * np.float32((2 / x[0].size) ** 0.5),
}


@cache
def draw(name: str, *shape: int) -> np.ndarray:
    """Return standard normal numbers in float32 that follow from the name alone."""
    return np.random.RandomState(zlib.crc32(name.encode()) % 2**31).standard_normal(shape).astype(np.float32)


@torch.no_grad()
def fill(module: nn.Module) -> None:
    """Set weights and running statistics by their names. The lagging model starts with the values of the model."""
    for name, tensor in module.state_dict().items():
        if tensor.is_floating_point():
            x = draw(name.replace("lagging_", ""), *tensor.shape)
            tensor.copy_(torch.from_numpy(FINISHING[name.rsplit(".", 1)[-1]](x)))


def views() -> Tensor:
    """Return two views of each image, [96, 2, 3, 32, 32]: colored blocks, with different noise in each view."""
    images = draw("images", N_IMAGES, 1, 3, SIDE, SIDE).repeat(BLOCK, axis=3).repeat(BLOCK, axis=4)
    noise = draw("noise", N_IMAGES, 2, 3, SIDE * BLOCK, SIDE * BLOCK)
    return torch.from_numpy(images + np.float32(0.3) * noise)


@attrs.define
class Recorder(pl.Callback):
    """Callback that keeps the loss, the learning rates (highest first) and m of each step."""

    stop_after: int | None = None
    losses: list[float] = attrs.field(factory=list)
    rates: list[list[float]] = attrs.field(factory=list)
    momenta: list[float] = attrs.field(factory=list)

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        rates = {group["lr"] for group in trainer.optimizers[0].param_groups}
        self.rates.append(sorted(rates, reverse=True))

    def on_train_batch_end(self, trainer: pl.Trainer, method: SelfSupervisedMethod, outputs: Any, *_: Any) -> None:
        self.losses.append(float(outputs["loss"]))
        self.momenta.append(float(method.step_metrics["m"]))
        trainer.should_stop = len(self.losses) == self.stop_after


def initial_method(name: str) -> SelfSupervisedMethod:
    """Return a method with the settings of authors.json and the weights of the rules."""
    method = SelfSupervisedMethod(ModelParams(**METHODS[name]["params"]))
    fill(method)
    return method


def train(method: SelfSupervisedMethod, steps: int, precision: str, stop_after: int | None = None) -> Recorder:
    """Train as a user does, with a Trainer and a loader of float views. The batches always have the same order.

    Args:
        steps: length of the schedules.
        stop_after: number of steps to take, if it is smaller than `steps`.
    """
    recorder = Recorder(stop_after)
    length = {"max_epochs": -1, "max_steps": steps}
    trainer = pl.Trainer(accelerator="cpu", precision=precision, callbacks=[recorder], **length, **QUIET)
    trainer.fit(method, DataLoader(TensorDataset(*views().unbind(1)), BATCH_SIZE))
    return recorder


def state_of(method: SelfSupervisedMethod) -> dict[str, Tensor]:
    """Return a copy of all weights and buffers in float64."""
    return {name: tensor.detach().double().clone() for name, tensor in method.state_dict().items()}
