"""What a training step costs as the batch N, the queue K, the width D, the processes and the data set grow.

Nothing is compared but this library with itself: the encoder is one small linear layer on views of 8 x 8, so that what
is left is what the library and Lightning add to a step; the median over steps of one process with one thread. On
several processes (gloo) N is that of each. Rows of the data set are batches of 256 read from packed images of STL-10's
size, in random order; the file is sparse, so that it costs no disk.

With this small layer, processes can only lose: each computes its own N rows of a matrix that has grown with the number
of processes, and a step has six to eight communications, each of which waits for the slower process. The table
scaling_processes therefore trains a ResNet-18 with the same images per step on one process with two threads and on two
processes with one thread each. To be reached: within 15 % of each other.

The last row reads 20 batches of all of STL-10 (105,000 x 96 x 96 x 3, 2.9 GB) in a fresh process. To be reached: that
this adds less than 500 MB to the resident memory of the process, else this exits with an error. What it adds to is
printed beside it: importing torch, torchvision and Lightning alone takes more than that. Pages of the file that were
touched count as resident (RssFile), though the system takes them back when it needs them; RssAnon is what is our own.
"""

import itertools
import os
import re
import resource
import socket
import statistics
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import numpy as np

from benchmarks.harness import QUIET_TRAINER, Row, arguments, in_fresh_process, report, silence
from self_supervised.data import data_sets, loading

BASE = {"batch_size": 256, "K": 4096, "dim": 128}
SWEEPS = [  # what grows, preset, field, values
    ("batch N (MoCo)", "moco_v2", "batch_size", [64, 256, 1024]),
    ("batch N (SimCLR)", "simclr", "batch_size", [64, 256, 1024]),
    ("queue K (MoCo)", "moco_v2", "K", [4096, 16384, 65536]),
    ("width D (MoCo)", "moco_v2", "dim", [64, 256, 1024]),
    ("width D (VICReg)", "vicreg", "dim", [64, 256, 1024]),
]
WORLDS = [("processes (MoCo)", "moco_v2"), ("processes (SimCLR)", "simclr"), ("processes (VICReg)", "vicreg")]
NETWORK = {"dataset_name": "cifar10", "encoder_arch": "resnet18", "low_resolution_stem": False}
GLOBAL_BATCH = 256
LEAST_RATIO = 0.85
IMAGES, STL10, PIXELS = [10_000, 35_000, 105_000], 105_000, 96
MOST_MEGABYTES = 500


# ---- steps; all of these run in processes of their own, and only they import torch ----


def join_group(rank: int, world: int, port: int) -> None:
    """The variables by which Lightning knows that somebody else has started the processes."""
    if world > 1:
        numbers = {"MASTER_PORT": port, "WORLD_SIZE": world, "LOCAL_RANK": rank, "NODE_RANK": 0}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in numbers.items()}}


def step_milliseconds(
    rank: int, world: int, port: int, cases: list[tuple[str, dict]], steps: int, threads: int = 1
) -> list[float]:
    """Median of a training step, for each (preset, fields)."""
    import torch

    join_group(rank, world, port)
    silence()
    torch.set_num_threads(threads)
    return [one_case(world, preset, fields, steps) for preset, fields in cases]


class Repeated:
    """A loader of the same batch again and again, which costs nothing."""

    def __init__(self, batch: list, times: int):
        self.batch, self.times = batch, times

    def __len__(self) -> int:
        return self.times

    def __iter__(self) -> Iterator[list]:
        return itertools.repeat(self.batch, self.times)


def one_case(world: int, preset: str, fields: dict, steps: int) -> float:
    import pytorch_lightning as pl
    import torch
    from torch import nn

    from moco import SelfSupervisedMethod
    from model_params import PRESETS

    ends: list[float] = []
    clock = pl.callbacks.LambdaCallback(on_train_batch_end=lambda *_: ends.append(time.perf_counter()))
    several = {"strategy": "ddp", "devices": world} if world > 1 else {"devices": 1}
    trainer = pl.Trainer(accelerator="cpu", max_steps=steps, callbacks=[clock], **QUIET_TRAINER, **several)
    options = {"dataset_name": "digits", "mlp_hidden_dim": 128, "warmup_epochs": 0, "evaluations": [], "seed": 0}
    encoder = None if "encoder_arch" in fields else nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU())
    params = PRESETS[preset](**{**options, **BASE, **fields})
    views = list(torch.randn(2, params.batch_size, *params.input_shape))
    trainer.fit(SelfSupervisedMethod(params, encoder=encoder), Repeated(views, steps))
    return 1000 * statistics.median(np.diff(ends[2:]))


