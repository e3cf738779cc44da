"""Processes for tests, forked from a server that has imported torch and Lightning once: they start in no time."""

import multiprocessing
import os
import resource
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import torch

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["moco", "linear_classifier", "pytest", "conftest", "test_resume", "warm"])


def start_server() -> None:
    """The server finds our modules by PYTHONPATH alone (CPython does not hand it sys.path), and imports them once."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[1]), str(Path(__file__).parent)])
    forkserver.ensure_running()
    os.environ.pop("PYTHONPATH")
    if before is not None:
        os.environ["PYTHONPATH"] = before


@contextmanager
def full_disk(room: int) -> Iterator[None]:
    """No file grows beyond `room` bytes, which Python reports as it reports a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    """The variables by which Lightning knows that somebody else has started the processes."""
    if world_size == 1:
        return {}
    numbers = {"MASTER_PORT": port, "WORLD_SIZE": world_size, "LOCAL_RANK": rank, "NODE_RANK": 0}
    return {"MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in numbers.items()}}


def _child(function: Callable, variables: dict[str, str], folder: str, rank: int, args: tuple) -> None:
    os.environ |= variables
    multiprocessing.set_start_method("fork", force=True)  # for the workers of loaders, which are to die with us
    torch.set_num_threads(1)
    sys.stdout = sys.stderr = (Path(folder) / f"output_{rank}.txt").open("w", buffering=1)
    try:
        result = {"value": function(rank, *args)}
    except BaseException:
        traceback.print_exc()
        raise
    torch.save(result, Path(folder) / f"result_{rank}.pt")


def launch(function: Callable, world_size: int, folder: Path, *args: Any, variables: dict[str, str] | None = None):
    """Start function(rank, *args) on every process of a new group. `function` must be importable."""
    start_server()
    folder.mkdir(parents=True, exist_ok=True)
    port = free_port()
    started = []
    for rank in range(world_size):
        inherited = {name: os.environ[name] for name in ("DATA_PATH",) if name in os.environ}  # the server has its own
        given = {**inherited, **environment(rank, world_size, port), **(variables or {})}
        process = CONTEXT.Process(target=_child, args=(function, given, str(folder), rank, args))
        process.start()
        started.append(process)
    return started


def join(processes: list, timeout: float = 240) -> list[int]:
    """Exit codes. As torchrun does, the first process that fails takes the others with it."""
    end = time.monotonic() + timeout
    while any(process.is_alive() for process in processes):
        if time.monotonic() > end or any(process.exitcode not in (None, 0) for process in processes):
            time.sleep(0.2)
            for process in processes:
                process.kill()
        time.sleep(0.01)
    return [process.exitcode for process in processes]


def run(function: Callable, world_size: int, folder: Path, *args: Any) -> list[Any]:
    """What function(rank, *args) returned on each process."""
    codes = join(launch(function, world_size, folder, *args))
    outputs = "\n".join(path.read_text()[-3000:] for path in sorted(folder.glob("output_*.txt")))
    assert not any(codes), f"exit codes {codes}\n{outputs}"
    return [torch.load(folder / f"result_{rank}.pt")["value"] for rank in range(world_size)]


def run_code(rank: int, code: str, folder: str, variables: dict[str, str]) -> None:
    """Run a program in a folder, with these environment variables."""
    os.environ |= variables
    os.chdir(folder)
    exec(code, {"__name__": "__main__"})
