"""Compare runs: what `self-supervised evaluate` found, all results of the runs, and the settings that differ.

    self-supervised compare runs/byol_cifar10 runs/simclr_cifar10
    self-supervised compare runs/byol_cifar10 runs/simclr_cifar10 --markdown --csv comparison.csv

Runs that differ only in the seed share a row or column: mean ± sample standard deviation. The best value is marked.
"""

import math
import re
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import attrs
from attrs import frozen
from rich.console import Console
from rich.table import Column, Table

from self_supervised.evaluation.results import deviation, markdown_table
from self_supervised.fields import as_path
from self_supervised.program import one_line_errors
from self_supervised.report import evaluations, output
from self_supervised.runs.command_line import parser_of
from self_supervised.runs.run_options import RunOptions
from self_supervised.runs.values import text
from self_supervised.safe_files import rows_of
from self_supervised.setting_groups import SCORED_IMAGES
from self_supervised.training import run_folder
from self_supervised.training.milestones import is_finite, lowest_is_best, uses_test_labels

BEST = "best "  # prefix of results that are the best of an evaluated column of metrics.csv
RANKED = re.compile(r"(trained encoder: |linear classifier: |best )valid_.*(acc|rank_me).*")  # the highest is best
KIND_TITLES = {"result": "whole run", "setting": "settings that differ", "circumstance": "circumstances that differ"}
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
    start: str | None  # name of the encoder at the start in `results`, such as "random encoder"


def read_run(folder: str | Path) -> Run:
    """Load settings, circumstances and results of a run.

    Raises:
        ValueError: it is not the directory of a run.
    """
    folder = as_path(folder)
    settings = run_folder.settings_to_compare(folder)
    if not settings:
        raise ValueError(f"{folder} is not a run: it has no config.yaml. {run_folder.advice_without_run(folder)}")
    last = next(reversed(run_folder.starts_of(folder)), {})
    where = {name: last.get(name) for name in ("machine", "gpus")}
    versions = {f"{name} version": number for name, number in last.get("versions", {}).items() if name != "commit"}
    commit = last.get("versions", {}).get("commit") or "none"
    where["commit"] = re.sub(r"(?<=^.{10})[0-9a-f]{30}", "", commit)  # short, like git's
    start = run_folder.baseline_of(run_folder.results_of(folder))
    return Run(folder, settings, {**where, **versions}, results_of_run(folder), start)


def results_of_run(folder: Path) -> dict[str, float]:
    """Return the numbers of results.json and, from metrics.csv, the last training loss and the best value of each
    column that is evaluated per epoch. The row of the encoder before the training is not an epoch."""
    written = run_folder.results_of(folder)
    baseline = run_folder.baseline_of(written)
    results = {}
    for name, value in written.items():
        if isinstance(value, dict):
            results |= {f"{name}: {metric}": number for metric, number in value.items()}
        elif isinstance(value, int | float) and (name != "epochs" or "trained encoder" in written):
            results[name] = value  # earlier versions wrote the planned "epochs" at the start of a run
    _, rows = rows_of(run_folder.file_of(folder, "pretraining/metrics.csv"))
    from_zero = run_folder.first_epoch(folder) == 0
    for name in rows[0] if rows else []:
        numbers = [float(row[name]) for row in rows if row[name] and (from_zero or row.get("epoch") != "0")]
        if from_zero and f"{baseline}: {name}" in results:
            del numbers[0]
        if name == LAST and numbers:
            results[f"last {name}"] = numbers[-1]
        elif name.startswith("valid_") and numbers:
            best = min if lowest_is_best(name) else max
            results[BEST + name] = best(filter(is_finite, numbers), default=math.nan)
    return results


