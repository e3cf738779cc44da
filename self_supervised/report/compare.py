"""What differs between runs, in settings and in results.

    self-supervised compare runs/byol_cifar10 runs/simclr_cifar10

Runs of the same settings but for the seed are one column: mean ± standard deviation over them.
"""

import json
import math
import re
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from attrs import frozen
from rich.console import Console
from rich.table import Table

from self_supervised.evaluation.results import deviation
from self_supervised.fields import as_path
from self_supervised.program import one_line_errors
from self_supervised.runs import run_folder
from self_supervised.runs.command_line import parser_of, text
from self_supervised.safe_files import rows_of
from self_supervised.training.milestones import is_finite, lowest_is_best, uses_test_labels

BEST = "best "  # of metrics.csv: begins the names of results
LAST = "step_train_loss"  # of metrics.csv; of what is in results.json the last is there


@frozen
class MetricRow:
    """One line of the comparison: a value for each group of runs, None where it has none."""

    kind: str  # "setting", "circumstance" or "result"
    name: str
    values: tuple[Any, ...]  # of results: the list of the runs' values


@frozen
class Run:
    folder: Path
    settings: dict[str, Any]
    circumstances: dict[str, Any]  # of its last start
    results: dict[str, float]

    @property
    def without_seed(self) -> str:
        return json.dumps({name: value for name, value in self.settings.items() if name != "seed"}, sort_keys=True)


def read_run(folder: str | Path) -> Run:
    """
    Raises:
        ValueError: it is no folder of a run.
    """
    folder = as_path(folder)
    settings = run_folder.settings_of_run(folder)
    if not settings:
        raise ValueError(f"{folder} is no run of train.py: it holds no config.yaml")
    last = next(reversed(run_folder.starts_of(folder)), {})
    where = {name: last.get(name) for name in ("machine", "gpus")}
    versions = {f"{name} version": number for name, number in last.get("versions", {}).items() if name != "commit"}
    commit = last.get("versions", {}).get("commit") or "none"
    where["commit"] = re.sub(r"(?<=^.{10})[0-9a-f]{30}", "", commit)  # as git shortens it
    return Run(folder, settings, {**where, **versions}, results_of_run(folder))


def results_of_run(folder: Path) -> dict[str, float]:
    """Numbers of results.json; of metrics.csv the last training loss, and the best of what is evaluated each epoch (the
    random encoder, whose row is the first, is no epoch)."""
    written, found = run_folder.results_of(folder), {}
    for name, value in written.items():
        if isinstance(value, dict):
            found |= {f"{name}: {figure}": math.nan if number is None else number for figure, number in value.items()}
        elif isinstance(value, int | float) and (name != "epochs" or "trained encoder" in written):
            found[name] = value  # earlier versions wrote "epochs" at the beginning: those wanted
    _, rows = rows_of(folder / "pretraining" / "metrics.csv")
    for name in rows[0] if rows else []:
        numbers = [float(row[name]) for row in rows if row[name]]
        if name == LAST and numbers:
            found[f"last {name}"] = numbers[-1]
        elif name.startswith("valid_") and (epochs := numbers[f"random encoder: {name}" in found :]):
            best = min if lowest_is_best(name) else max
            found[BEST + name] = best(filter(is_finite, epochs), default=math.nan)
    return found


def refuse_repeated(folders: Sequence[str | Path]) -> None:
    for folder, times in Counter(as_path(folder).resolve() for folder in folders).items():
        if times > 1:
            raise ValueError(f"{folder} is named twice: name it once")


def compare(folders: Sequence[str | Path]) -> tuple[list[list[Run]], list[MetricRow]]:
    """(the runs, in groups that differ in nothing but the seed; the settings and circumstances in which groups differ,
    and all results)."""
    refuse_repeated(folders)
    groups: dict[str, list[Run]] = {}
    for run in map(read_run, folders):
        groups.setdefault(run.without_seed, []).append(run)
    columns = list(groups.values())
    rows = differing("setting", [[run.settings for run in column] for column in columns])
    rows += differing("circumstance", [[run.circumstances for run in column] for column in columns])
    for name in dict.fromkeys(name for column in columns for run in column for name in run.results):
        values = ([run.results[name] for run in column if name in run.results] for column in columns)
        rows.append(MetricRow("result", name, tuple(numbers or None for numbers in values)))
    return columns, rows


def differing(kind: str, columns: list[list[dict[str, Any]]]) -> list[MetricRow]:
    """A group's value is that of its runs; the different ones joined, where there are several; "-" where there is none,
    as in a run of an older version."""
    rows = []
    for name in dict.fromkeys(name for column in columns for values in column for name in values):
        shown = [
            ", ".join(dict.fromkeys(text(values[name]) if name in values else "-" for values in column))
            for column in columns
        ]
        if len(set(shown)) > 1:
            rows.append(MetricRow(kind, name, tuple(shown)))
    return rows


def score_text(numbers: list[float] | None) -> str:
    """The number; of several, mean ± sample standard deviation."""
    if not numbers:
        return ""
    if len(numbers) == 1:
        return f"{numbers[0]:.4g}"
    return f"{statistics.mean(numbers):.4g} ± {deviation(numbers):.2g} ({len(numbers)})"


def caution(runs: Iterable[Run]) -> str:
    """What to know of best epochs that were chosen by test labels; "" if there are none."""
    chosen = {
        run.settings.get("dataset_name")
        for run in runs
        for name in run.results
        if name.startswith(BEST) and uses_test_labels(name.removeprefix(BEST), run.settings.get("dataset_name"))
    }
    names = ", ".join(sorted(chosen))
    return f"The best epochs are chosen by test labels ({names}): they are no results to report." if chosen else ""


def comparison_table(columns: list[list[Run]], rows: list[MetricRow]) -> Table:
    joined = "mean ± sample standard deviation (runs). " if any(len(column) > 1 for column in columns) else ""
    made = Table(caption=joined + caution(run for column in columns for run in column) or None)
    made.add_column("", no_wrap=True)
    for column in columns:
        made.add_column(" ".join(run.folder.name for run in column), overflow="fold")
    for before, row in zip([None, *rows], rows, strict=False):
        if before is not None and before.kind != row.kind:
            made.add_section()
        made.add_row(row.name, *(score_text(value) if row.kind == "result" else value for value in row.values))
    return made


@one_line_errors()
def main(arguments: Sequence[str] | None = None) -> None:
    parser = parser_of("compare", __doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run")
    Console(highlight=False, markup=False).print(comparison_table(*compare(parser.parse_args(arguments).runs)))
