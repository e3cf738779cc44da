"""What a training step costs on two cores while another program keeps one of them busy.

    python -m benchmarks.shared

SimCLR as in benchmarks.step, in float32, on the quiet machine and next to a process of one thread that computes without
a pause. Each setting of the threads has a process of its own, which waits while others have their turn. "free cores" is
what the programs do (self_supervised/threads.py): they count at the start of a run.

To reach: next to the neighbor, near the two thirds that a fair share leaves; on the quiet machine, no loss.
"""

import multiprocessing
import os
from collections.abc import Callable
from contextlib import contextmanager
from unittest import mock

import torch
from attrs import evolve

from benchmarks import harness, step
from self_supervised import threads

THREADS = 2
FREE = "free cores"
SETTINGS = {  # name -> environment variables
    "two threads": {},
    "two threads, OMP_WAIT_POLICY=PASSIVE": {"OMP_WAIT_POLICY": "PASSIVE"},
    "two threads, GOMP_SPINCOUNT=1000": {"GOMP_SPINCOUNT": "1000"},
    "one thread": {threads.LIMIT: "1"},
    FREE: {},
}
SHARE = 2 / 3  # three threads on two cores, of which the step has two


def compute_forever() -> None:
    while True:
        pass


@contextmanager
def neighbor(busy: bool):
    process = multiprocessing.get_context("fork").Process(target=compute_forever, daemon=True)
    if busy:
        process.start()
    yield
    if busy:
        process.kill()
        process.join()


def step_with(name: str, network: step.Network, steps: int) -> Callable[[], float]:
    if name != FREE and threads.LIMIT not in os.environ:
        torch.set_num_threads(THREADS)
    turn = step.ours(step.settings("simclr", network), steps)

    def with_free_cores() -> float:
        torch.set_num_threads(THREADS)
        threads.use_free_cores()
        return turn()

    return with_free_cores if name == FREE else turn


def measure(network: step.Network, rounds: int, processes: dict[str, harness.Apart]) -> list[harness.Row]:
    runs = {name: process.build(step_with, name, network, network.steps) for name, process in processes.items()}
    rates: dict[bool, dict[str, float]] = {}
    for busy in (False, True):
        with neighbor(busy):
            times = harness.in_turns(runs, rounds, warmup=0)
        rates[busy] = {name: network.batch * network.steps / elapsed for name, elapsed in times.items()}
    best = rates[False]["two threads"]
    return [
        {
            "network": network.name,
            "threads": name,
            "images/s, quiet": quiet,
            "images/s, with a neighbor": rates[True][name],
            "x two threads, quiet": quiet / best,
            "with a neighbor, x two threads, quiet": rates[True][name] / best,
            "fair share": SHARE,
        }
        for name, quiet in rates[False].items()
    ]


def main(argv: list[str] | None = None) -> None:
    options = harness.arguments(__doc__, rounds=2).parse_args(argv)
    harness.silence()
    networks = step.NETWORKS[:2]
    names = list(SETTINGS)
    if options.quick:
        networks, names = [evolve(step.NETWORKS[1], batch=4, steps=1)], [names[0], FREE]
    processes = {}
    for name in names:
        kept = {key: value for key, value in os.environ.items() if key != threads.LIMIT}
        with mock.patch.dict(os.environ, kept | SETTINGS[name], clear=True):
            processes[name] = harness.Apart()
    rows = [row for network in networks for row in measure(network, 1 if options.quick else options.rounds, processes)]
    for process in processes.values():
        process.end()
    harness.report("shared", rows, options.out, "pytorch_lightning")


if __name__ == "__main__":
    main()