def compare(folders: Sequence[str | Path]) -> tuple[list[list[Run]], list[MetricRow]]:
    """Return (the runs, in groups that differ only in the seed; rows with all results, and with the settings and
    circumstances in which groups differ)."""
    evaluations.refuse_repeated(folders)
    groups: dict[str, list[Run]] = {}
    for run in map(read_run, folders):
        groups.setdefault(evaluations.without_seed(run.settings), []).append(run)
    columns = list(groups.values())
    rows = []
    for name in dict.fromkeys(name for column in columns for run in column for name in run.results):
        values = ([run.results[name] for run in column if name in run.results] for column in columns)
        rows.append(MetricRow("result", name, tuple(numbers or None for numbers in values)))
    rows += differing("setting", [[run.settings for run in column] for column in columns])
    rows += differing("circumstance", [[run.circumstances for run in column] for column in columns])
    return columns, rows


def differing(kind: str, columns: list[list[dict[str, Any]]]) -> list[MetricRow]:
    """Return a row for each name whose value differs between groups. A group's value is that of its runs, joined if
    they differ, and "-" if it is missing (runs of earlier versions, and runs made in Python, which have only some of
    RunOptions; the default of an option does not differ from "-")."""
    defaults = {name: text(value) for name, value in attrs.asdict(RunOptions()).items()}
    rows = []
    for name in dict.fromkeys(name for column in columns for values in column for name in values):
        shown = [
            ", ".join(dict.fromkeys(text(values[name]) if name in values else "-" for values in column))
            for column in columns
        ]
        if len({defaults.get(name, one) if one == "-" else one for one in shown}) > 1:
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


def missing_scores(runs: Iterable[Run]) -> list[str]:
    """Return a sentence on each score that runs lack."""
    lacking: dict[str, list[str]] = {}
    for run in (one for one in runs if "evaluations" in one.settings):
        unwanted = "" if run.settings["evaluations"] else "evaluations=[]"
        cause = "limit_val_batches=0" if run.settings.get("limit_val_batches") == 0 else "evaluate_every_n_epochs"
        after = f"it was not evaluated after the last step ({cause})"
        reasons = {
            run.start or "encoder at the start": unwanted or "it was not evaluated before the training",
            "trained encoder": unwanted or (after if "epochs" in run.results else "the training has not ended"),
        }
        for scored, reason in reasons.items():
            if not any(name.startswith(f"{scored}: ") for name in run.results):
                lacking.setdefault(f"no scores of the {scored}: {reason}", []).append(run.folder.name)
    return [f"{', '.join(names)}: {sentence}." for sentence, names in lacking.items()]


def best_columns(row: MetricRow, rows: list[MetricRow]) -> list[int]:
    """Return the columns with the best mean of a result, if it is one in which methods can be ranked.

    Args:
        rows: all rows of the table: runs on different data are not ranked.
    """
    if row.kind != "result" or not RANKED.fullmatch(row.name) or {one.name for one in rows} & {*SCORED_IMAGES}:
        return []
    return evaluations.indices_of_best([statistics.fmean(numbers) if numbers else None for numbers in row.values])


def texts_of(row: MetricRow, rows: list[MetricRow], mark: str) -> list[str]:
    """Return the name and values of one of the rows. `mark` is a format of the best values."""
    texts = [score_text(value) if row.kind == "result" else value for value in row.values]
    best = best_columns(row, rows)
    return [row.name, *(mark.format(text) if i in best else text for i, text in enumerate(texts))]


def labels_of_columns(columns: list[list[Run]]) -> list[str]:
    names = iter(evaluations.names_of_runs([run.folder for column in columns for run in column]))
    return evaluations.group_labels([[next(names) for _ in column] for column in columns])


def notes_below(columns: list[list[Run]]) -> list[str]:
    joined = "mean ± sample standard deviation (runs)." if any(len(column) > 1 for column in columns) else ""
    runs = [run for column in columns for run in column]
    repeated = [note for column in columns for note in evaluations.same_seeds(run.folder for run in column)]
    return list(filter(None, [joined, *repeated, *missing_scores(runs), caution(runs)]))


