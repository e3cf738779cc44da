"""The curves of a report: which figures there are, what they show when all is well, and their points from CSV files."""

import re
from pathlib import Path
from typing import Any

import attrs
import numpy as np
from attrs import frozen

from self_supervised.safe_files import rows_of
from self_supervised.training.monitor import COLLAPSED_STD

MOST_POINTS = 2000  # of a line
PRETRAINING, LINEAR = "pretraining/metrics.csv", "linear/metrics.csv"
Lines = dict[str, tuple[np.ndarray, np.ndarray]]  # name -> steps, values


@frozen
class Figure:
    """Columns of one file that share an axis."""

    title: str
    lines: dict[str, str]  # column -> what it is, in words
    healthy: str  # what it looks like when all is well
    file: str = PRETRAINING
    is_schedule: bool = False  # exact: never smoothed
    from_zero: bool = False  # where only large changes matter


def term(word: str, name: str, healthy: str) -> Figure:
    return Figure(f"Loss: {word}", {name: word}, healthy)


FIGURES = (
    Figure(
        "Loss",
        {"step_train_loss": "loss"},
        "Falls fast, then slowly. Losses of different methods cannot be compared, and a low one alone proves nothing: "
        "a collapse lowers it, too.",
    ),
    term("invariance", "loss_invariance", "How far two views of an image are apart. Falls."),
    term("variance", "loss_variance", "Falls towards 0, where every dimension varies enough. Stuck high: a collapse."),
    term("covariance", "loss_covariance", "May rise at first, as the variance grows; then falls."),
    term("redundancy", "loss_redundancy", "Correlation between dimensions. Falls."),
    Figure(
        "Cosine of two views",
        {"step_pos_cos": "same image", "step_neg_cos": "different images"},
        "The same image high, different images well below it. Both near 1: a collapse.",
    ),
    Figure(
        "Spread of the projections",
        {"step_projection_std": "spread"},
        f"1: evenly over the sphere, 0: a single point. Below {COLLAPSED_STD:g} the run warns of a collapse.",
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
        "Rises, and ends above the random encoder's (see Results). Fitted on half of the validation set, scored on the "
        "other: a monitor.",
    ),
    Figure(
        "k nearest neighbors (%)",
        {
            "valid_knn20_acc": "k = 20",
            "valid_knn200_acc": "k = 200",
            "valid_knn20_acc_trainset": "k = 20, of the training set",
            "valid_knn200_acc_trainset": "k = 200, of the training set",
        },
        "Rises, and ends above the random encoder's (see Results).",
    ),
    Figure(
        "RankMe",
        {"valid_rank_me": "effective rank"},
        "In how many directions embeddings vary. Rises or stays; a fall towards 1 is a collapse.",
    ),
    Figure(
        "Spread of the embeddings",
        {"valid_embedding_std": "spread"},
        "1: evenly over the sphere, 0: a single point. Stays well above 0.",
    ),
    Figure("Online classifier: loss", {"online_train_loss": "loss"}, "Falls. Its gradient ends at the embeddings."),
    Figure(
        "Online classifier (%)",
        {"online_train_acc1": "training", "valid_online_acc1": "test", "valid_online_acc5": "test, first five"},
        "Rises with the embeddings.",
    ),
    Figure(
        "Learning rate",
        {"lr": "highest of all groups but the online classifier's"},
        "As it was taken: the warm-up, then the schedule.",
        is_schedule=True,
    ),
    Figure(
        "Momentum of the lagging model",
        {"m": "m"},
        "The share of itself that the slow copy keeps at each step. With a schedule it ends at 1.",
        is_schedule=True,
    ),
    Figure("Temperature", {"T": "T"}, "Low ones weigh the hardest negatives most.", is_schedule=True),
    Figure("SCE: share of the contrastive term", {"sce_coefficient": "coefficient"}, "As scheduled.", is_schedule=True),
    Figure("SCE: temperature of the target", {"sce_target_T": "T"}, "Below T, as scheduled.", is_schedule=True),
    Figure(
        "Images per second",
        {"images_per_second": "training"},
        "Level. A slow start is compilation or cold files; a fall says that something else uses the machine.",
        "pretraining/throughput.csv",
        from_zero=True,
    ),
    Figure(
        "Linear classifier: loss",
        {"step_train_loss": "training", "valid_loss": "test"},
        "Falls, in a step where the learning rate drops.",
        LINEAR,
    ),
    Figure(
        "Linear classifier (%)",
        {"valid_acc1": "test, first", "valid_acc5": "test, first five", "step_train_acc1": "training batches"},
        "Rises, and levels off after the last drop of the learning rate.",
        LINEAR,
    ),
)
NO_FIGURE = re.compile("epoch|step_train_acc5|lr|test_.*")  # columns that need none where the table has none
ONLY_IF_IT_VARIES = ("T",)


