"""What benchmarks/gpu.py measures: one row as a `Task`, the machine's own limits, and our training step."""

import functools
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytorch_lightning as pl
import torch
from attrs import field, frozen
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import harness
from moco import SelfSupervisedMethod
from model_params import PRESETS, ModelParams
from self_supervised.views import augmentations

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
TARGETS = {  # images/s of a ResNet-18 at 32 x 32 on one H200 at 30 % MFU; SCE, symmetric here, has BYOL's passes
    **{"simclr": 35_000, "vicreg": 34_000, "moco_v2": 50_000, "byol": 26_000},
    **{"barlow_twins": 34_000, "eqco": 50_000, "sce": 26_000},
}
MODES = {"ours": False, "ours compiled": True, "ours graphs": "reduce-overhead"}  # values of torch_compile
FOUND = ("images/s", "MFU %", "peak GB", "augmentation %", "target", "x fastest peer", "note")


@frozen(eq=False)
class Sizes:
    """`steps` are counted `rounds` times, after `warmup` steps."""

    rounds: int
    few: int = 256  # images in a batch
    many: int = 512
    warmup: int = 15
    steps: int = 30
    small: dict = field(factory=lambda: {"encoder_arch": "resnet18", "dataset_name": "cifar10"})
    large: dict = field(factory=lambda: {"encoder_arch": "resnet50", "dataset_name": "imagenet"})
    large_pool: tuple[int, int] = (2048, 256)  # decoded images, pixels
    matrix: int = 8192
    copied: int = 2**32  # bytes
    workers: int = os.cpu_count()

    @property
    def small_pool(self) -> tuple[int, int]:
        """Enough that all steps are of one epoch."""
        return (2 * self.many * (self.warmup + self.rounds * self.steps), 32)


def quick_sizes() -> Sizes:
    tiny = {"transform_crop_size": 16, "K": 64, "dim": 16, "mlp_hidden_dim": 32, "encoder_arch": "shufflenet_v2_x0_5"}
    small, large = {**tiny, "dataset_name": "cifar10"}, {**tiny, "dataset_name": "imagenet"}
    return Sizes(1, 4, 4, 1, 1, small, large, large_pool=(16, 24), matrix=64, copied=2**16, workers=1)


@frozen
class Task:
    """One row to be measured."""

    by: str
    method: str
    batch: int
    large: bool = False

    def params(self, sizes: Sizes) -> ModelParams:
        compiled = {"torch_compile": MODES.get(self.by, False)}
        fixed = {"batch_size": self.batch, "evaluations": [], "seed": 0}
        fixed |= {"lr": 1e-3, "final_lr_schedule_value": 0.0}  # at 0.5, noise may not converge
        return PRESETS[self.method](**(sizes.large if self.large else sizes.small), **fixed, **compiled)

    def row(self, **found) -> harness.Row:
        network = "ResNet-50, 224" if self.large else "ResNet-18, 32"
        target = "" if self.large or self.by in ("kornia", "lightly") else TARGETS[self.method]
        known = {"method": self.method, "network": network, "by": self.by, "batch": self.batch}
        return {**known, **dict.fromkeys(FOUND, ""), "target": target, **found}


# ---- the machine ----


def repeated(run: Callable, times: int) -> Callable[[], None]:
    def all_of_them() -> None:
        for _ in range(times):
            run()

    return all_of_them


def machine_peak(sizes: Sizes, out: Path) -> float:
    """FLOP/s of the matrix product; reports it, and the bandwidth of a copy."""
    product, flops = harness.matmul_seconds(torch.bfloat16 if CUDA else torch.float32, sizes.matrix)
    source = torch.zeros(sizes.copied, dtype=torch.uint8, device=DEVICE)
    target, times = torch.empty_like(source), 20 if CUDA else 1
    contestants = {"product": repeated(product, times), "copy": repeated(lambda: target.copy_(source), times)}
    seconds = harness.in_turns(contestants, rounds=5)
    peak, copied = flops * times / seconds["product"], 2 * sizes.copied * times / seconds["copy"]
    row = {"matrix product TFLOP/s": peak / 1e12, "size": sizes.matrix, "copy TB/s, read and written": copied / 1e12}
    harness.report("gpu_machine", [row], out)
    return peak


def device_seconds(run: Callable) -> float:
    """What the device needs for run(), which the host queues while the device is still busy with matrix products. A
    run that waits for the device is measured with its waiting."""
    if not CUDA:
        return harness.seconds(run)
    busy, times = repeated(harness.matmul_seconds(torch.bfloat16, 8192)[0], 20), []
    for _ in range(6):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        busy()
        start.record()
        run()
        end.record()
        harness.synchronize()
        times.append(start.elapsed_time(end) / 1000)
    return statistics.median(times[1:])  # the first compiles


@functools.cache
def flops_per_image(method: str, large: bool, sizes: Sizes) -> float:
    params = Task("ours", method, sizes.many, large).params(sizes)
    model = SelfSupervisedMethod(params).eval()  # in which one image is enough for batch norm
    image = torch.zeros(1, params.channels, params.crop_size, params.crop_size)

    def forward(encode: Callable) -> int:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            encode(image)
        return counter.get_total_flops()

    queries, keys = map(set, zip(*params.pairs, strict=True))
    if model.lagging_model is None:
        return 3 * len(queries | keys) * forward(model.encode)
    return 3 * len(queries) * forward(model.encode) + len(keys) * forward(lambda x: model.encode_lagging(x, 0))


class Windows(pl.Callback):
    """The time after `warmup` steps, and after every `steps` more: only there the host waits for the device."""

    def __init__(self, sizes: Sizes, buffered: int = 0):
        self.warmup, self.steps, self.marks = sizes.warmup + buffered, sizes.steps, []
        self.total = self.warmup + sizes.steps * sizes.rounds

    def mark(self, done: int) -> None:
        """After `done` steps."""
        if done >= self.warmup and (done - self.warmup) % self.steps == 0:
            harness.synchronize()
            self.marks.append(time.perf_counter())

    def on_train_batch_end(self, trainer: pl.Trainer, *_) -> None:
        self.mark(trainer.global_step)

    def seconds_per_step(self) -> float:
        return float(np.median(np.diff(self.marks))) / self.steps


@functools.cache
def pool(n: int, size: int) -> Tensor:
    return torch.randint(256, (n, 3, size, size), dtype=torch.uint8, device=DEVICE)


def some(images: Tensor, n: int) -> Tensor:
    return images[torch.randint(len(images), (n,), device=images.device)]


# ---- ours ----


def ours(task: Task, sizes: Sizes) -> float:
    """Seconds of a step."""
    windows = Windows(sizes)
    loader = None  # its own, of the packed set
    if task.large:  # one as users may write it: uint8 images, on the device already
        loader = DataLoader([some(pool(*sizes.large_pool), task.batch)] * windows.total, batch_size=None)
    trainer = pl.Trainer(
        accelerator=DEVICE,
        devices=1,
        precision="bf16-mixed" if CUDA else "32-true",
        benchmark=True,
        max_steps=windows.total,
        callbacks=[windows],
        **harness.QUIET_TRAINER,
    )
    trainer.fit(SelfSupervisedMethod(task.params(sizes)), loader)
    return windows.seconds_per_step()


def augmentation_seconds(task: Task, sizes: Sizes) -> float:
    images = some(pool(*(sizes.large_pool if task.large else sizes.small_pool)), task.batch)
    views = augmentations.training_views(task.params(sizes))
    return device_seconds(lambda: views(images, (0,)))
