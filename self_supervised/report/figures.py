"""Figures of a report: their columns, a description of a healthy curve, and their points from CSV files."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import attrs
import numpy as np
from attrs import frozen

from self_supervised.safe_files import rows_of
from self_supervised.training import run_folder
from self_supervised.training.monitor import COLLAPSED_STD

MOST_POINTS = 2000  # per line
PRETRAINING = "pretraining/metrics.csv"
LINEAR = "linear/metrics.csv"
NO_FIGURE = re.compile("epoch|step_train_acc5|lr|test_.*")  # columns without a figure, unless FIGURES has them
EXPECTED = (
    "Loss",
    "Spread of the projections",
    "Linear probe (%)",
)  # titles of figures that every run should have
ONLY_IF_IT_VARIES = ("T",)  # columns without a figure if they are constant
Lines = dict[str, tuple[np.ndarray, np.ndarray]]  # name -> steps, values


@frozen
class Figure:
    """Columns of one file that share an axis."""

    title: str
    lines: dict[str, str]  # column -> label
    healthy: str  # description of a healthy curve
    file: str = PRETRAINING
    is_schedule: bool = False  # exact values, never smoothed
    from_zero: bool = False  # the axis starts at 0, because only large changes matter


def term(word: str, name: str, healthy: str) -> Figure:
    return Figure(f"Loss: {word}", {name: word}, healthy)


FIGURES = (
    Figure(
        "Loss",
        {"step_train_loss": "loss"},
        "Falls fast, then slowly. Losses of different methods cannot be compared. A low loss alone proves nothing: a "
        "collapse lowers it, too.",
    ),
    term("invariance", "loss_invariance", "The distance between two views of an image. Falls."),
    term("variance", "loss_variance", "Falls toward 0, where every dimension varies enough. Stays high: a collapse."),
    term("covariance", "loss_covariance", "May rise at first, as the variance grows; then falls."),
    term("redundancy", "loss_redundancy", "Correlation between dimensions. Falls."),
    Figure(
        "Cosine of two views",
        {"step_pos_cos": "same image", "step_neg_cos": "different images"},
        "High for the same image, well below that for different images. Both near 1: a collapse.",
    ),
    Figure(
        "Spread of the projections",
        {"step_projection_std": "spread"},
        f"1: spread evenly over the sphere, 0: a single point. Below {COLLAPSED_STD:g}, the run warns of a collapse.",
    ),
    Figure(
        "Right key found (%)",
        {"step_train_acc1": "nearest", "step_train_acc5": "among the five nearest"},
        "Rises. Near 100 % at once: the task is too easy (augmentations, negatives).",
    ),
    Figure(
        "Linear probe (%)",
        {
            "valid_class_acc": "scored images",
            "train_class_acc": "fitted images",
            "valid_class_acc_trainset": "scored images, fitted on the training set",
            "train_class_acc_trainset": "fitted images of the training set",
        },
        "Rises, and ends above that of the start (see Results). Fitted on half of the validation set and scored on "
        "the other half: a monitor, not a result.",
    ),
    Figure(
        "k nearest neighbors (%)",
        {
            "valid_knn20_acc": "k = 20",
            "valid_knn200_acc": "k = 200",
            "valid_knn20_acc_trainset": "k = 20, of the training set",
            "valid_knn200_acc_trainset": "k = 200, of the training set",
        },
        "Rises, and ends above that of the start (see Results).",
    ),
    Figure(
        "RankMe",
        {"valid_rank_me": "effective rank"},
        "The number of directions in which embeddings vary. Rises or stays; a fall toward 1 is a collapse.",
    ),
    Figure(
        "Spread of the embeddings",
        {"valid_embedding_std": "spread"},
        "1: spread evenly over the sphere, 0: a single point. Stays well above 0.",
    ),
    Figure("Online classifier: loss", {"online_train_loss": "loss"}, "Falls. Its gradient stops at the embeddings."),
    Figure(
        "Online classifier (%)",
        {"online_train_acc1": "training", "valid_online_acc1": "test", "valid_online_acc5": "test, first five"},
        "Rises with the embeddings.",
    ),
    Figure(
        "Learning rate",
        {"lr": "highest of all parameter groups except the online classifier's"},
        "The values that were used: the warm-up, then the schedule.",
        is_schedule=True,
    ),
    Figure(
        "Momentum of the lagging model",
        {"m": "m"},
        "The fraction of its own weights that the lagging model keeps at each step. With a schedule, it ends at 1.",
        is_schedule=True,
    ),
    Figure("Temperature", {"T": "T"}, "Low values give the hardest negatives the most weight.", is_schedule=True),
    Figure("SCE: weight of the contrastive term", {"sce_coefficient": "weight"}, "As scheduled.", is_schedule=True),
    Figure("SCE: temperature of the target", {"sce_target_T": "T"}, "Below T, as scheduled.", is_schedule=True),
    Figure(
        "Images per second",
        {"images_per_second": "training"},
        "Constant. A slow start is compilation or reading files for the first time. A fall means that something else "
        "uses the machine.",
        "pretraining/throughput.csv",
        from_zero=True,
    ),
    Figure(
        "Linear classifier: loss",
        {"step_train_loss": "training", "valid_loss": "test"},
        "Falls, with a step where the learning rate drops.",
        LINEAR,
    ),
    Figure(
        "Linear classifier (%)",
        {"valid_acc1": "test, first", "valid_acc5": "test, first five", "step_train_acc1": "training batches"},
        "Rises, and levels off after the last drop of the learning rate.",
        LINEAR,
    ),
)


def read_metrics(file: Path) -> Lines:
    """Return every column of a metrics.csv or throughput.csv. If a step has multiple rows, the last one counts."""
    columns: dict[str, dict[int, float]] = {}
    for row in rows_of(file)[1]:
        for name, value in row.items():
            if value and name != "step":
                columns.setdefault(name, {})[int(row["step"])] = float(value)
    return {name: points(values) for name, values in columns.items()}


def points(values: dict[int, float]) -> tuple[np.ndarray, np.ndarray]:
    """Return steps and values, sorted by step, without values that are not finite, which cannot be drawn."""
    steps = np.array(sorted(values))
    numbers = np.array([values[step] for step in steps.tolist()])
    return steps[np.isfinite(numbers)], numbers[np.isfinite(numbers)]


def thinned(steps: np.ndarray, values: np.ndarray, most: int = MOST_POINTS) -> tuple[np.ndarray, np.ndarray]:
    """Return at most `most` points: the lowest and the highest of each interval, so that no peak is lost."""
    if len(steps) <= most:
        return steps, values
    kept = set()
    for interval in np.array_split(np.arange(len(steps)), most // 2):
        kept |= {int(interval[values[interval].argmin()]), int(interval[values[interval].argmax()])}
    rows = sorted(kept)
    return steps[rows], values[rows]


def figures_of_runs(folders: list[Path], without: list[set[str]]) -> list[dict[str, Any]]:
    """Return the figures for which at least one run has points, each with its lines in the order of the runs.

    Args:
        without: for each run, columns that have no meaning in it.
    """
    tables: dict[str, list[Lines]] = {}
    for file in dict.fromkeys(figure.file for figure in FIGURES):
        tables[file] = [read_metrics(run_folder.file_of(folder, file)) for folder in folders]
    made = []
    for figure in (*FIGURES, *others(tables)):
        lines = [
            {"run": i, "name": name, "label": label, **as_lists(*thinned(*table[name]))}
            for i, table in enumerate(tables[figure.file])
            for name, label in figure.lines.items()
            if name in table and name not in without[i] and len(table[name][0])
        ]
        if lines and not (set(figure.lines) <= set(ONLY_IF_IT_VARIES) and not varies(lines)):
            shown = attrs.asdict(figure, filter=lambda attribute, _: attribute.name != "lines")
            made.append({**shown, "lines": lines})
    return made


def missing_figures(figures: list[dict[str, Any]], names: Sequence[str]) -> list[str]:
    """Return a line for each run that lacks some of the `figures`, or of EXPECTED.

    Args:
        names: of the runs.
    """
    drawn = {figure["title"]: {line["run"] for line in figure["lines"]} for figure in figures}
    drawn = {**{title: set() for title in EXPECTED}, **drawn}
    lacking = [[title for title, runs in drawn.items() if i not in runs] for i in range(len(names))]
    return [f"{name} has logged nothing for: {', '.join(of)}" for name, of in zip(names, lacking, strict=True) if of]


def others(tables: dict[str, list[Lines]]) -> list[Figure]:
    """Return a figure for each column that is not in FIGURES; all gradient norms share one."""
    shown = {(figure.file, name) for figure in FIGURES for name in figure.lines}
    figures = []
    for file, of_runs in tables.items():
        names = list(dict.fromkeys(name for table in of_runs for name in table))
        left = [name for name in names if (file, name) not in shown and not NO_FIGURE.fullmatch(name)]
        norms = {name: name.removeprefix("grad_norm_") for name in left if name.startswith("grad_norm_")}
        if norms:
            figures.append(Figure("Norms of the gradients", norms, "Without jumps, and no part stays at 0.", file))
        stage = "Linear classifier: " if file == LINEAR else ""
        figures += [Figure(f"{stage}{name}", {name: name}, "", file) for name in left if name not in norms]
    return figures


def varies(lines: list[dict[str, Any]]) -> bool:
    return len({value for line in lines for value in line["y"]}) > 1


def as_lists(steps: np.ndarray, values: np.ndarray) -> dict[str, list]:
    return {"x": steps.tolist(), "y": [float(f"{value:.6g}") for value in values]}


def steps_per_epoch(folder: Path) -> dict[str, float | None]:
    """Return stage -> optimizer steps per epoch; None if neither throughput.csv nor run.json has them."""
    planned = next(reversed(run_folder.starts_of(folder)), {}).get("steps per epoch")
    by_stage: dict[str, float | None] = {"pretraining": planned, "linear": None}
    for stage in by_stage:
        steps, epochs = read_metrics(run_folder.file_of(folder, f"{stage}/throughput.csv")).get("epoch", ([], []))
        if len(steps):  # the last epoch may be shorter: max_time ended it
            by_stage[stage] = float(np.max(steps / (epochs + 1 - run_folder.first_epoch(folder))))
    return by_stage
