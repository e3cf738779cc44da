"""Compare runs: the settings that differ, and all results.

    self-supervised compare runs/byol_cifar10 runs/simclr_cifar10

Runs that differ only in the seed share a column: mean ± standard deviation.
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

BEST = "best "  # prefix of results that are the best of an evaluated column of metrics.csv
LAST = "step_train_loss"  # column of metrics.csv whose last value is a result


@frozen
class MetricRow:
    """A row of the comparison: a value for each group of runs, or None."""

    kind: str  # "setting", "circumstance" or "result"
    name: str
    values: tuple[Any, ...]  # texts; for results, lists of the runs' values


@frozen
class Run:
    folder: Path
    settings: dict[str, Any]
    circumstances: dict[str, Any]  # machine, GPUs, commit and versions of the last start
    results: dict[str, float]

    @property
    def without_seed(self) -> str:
        """Key of the group of runs that differ only in the seed."""
        return json.dumps({name: value for name, value in self.settings.items() if name != "seed"}, sort_keys=True)


def read_run(folder: str | Path) -> Run:
    """Load settings, circumstances and results of a run.

    Raises:
        ValueError: it is not the directory of a run.
    """
    folder = as_path(folder)
    settings = run_folder.settings_of_run(folder)
    if not settings:
        raise ValueError(f"{folder} is not a run: it has no config.yaml. Pass the directory of a run.")
    last = next(reversed(run_folder.starts_of(folder)), {})
    where = {name: last.get(name) for name in ("machine", "gpus")}
    versions = {f"{name} version": number for name, number in last.get("versions", {}).items() if name != "commit"}
    commit = last.get("versions", {}).get("commit") or "none"
    where["commit"] = re.sub(r"(?<=^.{10})[0-9a-f]{30}", "", commit)  # short, like git's
    return Run(folder, settings, {**where, **versions}, results_of_run(folder))


def results_of_run(folder: Path) -> dict[str, float]:
    """Return the numbers of results.json and, from metrics.csv, the last training loss and the best value of each
    column that is evaluated per epoch. The first row, that of the encoder before the training, is not an epoch."""
    written = run_folder.results_of(folder)
    baseline = run_folder.baseline_of(written)
    found = {}
    for name, value in written.items():
        if isinstance(value, dict):
            found |= {f"{name}: {metric}": math.nan if number is None else number for metric, number in value.items()}
        elif isinstance(value, int | float) and (name != "epochs" or "trained encoder" in written):
            found[name] = value  # earlier versions wrote the planned "epochs" at the start of a run
    _, rows = rows_of(folder / "pretraining" / "metrics.csv")
    for name in rows[0] if rows else []:
        numbers = [float(row[name]) for row in rows if row[name]]
        if name == LAST and numbers:
            found[f"last {name}"] = numbers[-1]
        elif name.startswith("valid_") and (epochs := numbers[f"{baseline}: {name}" in found :]):
            best = min if lowest_is_best(name) else max
            found[BEST + name] = best(filter(is_finite, epochs), default=math.nan)
    return found


def refuse_repeated(folders: Sequence[str | Path]) -> None:
    for folder, times in Counter(as_path(folder).resolve() for folder in folders).items():
        if times > 1:
            raise ValueError(f"{folder} was passed {times} times. Pass it once.")


def compare(folders: Sequence[str | Path]) -> tuple[list[list[Run]], list[MetricRow]]:
    """Return (the runs, in groups that differ only in the seed; rows with the settings and circumstances in which
    groups differ, and with all results)."""
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
    """Return a row for each name whose value differs between groups. A group's value is that of its runs, joined if
    they differ, and "-" if it is missing (runs of earlier versions)."""
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
    """Return the number as text; for more than one, mean ± sample standard deviation (count)."""
    if not numbers:
        return ""
    if len(numbers) == 1:
        return f"{numbers[0]:.4g}"
    return f"{statistics.mean(numbers):.4g} ± {deviation(numbers):.2g} ({len(numbers)})"


def caution(runs: Iterable[Run]) -> str:
    """Return a warning if best epochs are chosen by test labels, else ""."""
    chosen = {
        run.settings.get("dataset_name")
        for run in runs
        for name in run.results
        if name.startswith(BEST) and uses_test_labels(name.removeprefix(BEST), run.settings.get("dataset_name"))
    }
    names = ", ".join(sorted(chosen))
    return f"The best epochs are chosen by test labels ({names}): do not report them as results." if chosen else ""


def comparison_table(columns: list[list[Run]], rows: list[MetricRow]) -> Table:
    joined = "mean ± sample standard deviation (runs). " if any(len(column) > 1 for column in columns) else ""
    table = Table(caption=joined + caution(run for column in columns for run in column) or None)
    table.add_column("", no_wrap=True)
    for column in columns:
        table.add_column(" ".join(run.folder.name for run in column), overflow="fold")
    for before, row in zip([None, *rows], rows, strict=False):
        if before is not None and before.kind != row.kind:
            table.add_section()
        table.add_row(row.name, *(score_text(value) if row.kind == "result" else value for value in row.values))
    return table


@one_line_errors()
def main(arguments: Sequence[str] | None = None) -> None:
    parser = parser_of("compare", __doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="directory of a run")
    Console(highlight=False, markup=False).print(comparison_table(*compare(parser.parse_args(arguments).runs)))
