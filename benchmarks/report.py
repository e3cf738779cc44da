"""Puts the tables of benchmarks/results/*.csv into the pages of docs/ that have a place for them, and draws pictures.

    python -m benchmarks.report

In the text, a table stands between `<!-- NAME -->` and `<!-- end -->`, where NAME is that of its CSV file.
"""

import re
import statistics
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
from attrs import field, frozen

from benchmarks import harness
from benchmarks.harness import RESULTS, Row, markdown

matplotlib.use("Agg")

DOCS = Path(__file__).parents[1] / "docs"
PAGES = ("performance.md", "results.md", "evidence.md", "evaluation.md", "distill.md")
OF_PRESETS = {"linear %": 1, "kNN-20 %": 1, "epochs": None, "minutes": 0, "images/s": 0, "precision": None}  # digits
CONTESTANT = ("who", "method", "recipe", "encoder", "lr", "pooling_size", "threads", "minutes")
OF_RACE = {"linear %": 1, "kNN-20 %": 1, "images seen": 0, "minutes in all": 1}
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


def table_of(path: Path) -> str:
    about, rows = harness.read(path)
    if path.stem.startswith("sweep"):
        rows = tries_of_presets(rows)
    elif {"preset", "lr"} <= rows[0].keys():
        run = ("preset", "lr", "settings") if any(row["settings"] for row in rows) else ("preset", "lr")
        rows = over_seeds(rows, run, OF_PRESETS)
    if path.stem.startswith("race"):
        rows = over_seeds(rows, CONTESTANT, OF_RACE)
    rows = [row for row in rows if not row.get("note", "").startswith("skipped")]  # no time was left for them
    return f"{markdown([{key: number(value) for key, value in row.items()} for row in rows])}\n\n{about}"


def over_seeds(rows: list[Row], run: Sequence[str], columns: dict[str, int | None]) -> list[Row]:
    """Return one row for each run with its settings: of the columns with digits, means over its seeds and their sample
    standard deviations; of the others, the distinct values."""
    return [
        {
            **{name: group[0][name] for name in run},
            **{name: mean_text(group, name, digits) for name, digits in columns.items()},
            "seeds": " ".join(row["seed"] for row in group),
            "commit": different(group, "commit"),
        }
        for group in grouped(rows, *run)
    ]


def tries_of_presets(rows: list[Row]) -> list[Row]:
    """Return one row for each preset and length of its tries: linear accuracies by learning rate, and the best rate."""
    summaries = []
    for group in grouped(rows, "preset", "fraction"):
        group = sorted(group, key=lambda row: float(row["lr"]))
        best = max(group, key=lambda row: -1 if row["linear %"] == "nan" else float(row["linear %"]))
        tries = ", ".join(f"{row['lr']}: {float(row['linear %']):.1f}" for row in group)
        facts = {"best lr": best["lr"], "its kNN-20 %": f"{float(best['kNN-20 %']):.1f}"}
        facts["precision"] = different(group, "precision")
        about = {name: group[0][name] for name in ("preset", "fraction", "steps")}
        summaries.append({**about, "lr: linear % of held-out images": tries, **facts})
    return summaries


def grouped(rows: list[Row], *names: str) -> list[list[Row]]:
    """Return the rows that have the same values of these columns together, in the order of their first ones."""
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in names), []).append(row)
    return list(groups.values())


def different(rows: list[Row], name: str) -> str:
    """Return the distinct values of a column, as one text."""
    return " ".join(sorted({row[name] for row in rows}))


def mean_text(rows: list[Row], name: str, digits: int | None) -> str:
    if digits is None:
        return different(rows, name)
    values = [float(row[name]) for row in rows if row[name]]
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if digits and len(values) > 1 else ""
    return f"{statistics.mean(values):,.{digits}f}{deviation}" if values else ""


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


def draw_curves(path: Path) -> None:
    """kNN accuracy over epochs, one line for each preset: the mean over its seeds."""
    lines: dict[str, dict[int, list[float]]] = {}
    for row in harness.read(path)[1]:
        lines.setdefault(row["preset"], {}).setdefault(int(row["epoch"]), []).append(float(row["kNN-20 %"]))
    figure, axis = plt.subplots(figsize=(8, 5), layout="constrained")
    for i, (preset, by_epoch) in enumerate(
        sorted(lines.items(), key=lambda item: -statistics.mean(item[1][max(item[1])]))
    ):
        values = [statistics.mean(by_epoch[epoch]) for epoch in sorted(by_epoch)]
        style = {"color": plt.get_cmap("tab10")(i % 10), "linestyle": ("-", "--", ":")[i // 10]}
        axis.plot(sorted(by_epoch), values, label=preset, **style)
    axis.set(xlabel="epoch (0: random encoder)", ylabel="kNN-20, half of the test images (%)")
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.3)
    axis.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))  # in the order of the last values
    (DOCS / "results").mkdir(exist_ok=True)
    figure.savefig(DOCS / "results" / f"{path.stem}.png", dpi=110)
    plt.close(figure)


def main() -> None:
    (DOCS / "performance").mkdir(exist_ok=True)
    pages = {name: (DOCS / name).read_text() for name in PAGES}
    for path in sorted(RESULTS.glob("*.csv")):
        if path.stem.endswith("_curves"):
            draw_curves(path)
            continue
        pages = {name: insert(text, path.stem, table_of(path)) for name, text in pages.items()}
        if path.stem in PICTURES:
            draw(path.stem, harness.read(path)[1], PICTURES[path.stem])
    for name, text in pages.items():
        (DOCS / name).write_text(text)


if __name__ == "__main__":
    main()
