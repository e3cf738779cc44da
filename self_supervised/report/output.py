"""The tables of evaluations in a terminal, as Markdown and as CSV, for `evaluate` and `compare`."""

import argparse
import csv
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from self_supervised.evaluation import results
from self_supervised.fields import as_path
from self_supervised.report.evaluations import EvaluationTable
from self_supervised.safe_files import atomic_write

CSV_COLUMNS = ("kind", "run", "dataset", "protocol", "metric", "value", "std", "n", "best")
BEST_MARK = "*"  # in a terminal; Markdown: bold


def title_of(table: EvaluationTable) -> str:
    return f"Evaluated on {table.dataset} by self-supervised evaluate"


def add_output_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--markdown", action="store_true", help="print the tables as Markdown")
    parser.add_argument("--csv", type=as_path, metavar="FILE", help="also write one row per value to this file")


def print_tables(tables: list[EvaluationTable]) -> None:
    """Print tables, each in as many parts as the width of the terminal needs."""
    console = Console(highlight=False, markup=False)
    for table in tables:
        console.print(f"{title_of(table)} ({BEST_MARK} best of its column)")
        texts = table.texts(f"{BEST_MARK}{{}}")
        for part in parts_that_fit(table.header, texts, console.width):
            shown = Table()
            for i in part:
                head = table.header[i].replace(" ", "\n")
                shown.add_column(head, justify="right" if i else "left", overflow="fold", no_wrap=i > 0)
            for row in texts:
                shown.add_row(*(Text(row[i], "bold" if row[i].startswith(BEST_MARK) else "") for i in part))
            console.print(shown)
        for note in table.notes:
            console.print(note, soft_wrap=True)
        console.print()


def parts_that_fit(header: list[str], texts: list[list[str]], width: int) -> Iterator[list[int]]:
    """Yield indices of columns: always the first, and as many others as fit. Headers are broken at blanks."""
    cells = [[*head.split(), *"\n".join(column).split("\n")] for head, *column in zip(header, *texts, strict=True)]
    widths = [max(map(len, lines)) + 3 for lines in cells]
    part = [0]
    for i in range(1, len(widths)):
        if len(part) > 1 and sum(widths[j] for j in part) + widths[i] >= width:
            yield part
            part = [0]
        part.append(i)
    yield part


def markdown_text(tables: list[EvaluationTable]) -> str:
    parts = []
    for table in tables:
        legend = ["Bold: best of its column."] if table.best else []
        notes = "\n".join(f"- {note}" for note in [*table.notes, *legend])
        parts += [f"## {title_of(table)}", results.markdown_table(table.header, table.texts("**{}**")), notes]
    return "\n\n".join(parts)


def csv_rows(tables: list[EvaluationTable]) -> list[dict[str, Any]]:
    return [
        {
            "kind": "evaluation",
            "run": row.label,
            "dataset": table.dataset,
            "protocol": protocol,
            "metric": metric,
            "value": cell.mean,
            "std": cell.std,
            "n": cell.n,
            "best": (i, j) in table.best,
        }
        for table in tables
        for i, row in enumerate(table.rows)
        for j, (protocol, metric) in enumerate(table.columns)
        if (cell := table.cells[i][j])
    ]


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write one row per value. Empty fields have no meaning for the kind of value."""
    written = io.StringIO()
    writer = csv.DictWriter(written, CSV_COLUMNS)
    writer.writeheader()
    writer.writerows(rows)
    atomic_write(path, written.getvalue())
