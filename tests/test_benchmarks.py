"""Every benchmark runs, at sizes at which its figures mean nothing; the page of figures is that of the CSV files."""

import importlib
import multiprocessing
import os
import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import processes
import pytest
from conftest import LONG

from benchmarks import cifar10, harness, report, sweep
from self_supervised import __main__ as entry
from self_supervised import recipes

ROOT = Path(__file__).parents[1]
NAMES = sorted(path.stem for path in (ROOT / "benchmarks").glob("*.py") if "def main(argv" in path.read_text())
SLOWEST = (  # 150 seconds
    "augment", "bf16_accuracy", "gpu", "loader", "micro_batches", "precision", "race", "shared", "video",
)  # fmt: skip


class Here(harness.Apart):
    """A contestant that has no process of its own."""

    def __init__(self) -> None:
        pass

    def build(self, make: Callable, *args) -> Callable[[], float]:
        return make(*args)

    def end(self) -> None:
        pass


def quick(rank: int, name: str, folder: str) -> None:
    """Without new interpreters, each of which would import PyTorch again for six seconds."""
    module, forked = importlib.import_module(f"benchmarks.{name}"), multiprocessing.get_context("fork")
    harness.Apart, multiprocessing.get_context = Here, lambda method=None: forked
    if name == "startup":
        module.interpreter = lambda program: lambda: exec(program)
    if name == "cifar10":
        module.Run.program = lambda _, *arguments: entry.main(arguments)
    module.main(["--quick", "--out", folder])


def test_all_are_found():
    assert len(NAMES) == 19 and {*SLOWEST, "step", "time_to_accuracy"} <= set(NAMES)


def test_parity_lists_the_commands_of_the_checkouts():
    """In a process of its own, which has no tests/ in its path."""
    command = [sys.executable, "-m", "benchmarks.parity", "--list"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    listed = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout
    assert "git clone https://github.com/facebookresearch/vicreg && git -C vicreg checkout " in listed


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in NAMES if LONG > 1 or name not in SLOWEST])
def test_it_runs_and_writes_its_table(name, tmp_path):
    processes.run(quick, 1, tmp_path / "process", name, str(tmp_path / "out"))
    found = sorted((tmp_path / "out").glob("*.csv"))
    assert found and any(path.stem.startswith(name) for path in found)
    for path in found:
        about, rows = harness.read(path)
        assert "torch" in about and rows and all(None not in row and None not in row.values() for row in rows)


def test_turns_alternate_and_a_contestant_may_bring_its_own_clock():
    turns = []
    runs = {"a": lambda: turns.append("a"), "b": lambda: turns.append("b") or 3.0}
    found = harness.in_turns(runs, rounds=2)
    assert turns == ["a", "b"] * 3 and found["b"] == 3.0 and 0 < found["a"] < 1


@pytest.mark.slow
def test_a_process_of_its_own_answers_with_its_memory(monkeypatch):
    processes.start_server()
    monkeypatch.setattr(harness.multiprocessing, "get_context", lambda _: processes.CONTEXT)  # starts faster
    total, megabytes = harness.in_fresh_process(sum, [1, 2])
    assert total == 3 and 10 < megabytes < 3000
    with pytest.raises(TypeError, match="unsupported operand"):
        harness.in_fresh_process(sum, ["a"])
    apart = harness.Apart()
    assert apart.build(partial, sum, [1, 2])() == 3
    apart.end()


@pytest.mark.parametrize(
    ("name", "others"),
    [
        ("results.md", ("| configuration | accuracy (%) | post", "| question | answer |")),
        ("evaluation.md", "| name | definition |"),
        ("performance.md", "| device | precision |"),
        ("distill.md", "| settings | loss |"),
        ("evidence.md", "| method | difference from"),
    ],
)
def test_every_table_of_results_comes_from_a_file(name, others):
    """Another test compares those of train_blog.py with their file; `others` are such, a summary, and definitions."""
    page = (ROOT / "docs" / name).read_text()
    alone = re.sub(r"<!-- (\w+) -->.*?<!-- end -->", "", page, flags=re.DOTALL)
    heads = [line for line, below in zip(alone.splitlines(), alone.splitlines()[1:], strict=False) if is_rule(below)]
    assert all(line.startswith(others) for line in heads)


def test_the_table_of_a_sweep_has_the_best_rate_of_each_preset():
    tries = (("a", "1", "40.0"), ("a", "0.1", "50.04"), ("a", "9", "nan"), ("b", "1", "nan"))
    names = ("preset", "lr", "linear %", "kNN-20 %", "fraction", "steps")
    rows = [dict(zip(names, (*one, one[-1], "1", "9"), strict=True), precision="32-true") for one in tries]
    table = [list(row.values())[3:-1] for row in report.tries_of_presets(rows)]
    assert table == [["0.1: 50.0, 1: 40.0, 9: nan", "0.1", "50.0"], ["1: nan", "1", "nan"]]


def test_other_settings_are_another_run(tmp_path):
    settings = ((), ("lr=0.5",), ("lr=0.5", "teacher=a/b"))
    runs = [cifar10.Run("cifar10_laptop", "simclr", 0, tmp_path, one) for one in settings]
    assert [run.lr for run in runs] == [recipes.recipe("simclr", "cifar10_laptop").lr, 0.5, 0.5]
    assert len({run.folder for run in runs}) == 3 and all(run.folder.parent == tmp_path for run in runs)
    table = cifar10.Table(tmp_path / "cifar10_laptop.csv")
    for score in ("1", "2"):  # the second one replaces the first
        table.put([{**cifar10.empty("simclr", 0), **runs[1].known, "linear %": score}], *runs[1].known)
    again = cifar10.Table(tmp_path / "cifar10_laptop.csv")
    assert [again.has(run.known) for run in runs] == [False, True, False]
    again.put([{**cifar10.empty("simclr", 0), **runs[2].known}], *runs[2].known)
    assert [row["linear %"] for row in again.rows] == ["2", ""]


def test_the_tries_of_a_sweep_do_not_move_with_the_recipes():
    tries: dict[str, set[str]] = {}
    for row in harness.read(harness.RESULTS / "sweep_cifar10_laptop.csv")[1]:
        if row["fraction"] == "0.3":
            tries.setdefault(row["preset"], set()).add(row["lr"])
    wanted = {name: {f"{factor * sweep.usual_lr(name):.3g}" for factor in sweep.FACTORS} for name in tries}
    assert tries == wanted and len(tries) == 22


def is_rule(line: str) -> bool:
    return "|-" in line.replace(" ", "").replace(":", "") and set(line) <= set("|-: ")


def test_the_pages_show_what_the_files_hold():
    text = "".join((ROOT / "docs" / name).read_text() for name in report.PAGES)
    files = sorted(path for path in harness.RESULTS.glob("*.csv") if not path.stem.endswith("_curves"))
    assert len(files) >= 7
    for path in files:  # recipes.csv is behind the results in recipes.md
        assert report.insert(text, path.stem, report.table_of(path)) == text
        assert f"<!-- {path.stem} -->" in text or path.stem == "recipes"