def print_comparison(columns: list[list[Run]], rows: list[MetricRow]) -> None:
    """Print the table, in as many parts as the width of the terminal needs, and the notes."""
    console = Console(highlight=False, markup=False)
    for widths in ((40, 30), (20, 8)):  # of names and of values; the second pair if the first is too wide
        texts, starts = texts_in_sections(columns, rows, *widths)
        parts = list(output.parts_that_fit(texts[0], texts, console.width))
        if len(parts) == 1:
            break
    for part in parts:
        table = Table(*(Column(texts[0][i], overflow="fold") for i in part))
        for n, cells in enumerate(texts[1:], 1):
            if n in starts:
                table.add_section()
            table.add_row(*(cells[i] for i in part), style="bold" if n in starts else "")
        console.print(table)
    for note in notes_below(columns):
        console.print(note)


def texts_in_sections(
    columns: list[list[Run]], rows: list[MetricRow], of_names: int, of_values: int
) -> tuple[list[list[str]], list[int]]:
    """Return (the header, the rows, and a row with a title before each section; the indices of the titles).

    Args:
        of_names, of_values: characters after which names, and settings, are broken where possible.
    """
    texts = [["", *(broken(label, of_values) for label in labels_of_columns(columns))]]
    titles: list[tuple[int, str]] = []
    for row in rows:
        scored, _, metric = row.name.rpartition(": ") if row.kind == "result" else ("", "", row.name)
        title = scored or KIND_TITLES[row.kind]
        if not titles or title != titles[-1][1]:
            titles.append((len(texts), title))
            texts.append([broken(title, of_names), *("" for _ in columns)])
        _, *values = texts_of(row, rows, f"{output.BEST_MARK}{{}}")
        shown = values if row.kind == "result" else [broken(value, of_values) for value in values]
        texts.append([broken(metric, of_names), *shown])
    return texts, [n for n, _ in titles]


def broken(text: str, width: int) -> str:
    """Return a text in lines of at most `width` characters, broken after blanks and any of _,/+- where possible."""
    lines = [""]
    for piece in re.findall(rf"[^\s_,/+-]{{0,{width - 1}}}[\s_,/+-]|[^\s_,/+-]{{1,{width}}}", text):
        if lines[-1] and len(lines[-1] + piece.rstrip()) > width:
            lines.append("")
        lines[-1] += piece
    return "\n".join(line.rstrip() for line in lines)


def comparison_markdown(columns: list[list[Run]], rows: list[MetricRow]) -> str:
    header = ["", *labels_of_columns(columns)]
    shown = [texts_of(row, rows, "**{}**") for row in rows]
    parts = ["## Results and settings", markdown_table(header, shown), *notes_below(columns)]
    return "\n\n".join(parts)


def comparison_csv(columns: list[list[Run]], rows: list[MetricRow]) -> list[dict[str, Any]]:
    lines = []
    labels = labels_of_columns(columns)
    for row in rows:
        best = best_columns(row, rows)
        for i, (label, value) in enumerate(zip(labels, row.values, strict=True)):
            about = {"kind": row.kind, "run": label, "metric": row.name}
            if row.kind != "result":
                lines.append(about | {"value": value})
            elif value:
                std = deviation(value) if len(value) > 1 else None
                lines.append(about | {"value": statistics.fmean(value), "std": std, "n": len(value), "best": i in best})
    return lines


@one_line_errors()
def main(arguments: Sequence[str] | None = None) -> None:
    parser = parser_of("compare", __doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="directory of a run")
    output.add_output_options(parser)
    args = parser.parse_args(arguments)
    columns, rows = compare(args.runs)
    tables = evaluations.evaluation_tables(evaluations.evaluated_rows(args.runs))
    if args.csv:
        output.write_csv(args.csv, [*output.csv_rows(tables), *comparison_csv(columns, rows)])
    if args.markdown:
        print("\n\n".join([*filter(None, [output.markdown_text(tables)]), comparison_markdown(columns, rows)]))
        return
    output.print_tables(tables)
    print_comparison(columns, rows)
    if not tables:
        print(*evaluations.notes_on(args.runs, tables))