def read_metrics(file: Path) -> Lines:
    """Every column of a metrics.csv or throughput.csv; of several rows of one step the last."""
    found: dict[str, dict[int, float]] = {}
    for row in rows_of(file)[1]:
        for name, value in row.items():
            if value and name != "step":
                found.setdefault(name, {})[int(row["step"])] = float(value)
    return {name: points(values) for name, values in found.items()}


def points(values: dict[int, float]) -> tuple[np.ndarray, np.ndarray]:
    """By step; what is not finite cannot be drawn."""
    steps = np.array(sorted(values))
    numbers = np.array([values[step] for step in steps.tolist()])
    return steps[np.isfinite(numbers)], numbers[np.isfinite(numbers)]


def thinned(steps: np.ndarray, values: np.ndarray, most: int = MOST_POINTS) -> tuple[np.ndarray, np.ndarray]:
    """At most so many of the points: the lowest and the highest of each stretch, so that no peak is lost."""
    if len(steps) <= most:
        return steps, values
    kept = set()
    for stretch in np.array_split(np.arange(len(steps)), most // 2):
        kept |= {int(stretch[values[stretch].argmin()]), int(stretch[values[stretch].argmax()])}
    rows = sorted(kept)
    return steps[rows], values[rows]


def figures_of_runs(folders: list[Path], without: list[set[str]]) -> list[dict[str, Any]]:
    """What the page draws: of every figure that some run has points for, its lines in the order of runs.

    Args:
        without: of each run, columns that say nothing in it.
    """
    tables: dict[str, list[Lines]] = {}
    for file in dict.fromkeys(figure.file for figure in FIGURES):
        tables[file] = [read_metrics(folder / file) for folder in folders]
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


def others(tables: dict[str, list[Lines]]) -> list[Figure]:
    """A figure for each column that the table above does not know; one for all norms of gradients."""
    shown = {(figure.file, name) for figure in FIGURES for name in figure.lines}
    found = []
    for file, of_runs in tables.items():
        names = list(dict.fromkeys(name for table in of_runs for name in table))
        left = [name for name in names if (file, name) not in shown and not NO_FIGURE.fullmatch(name)]
        norms = {name: name.removeprefix("grad_norm_") for name in left if name.startswith("grad_norm_")}
        if norms:
            found.append(Figure("Norms of the gradients", norms, "Without jumps; those of all parts alive.", file))
        stage = "Linear classifier: " * (file == LINEAR)
        found += [Figure(f"{stage}{name}", {name: name}, "", file) for name in left if name not in norms]
    return found


def varies(lines: list[dict[str, Any]]) -> bool:
    return len({value for line in lines for value in line["y"]}) > 1


def as_lists(steps: np.ndarray, values: np.ndarray) -> dict[str, list]:
    return {"x": steps.tolist(), "y": [float(f"{value:.6g}") for value in values]}


def steps_per_epoch(folder: Path) -> float | None:
    """None: the run does not say, for it has no throughput.csv."""
    epochs = read_metrics(folder / "pretraining/throughput.csv").get("epoch")
    return float(epochs[0][-1] / (epochs[1][-1] + 1)) if epochs and len(epochs[0]) else None
