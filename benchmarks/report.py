"""Puts the tables of benchmarks/results/*.csv into docs/performance.md, and draws a picture of each.

    python -m benchmarks.report

In the text, a table stands between `<!-- NAME -->` and `<!-- end -->`, where NAME is that of its CSV file.
"""

import csv
import re
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
from attrs import field, frozen

from benchmarks.harness import RESULTS, Row, markdown

matplotlib.use("Agg")
# noqa: E402

DOCS = Path(__file__).parents[1] / "docs"
OURS, OTHERS, FLOOR = "#1f6feb", "#b8bec8", "#e3b341"


@frozen
class Picture:
    """One panel for each value of `panel`, one bar for each row in it."""

    panel: tuple[str, ...]
    bar: tuple[str, ...]
    length: str
    unit: str
    only: dict = field(factory=dict)
    without: str | None = None  # the panel that is left to the table


PICTURES = {
    "augment": Picture(("pixels",), ("who",), "views/s", "views per second on one core", only={"cores": "1"}),
    "step": Picture(("network",), ("method", "who"), "images/s", "images per second"),
    "optimizer": Picture(("what",), ("who",), "ms", "milliseconds, CPU"),
    "probe": Picture(("what", "images", "width"), ("who",), "s", "seconds"),
    "loader": Picture(("workers",), ("contestant",), "images/s", "images per second"),
    "loader_packed": Picture(("workers",), ("contestant",), "images/s", "images per second"),
    "video": Picture(("what",), ("who",), "clips/s", "clips per second", without="step"),
    "scaling": Picture(("what",), ("value",), "ms per step", "milliseconds per step"),
    "startup": Picture((), ("what",), "seconds", "seconds"),
}


def read(path: Path) -> tuple[str, list[Row]]:
    """(what the first line says of the machine, rows)"""
    with path.open(newline="") as file:
        return file.readline().removeprefix("# ").strip(), list(csv.DictReader(file))


def table_of(path: Path) -> str:
    about, rows = read(path)
    rows = [row for row in rows if not row.get("note", "").startswith("skipped")]  # no time was left for them
    return f"{markdown([{key: number(value) for key, value in row.items()} for row in rows])}\n\n{about}"


def number(text: str) -> float | str:
    try:
        return float(text) if not re.fullmatch(r"-?\d+", text) else int(text)
    except ValueError:
        return text


def insert(text: str, name: str, table: str) -> str:
    pattern = rf"<!-- {name} -->.*?<!-- end -->"
    return re.sub(pattern, lambda _: f"<!-- {name} -->\n{table}\n<!-- end -->", text, flags=re.DOTALL)


def draw(name: str, rows: list[Row], picture: Picture) -> None:
    rows = [row for row in rows if all(row[key] == value for key, value in picture.only.items())]
    rows = [
        row
        for row in rows
        if isinstance(number(row[picture.length]), int | float) and row.get("what") not in ("-", picture.without or "-")
    ]
    panels: dict[str, list[Row]] = {}
    for row in rows:
        title = (row[key] if key in ("what", "network") else f"{row[key]} {key}" for key in picture.panel)
        panels.setdefault(", ".join(title), []).append(row)
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    height = 0.9 + 0.24 * max(map(len, panels.values()))
    figure, axes = plt.subplots(lines, columns, figsize=(12, height * lines), squeeze=False, layout="constrained")
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    for axis, (title, content) in zip(axes.flat, panels.items(), strict=False):
        labels = [", ".join(row[key] for key in picture.bar) for row in content]
        values = [float(row[picture.length]) for row in content]
        colors = [OURS if "ours" in label or name in ("scaling", "startup") else OTHERS for label in labels]
        colors = [FLOOR if "floor" in label else color for label, color in zip(labels, colors, strict=True)]
        bars = axis.barh(range(len(values)), values, color=colors)
        axis.bar_label(bars, [f"{value:,.3g}" if value < 1000 else f"{value:,.0f}" for value in values], padding=3)
        axis.set_yticks(range(len(values)), labels)
        axis.invert_yaxis()
        axis.set_title(title, loc="left", fontsize=10)
        axis.set_xlabel(picture.unit, fontsize=9)
        axis.margins(x=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(DOCS / "performance" / f"{name}.png", dpi=110)
    plt.close(figure)


def main() -> None:
    page = DOCS / "performance.md"
    (DOCS / "performance").mkdir(exist_ok=True)
    text = page.read_text()
    for path in sorted(RESULTS.glob("*.csv")):
        text = insert(text, path.stem, table_of(path))
        if path.stem in PICTURES:
            draw(path.stem, read(path)[1], PICTURES[path.stem])
    page.write_text(text)


if __name__ == "__main__":
    main()