def on_processes(world: int, cases: list[tuple[str, dict]], steps: int, threads: int = 1) -> list[float]:
    """step_milliseconds on `world` new processes at once; of the first one."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with ThreadPoolExecutor(world) as pool:
        started = [
            pool.submit(in_fresh_process, step_milliseconds, rank, world, port, cases, steps, threads)
            for rank in range(world)
        ]
        return [process.result()[0] for process in started][0]


# ---- the data set ----


def write_sparse(split: Path, images: int) -> None:
    """What data.pack would write, all zeros, without writing them."""
    split.mkdir(parents=True)
    shape = (images, PIXELS, PIXELS, 3)
    np.lib.format.open_memmap(split / "images.npy", mode="w+", dtype=np.uint8, shape=shape).flush()
    np.save(split / "labels.npy", np.zeros(images, dtype=np.int64))


def resident() -> dict[str, float]:
    """MB of this process now, by kind; and at its peak."""
    path = Path("/proc/self/status")
    kinds = re.findall(r"(RssAnon|RssFile):\s+(\d+)", path.read_text() if path.exists() else "")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"peak": peak} | {kind: int(kilobytes) / 1024 for kind, kilobytes in kinds}


def read_batches(folder: str, images: int, batches: int) -> tuple[float, dict[str, float], dict[str, float]]:
    """(median ms of a batch, memory before the data set is opened, memory after the batches)."""
    from model_params import ModelParams

    write_sparse(Path(folder) / "stl10" / "train", images)
    params = ModelParams(dataset_name="stl10", batch_size=256, seed=0)
    before, times = resident(), []
    with mock.patch.dict(os.environ, {"DATA_PATH": folder}):
        loader = loading.get_loader(params, data_sets.get_dataset(params, ("train",)), training=True)
    batch = iter(loader)
    for _ in range(batches):
        start = time.perf_counter()
        pictures, _ = next(batch)
        times.append(time.perf_counter() - start)
    assert pictures.shape == (256, 3, PIXELS, PIXELS)
    return 1000 * statistics.median(times), before, resident()


# ---- the table ----


def rows_of(what: str, values: list, milliseconds: list[float]) -> list[Row]:
    return [
        {"what": what, "value": value, "ms per step": ms, "ratio to first": ms / milliseconds[0]}
        for value, ms in zip(values, milliseconds, strict=True)
    ]


def step_rows(quick: bool, rounds: int) -> list[Row]:
    sweeps = [(what, preset, field, values[:2] if quick else values) for what, preset, field, values in SWEEPS]
    sweeps = sweeps[:1] if quick else sweeps
    cases = [(preset, {field: value}) for _, preset, field, values in sweeps for value in values]
    pairs = [(preset, {}) for _, preset in WORLDS]
    alone = on_processes(1, cases + pairs, rounds) if not quick else step_milliseconds(0, 1, 0, cases, 5)
    rows: list[Row] = []
    for what, _, _, values in sweeps:
        rows += rows_of(what, values, alone[: len(values)])
        alone = alone[len(values) :]
    together = [] if quick else on_processes(2, pairs, rounds)
    for (what, _), one, two in zip(WORLDS, alone, together, strict=False):
        rows += rows_of(what, [1, 2], [one, two])
    return rows


def network_rows(rounds: int) -> list[Row]:
    """Images per second of one process with two threads, and of two processes with one thread each, in turns."""
    presets = [preset for _, preset in WORLDS]
    times: dict[int, list[list[float]]] = {1: [], 2: []}
    for _ in range(3):
        for world in times:
            cases = [(preset, {**NETWORK, "batch_size": GLOBAL_BATCH // world}) for preset in presets]
            times[world].append(on_processes(world, cases, rounds, threads=2 // world))
    rows: list[Row] = []
    for i, preset in enumerate(presets):
        one, two = (1000 * GLOBAL_BATCH / statistics.median(turn[i] for turn in times[world]) for world in times)
        rows.append(
            {"method": preset, "1 process": one, "2 processes": two, "ratio": two / one, "to reach": LEAST_RATIO}
        )
    return rows


def data_rows(quick: bool) -> tuple[list[Row], list[Row]]:
    """(milliseconds of a batch as the set grows, memory of the largest)"""
    milliseconds, sizes = [], [512] if quick else IMAGES
    for images in sizes:
        with tempfile.TemporaryDirectory() as folder:
            arguments_ = folder, images, 2 if quick else 20
            ms, before, after = read_batches(*arguments_) if quick else in_fresh_process(read_batches, *arguments_)[0]
        milliseconds.append(ms)
    memory = [
        {"MB": kind, "imports": before[kind], "20 batches later": after[kind], "added": after[kind] - before[kind]}
        for kind in after
    ]
    return rows_of("images of STL-10's size", sizes, milliseconds), memory


def main(argv: list[str] | None = None) -> None:
    options = arguments(__doc__, rounds=40).parse_args(argv)
    batch_rows, memory = data_rows(options.quick)
    report("scaling_memory", memory, options.out)
    report("scaling", step_rows(options.quick, options.rounds) + batch_rows, options.out)
    if not options.quick:
        report("scaling_processes", network_rows(12), options.out)
    if not options.quick and memory[0]["added"] > MOST_MEGABYTES:
        raise SystemExit(f"{STL10} images added {memory[0]['added']:.0f} MB, which is more than {MOST_MEGABYTES} MB")


if __name__ == "__main__":
    main()
