"""Every method on one CUDA GPU: images/s, share of the matrix peak, memory, share of the augmentation; and the peers.

    python -m benchmarks.gpu --minutes 8.5

Ours are trained by pl.Trainer in bf16-mixed, eager, with torch_compile and with its CUDA graphs: a ResNet-18 with the
low-resolution stem on packed 32 x 32 images, a ResNet-50 on decoded 256 x 256 images that lie on the device. The peers
train the same encoders in a plain loop with bf16 autocast, channels_last and cuDNN's search: kornia augments on the
device, lightly in a DataLoader with all cores; heads and losses of both are lightly's. The images are noise, which
takes as long as others.

MFU: FLOPs of the networks (FlopCounterMode; 3 forward passes for a view with gradient, 1 for one without) as a share of
the bf16 matrix product measured here. Augmentation: the time that the device needs for all views of a batch, as a share
of the step.

To be reached on one H200: the column `target` (30 % MFU), at most 5 % for the augmentation, 3 times the fastest peer.
Rows that did not fit into the minutes are named as skipped. gpu.csv is complete after every row.
"""

import contextlib
import gc
import io
import os
import re
import tempfile
import time
from pathlib import Path
from unittest import mock

import numpy as np
import torch

from benchmarks import harness
from benchmarks.gpu_peers import OF_LIGHTLY, theirs
from benchmarks.gpu_steps import (
    CUDA,
    TARGETS,
    Sizes,
    Task,
    augmentation_seconds,
    flops_per_image,
    machine_peak,
    ours,
    pool,
    quick_sizes,
)
from self_supervised.data.packed import pack


def plan(sizes: Sizes, compiled: bool) -> list[Task]:
    """The most important rows first: what does not fit into the minutes is at the end."""
    few, many = sizes.few, sizes.many
    eager = [Task("ours", method, batch) for batch in (many, few) for method in TARGETS]
    fused = [Task("ours compiled", method, few) for method in TARGETS]
    graphs = [Task("ours graphs", method, batch) for batch in (2 * many, many, few) for method in TARGETS]
    by_peers = [Task(by, method, batch) for by, batch in (("kornia", many), ("lightly", few)) for method in OF_LIGHTLY]
    on_large = ("simclr", "moco_v2", "byol") if sizes.warmup > 1 else ("simclr",)
    large = [Task("ours", method, few, large=True) for method in on_large]
    large_others = [Task("ours compiled", "simclr", few, large=True), Task("kornia", "simclr", few, large=True)]
    tasks = [*graphs[:7], *eager[:7], *by_peers, *graphs[7:], *eager[7:], *large, *large_others, *fused]
    tasks = dict.fromkeys(tasks)  # --quick has one batch
    return [task for task in tasks if compiled or task.by in ("ours", "kornia", "lightly")]


# ---- the table ----


def clean() -> int:
    """Forget the task before; returns the bytes that are still in use on the device."""
    gc.collect()
    torch.compiler.reset()
    if not CUDA:
        return 0
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def measured(task: Task, sizes: Sizes, peak: float) -> harness.Row:
    before = clean()
    is_ours = task.by not in ("kornia", "lightly")
    seconds = (ours if is_ours else theirs)(task, sizes)
    memory = (torch.cuda.max_memory_allocated() - before) / 2**30 if CUDA else ""
    speed = task.batch / seconds
    mfu = 100 * speed * flops_per_image(task.method, task.large, sizes) / peak
    augmentation = 100 * augmentation_seconds(task, sizes) / seconds if is_ours else ""
    return task.row(**{"images/s": speed, "MFU %": mfu, "peak GB": memory, "augmentation %": augmentation})


def attempt(task: Task, sizes: Sizes, peak: float, deadline: float) -> harness.Row:
    """The row, or why there is none: one that fails must not take the others along."""
    if time.perf_counter() + (20 if task.by in ("ours", "kornia", "lightly") else 75) * (sizes.warmup > 1) > deadline:
        return task.row(note="skipped: no time left")
    try:
        return measured(task, sizes, peak)
    except Exception as error:
        if not CUDA:
            raise
        return task.row(note=f"failed: {type(error).__name__}: {' '.join(str(error).split())[:200]}")


def compare(rows: list[harness.Row]) -> None:
    """Fills in how many times as fast as the fastest peer of the same method and network we are."""
    for row in rows:
        same = [r for r in rows if (r["method"], r["network"]) == (row["method"], row["network"]) and r["images/s"]]
        fastest = max((r["images/s"] for r in same if r["by"] in ("kornia", "lightly")), default=None)
        if row["by"].startswith("ours") and row["images/s"] and fastest:
            row["x fastest peer"] = row["images/s"] / fastest


def measure_all(tasks: list[Task], sizes: Sizes, out: Path, deadline: float) -> None:
    peak, rows = machine_peak(sizes, out), []
    for task in tasks:
        rows.append(attempt(task, sizes, peak, deadline))
        print(", ".join(f"{name} {harness.shown(v)}" for name, v in rows[-1].items() if v != ""), flush=True)
        compare(rows)
        with contextlib.redirect_stdout(io.StringIO()):  # its table is for the end
            harness.report("gpu", rows, out)
    harness.report("gpu", rows, out)


def packed_images(sizes: Sizes, folder: Path) -> None:
    """What DATA_PATH holds where the data set is CIFAR-10."""
    images = pool(*sizes.small_pool).permute(0, 2, 3, 1).cpu().numpy()
    (folder / "cifar10").mkdir()
    pack(folder / "cifar10" / "train", images, np.zeros(len(images)))


def main(argv: list[str] | None = None) -> None:
    start, parser = time.perf_counter(), harness.arguments(__doc__, rounds=3)
    parser.add_argument("--minutes", type=float, default=8.5, help="no measurement begins that would end later (8.5)")
    parser.add_argument("--only", default="", help="a pattern: only rows such as 'ours compiled simclr' that hold it")
    parser.add_argument("--compile", action="store_true", help="with --quick: torch_compile, too")
    args = parser.parse_args(argv)
    if not (CUDA or args.quick):
        raise SystemExit("a CUDA GPU is needed (--quick runs every code path at a tiny size without one)")
    sizes = quick_sizes() if args.quick else Sizes(args.rounds)
    tasks = plan(sizes, compiled=args.compile or not args.quick)
    if len(harness.installed("lightly", "kornia")) < 2:  # the heads and losses of both loops are lightly's
        tasks = [task for task in tasks if task.by.startswith("ours")]
    tasks = [task for task in tasks if re.search(args.only, f"{task.by} {task.method}")]
    harness.silence()
    torch.backends.cudnn.benchmark = True
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, DATA_PATH=folder):
        packed_images(sizes, Path(folder))
        measure_all(tasks, sizes, args.out, start + 60 * args.minutes)


if __name__ == "__main__":
    main()
