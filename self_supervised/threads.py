"""Threads of PyTorch on a machine that other programs use as well."""

import os
import time
from pathlib import Path

import torch
from pytorch_lightning.utilities import rank_zero_info

CLOCK = Path("/proc/stat")  # of Linux: time of each core since the start of the system
WATCHED = 0.3  # seconds
IDLE = slice(3, 5)  # columns of a core in CLOCK: idle, and waiting for a disk
ALL = slice(0, 8)  # without the time of guests, which "user" includes
LIMIT = "OMP_NUM_THREADS"


def use_free_cores() -> None:
    """Use as many threads as there are free cores. If they are fewer than the cores, a line says so.

    PyTorch's threads wait for each other after every operation, and keep their cores busy meanwhile. A program that
    takes one of two cores therefore costs more than half of the speed (docs/performance.md, "Shared machines").
    The environment variable OMP_NUM_THREADS is obeyed. Only Linux tells how busy each core is.
    """
    threads = torch.get_num_threads()
    if threads == 1 or LIMIT in os.environ or not CLOCK.exists():
        return
    cores, free = free_cores()
    if (wanted := max(1, round(free))) < threads:
        torch.set_num_threads(wanted)
        rank_zero_info(
            f"threads: {wanted} instead of {threads}, because other programs use {cores - free:.1f} of {cores} cores "
            f"({LIMIT}={threads} takes all)"
        )


def free_cores() -> tuple[int, float]:
    """Return the number of cores that this process may use, and how many of them are idle, in a moment of sleep."""
    before = core_times()
    time.sleep(WATCHED)
    spent = {core: [b - a for a, b in zip(before[core], now, strict=True)] for core, now in core_times().items()}
    return len(spent), sum(sum(times[IDLE]) / max(1, sum(times[ALL])) for times in spent.values())


def core_times() -> dict[int, list[int]]:
    """Return the times of CLOCK, in ticks, of each core that this process may use."""
    lines = (line.split() for line in CLOCK.read_text().splitlines())
    times = {int(name[3:]): [int(ticks) for ticks in rest] for name, *rest in lines if name[:3] == "cpu" != name}
    return {core: times[core] for core in os.sched_getaffinity(0) if core in times}
