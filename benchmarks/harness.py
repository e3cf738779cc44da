"""What every benchmark shares: contestants timed in turns, the machine's peak, tables, CSV files, fresh processes.

Times are medians over rounds in which every contestant has its turn (A B C, A B C, ...), so that a neighbor of the
machine slows all of them; ratios of medians are what to compare.
"""

import argparse
import csv
import importlib
import importlib.metadata
import logging
import multiprocessing
import platform
import re
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

from self_supervised.fields import as_path
from self_supervised.training.precision import has_bfloat16
from self_supervised.training.run_folder import versions

RESULTS = Path(__file__).parent / "results"
Row = dict[str, Any]
QUIET_TRAINER = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)


def arguments(description: str | None, rounds: int) -> argparse.ArgumentParser:
    """Return a parser with the options that all benchmarks have."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--quick", action="store_true", help="tiny sizes, for a test that it runs; the numbers are void"
    )
    parser.add_argument("--rounds", type=int, default=rounds, help=f"turns of every contestant ({rounds})")
    parser.add_argument("--out", type=as_path, default=RESULTS, help="folder of the CSV file")
    return parser


def silence() -> None:
    """Hide the warnings of other libraries, and what Lightning logs."""
    warnings.filterwarnings("ignore", module="pytorch_lightning|lightning_fabric|lightly|torch")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)


def installed(*packages: str) -> list[str]:
    """Return those of the packages that can be imported, and name the others on stderr."""
    importable = []
    for package in packages:
        try:
            importlib.import_module(package)
            importable.append(package)
        except ImportError as error:
            print(f"left out: {package} ({error}); pip install -r benchmarks/requirements.txt", file=sys.stderr)
    return importable


# ---- time ----


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(run: Callable[[], Any]) -> float:
    synchronize()
    start = time.perf_counter()
    result = run()
    synchronize()
    return result if isinstance(result, float) else time.perf_counter() - start


def in_turns(contestants: dict[str, Callable[[], Any]], rounds: int, warmup: int = 1) -> dict[str, float]:
    """Return the median seconds of each contestant over `rounds` turns, after `warmup` turns that do not count. A
    contestant that returns a float has measured the seconds itself."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(warmup + rounds):
        for name, run in contestants.items():
            elapsed = seconds(run)
            if turn >= warmup:
                times[name].append(elapsed)
    return {name: statistics.median(values) for name, values in times.items()}


def matmul_seconds(dtype: torch.dtype = torch.float32, size: int = 2048) -> tuple[Callable[[], Any], float]:
    """Return one matrix product to be timed, and its number of floating-point operations."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return lambda: a @ b, 2.0 * size**3


def in_fresh_process(run: Callable[..., Any], *args: Any) -> tuple[Any, float]:
    """Return the result of run(*args) in a new process, and its peak resident memory in MB. `run` must be importable.

    Raises:
        BrokenProcessPool: the process ended without a result. What run raises is raised here, too.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_with_peak, run, *args).result()


def _with_peak(run: Callable[..., Any], *args: Any) -> tuple[Any, float]:
    result = run(*args)
    status = Path("/proc/self/status").read_text()  # getrusage() would count what the parent had when it forked
    return result, int(re.search(r"VmHWM:\s+(\d+)", status)[1]) / 1024


class Apart:
    """A process of its own for one kind of contestant: what it sets in its process, the others do not have.

    Raises:
        RuntimeError: building the contestant, or its turn, raised; the message is its error's.
    """

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_take_turns, args=(theirs,), daemon=False)
        self.process.start()
        theirs.close()

    def build(self, make: Callable[..., Callable[[], float]], *args: Any) -> Callable[[], float]:
        """Build a contestant there, make(*args), in place of the one before. Each call of the returned function takes a
        turn there, and returns the seconds that the turn measured. `make` must be importable."""
        self.ask(make, *args)
        return lambda: self.ask(None)

    def ask(self, make: Callable | None, *args: Any) -> Any:
        self.pipe.send((make, args))
        answer = self.pipe.recv()
        if isinstance(answer, Exception):
            raise answer
        return answer

    def end(self) -> None:
        self.pipe.close()
        self.process.join()


def _take_turns(pipe) -> None:
    multiprocessing.set_start_method("fork", force=True)  # of loaders' workers: ours, spawn, is handed on to them
    silence()
    contestant: Callable[[], float] = float
    while True:
        try:
            make, args = pipe.recv()
        except EOFError:
            return
        try:
            if make is None:
                pipe.send(contestant())
            else:
                contestant = float  # frees the one before
                contestant = make(*args)
                pipe.send(None)
        except Exception as error:  # whoever asked raises it
            pipe.send(RuntimeError(repr(error)))


# ---- tables ----


def machine(*packages: str) -> str:
    """Return one line: processor, threads, GPU, versions, commit."""
    instructions = torch.backends.cpu.get_cpu_capability() + (", bfloat16" if has_bfloat16() else "")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    packed = [f"{name} {importlib.metadata.version(name)}" for name in ("torch", *packages)]
    processor = f"{platform.machine()} ({instructions}), {torch.get_num_threads()} threads"
    return f"{processor}, {device}; {', '.join(packed)}; commit {commit() or 'unknown'}"


def commit() -> str:
    """Return the short hash of this code, with "+changes" if files were changed; "" outside of a repository."""
    return short(versions()["commit"])


def short(commit: str | None) -> str:
    """Return the short form of a commit as run.json has it."""
    revision, plus, _ = (commit or "").partition("+")
    return revision[:7] + ("+changes" if plus else "")


def shown(value: Any) -> str:
    """Return a number with at most three digits, or more before the point."""
    if not isinstance(value, float):
        return str(value)
    if 9.995 <= abs(value) < 99.95:
        return f"{value:.1f}"  # 40.0, where "g" gives 40
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def markdown(rows: Iterable[Row]) -> str:
    """Return rows of the same keys as a Markdown table with aligned columns."""
    rows = list(rows)
    cells = [list(rows[0])] + [[shown(value) for value in row.values()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in cells]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])


def report(name: str, rows: list[Row], folder: Path, *packages: str) -> None:
    """Print the table and write it to `folder`/`name`.csv, whose first line, a comment, says the machine."""
    print(f"\n{name} ({machine(*packages)})\n{markdown(rows)}", flush=True)
    write(folder / f"{name}.csv", rows, *packages)


def write(path: Path, rows: list[Row], *packages: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        file.write(f"# {machine(*packages)}\n")
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def finished(path: Path) -> list[Row]:
    """Return the rows of the file; none if there is no file yet."""
    return read(path)[1] if path.exists() else []


def explain_nothing_new(path: Path, rows_before: int) -> None:
    """Print why a benchmark has trained nothing, if the file has as many rows as before."""
    if len(finished(path)) == rows_before:
        print(f"nothing to do: {path} has all these rows. --out DIRECTORY makes them again")


def has(rows: Iterable[Row], known: Row) -> bool:
    """Return whether a row of a file has these values."""
    return any({name: str(value) for name, value in known.items()}.items() <= row.items() for row in rows)


def read(path: Path) -> tuple[str, list[Row]]:
    """Return what the first line says of the machine, and the rows, whose values are texts."""
    with open(path, newline="") as file:
        return file.readline().removeprefix("# ").strip(), list(csv.DictReader(file))
