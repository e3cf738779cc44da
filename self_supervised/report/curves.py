"""Plot the curves of runs from their metrics.csv: one color per run, one panel per metric.

    self-supervised curves runs/byol_cifar10 lower_lr=runs/byol_low --out curves.png
    self-supervised curves runs/simclr --out curves.png --panels step_train_loss step_pos_cos,step_neg_cos

docs/troubleshooting.md shows healthy and collapsed curves.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from self_supervised.fields import as_path
from self_supervised.program import label, one_line_errors
from self_supervised.report import figures
from self_supervised.runs.command_line import parser_of
from self_supervised.safe_files import atomic_file, check_file
from self_supervised.training import run_folder
from self_supervised.training.monitor import COLLAPSED_STD

matplotlib.use("Agg")

PANELS = ("step_train_loss", "step_pos_cos,step_neg_cos", "step_projection_std", "valid_class_acc")
MEANINGS = {  # panel -> its title
    "step_train_loss": "loss",
    "step_pos_cos,step_neg_cos": "cosine: same image —, others - -",
    "step_pos_cos": "cosine of two views of one image",
    "step_neg_cos": "cosine of views of different images",
    "step_projection_std": "step_projection_std",
    "valid_class_acc": "linear probe (%)",
}
COLORS = ("#1f6feb", "#d1242f", "#1a7f37", "#9a6700", "#8250df", "#57606a", "#bf3989", "#1b7c83")  # on white
STYLES = {"-": "—", "--": "- -", ":": "···", "-.": "- · -"}  # of the metrics in a panel, as drawn and in its title
Curve = tuple[np.ndarray, np.ndarray]  # steps, values
Curves = dict[str, Curve]  # metric -> its curve in one run


def read_curves(folder: str | Path) -> Curves:
    """Load the metrics of a run's pretraining.

    Raises:
        ValueError: the directory has no metrics.csv.
    """
    folder = as_path(folder)
    path = run_folder.file_of(folder, figures.PRETRAINING)
    if not path.is_file():
        if run_folder.settings_of_run(folder):
            raise ValueError(f"{path} does not exist: the run has logged nothing. Lower its log_every_n_steps.")
        raise ValueError(f"{folder} is not a run: {path} does not exist. {run_folder.advice_without_run(folder)}")
    return figures.read_metrics(path)


def draw_curves(
    runs: dict[str, Curves | list[Curves]], path: str | Path, panels: Sequence[str] | None = None, **subplots: Any
) -> None:
    """Draw the curves of runs as a PNG.

    Args:
        runs: label -> what `read_curves` returns, or a list of that for runs that share a color, such as seeds.
        panels: each is the name of a metric, or several joined by commas; None: those of PANELS that are logged.
        subplots: options of plt.subplots, such as figsize and sharey.

    Raises:
        ValueError: a metric is in none of the runs, there are more runs than COLORS or more metrics in a panel than
            STYLES, or the path does not end in .png.
    """
    check_file("out", path, ".png")
    groups = {label: curves if isinstance(curves, list) else [curves] for label, curves in runs.items()}
    known = sorted({name for group in groups.values() for curves in group for name in curves})
    if not known:
        raise ValueError(f"runs {', '.join(groups)}: they have logged nothing yet. Lower log_every_n_steps.")
    panels = panels or [panel for panel in PANELS if set(panel.split(",")) <= set(known)] or PANELS
    for name in {name for panel in panels for name in panel.split(",")} - set(known):
        raise ValueError(f"panels: {name!r} is not logged in any of the runs. Choose one of {', '.join(known)}.")
    if crowded := [panel for panel in panels if panel.count(",") >= len(STYLES)]:
        raise ValueError(f"panels: {crowded[0]!r} has more than {len(STYLES)} metrics. Draw several panels.")
    if len(groups) > len(COLORS):
        raise ValueError(f"{len(groups)} runs: {len(COLORS)} colors can be told apart. Draw several pictures.")
    subplots = {"figsize": (3.2 * len(panels), 3), "layout": "constrained", **subplots}
    figure, axes = plt.subplots(1, len(panels), squeeze=False, **subplots)
    for axis, panel in zip(axes[0], panels, strict=True):
        draw_panel(axis, groups, panel)
    figure.legend(
        *axes[0][0].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=min(len(runs), 2 * len(panels)),
        frameon=False,
    )
    with atomic_file(as_path(path)) as unfinished:
        figure.savefig(unfinished, format="png", dpi=90, facecolor="white")
    plt.close(figure)


def draw_panel(axis: Axes, groups: dict[str, list[Curves]], panel: str) -> None:
    for i, (name_of_group, group) in enumerate(groups.items()):
        shown = label(name_of_group, 40)
        for line, name in zip(STYLES, panel.split(","), strict=False):
            style = {"linestyle": line, "marker": "." if name.startswith("valid") else None}
            for curves in group:
                axis.plot(*curves.get(name, ([], [])), color=COLORS[i], label=shown, **style)
                shown = None  # only one entry in the legend
    if panel == "step_projection_std":
        axis.axhline(COLLAPSED_STD, color="black", linewidth=0.8, linestyle=":")  # below, a warning appears
        axis.set_ylim(bottom=0)
    axis.set_title(MEANINGS.get(panel) or title_of_panel(panel.split(",")), fontsize=10)
    axis.set_xlabel("step")
    axis.grid(alpha=0.3)


def title_of_panel(names: list[str]) -> str:
    """Return the names of the metrics in a panel, one below the other, with their lines if they are several."""
    lines = STYLES.values() if len(names) > 1 else ("",)
    return "\n".join(label(f"{name} {line}".strip()) for name, line in zip(names, lines, strict=False))


def not_logged(runs: dict[str, Curves], panels: Sequence[str] | None) -> list[str]:
    """Return a line for each run that has not logged all metrics of the panels (None: PANELS)."""
    names = [name for panel in panels or PANELS for name in panel.split(",")]
    lacking = {run: [name for name in names if name not in curves] for run, curves in runs.items()}
    return [f"{run} has not logged {', '.join(of)}" for run, of in lacking.items() if of]


def labeled_curves(runs: Sequence[str]) -> dict[str, Curves]:
    """Return label -> curves for runs passed as LABEL=DIR, or as DIR, whose name is then the label."""
    curves = {}
    for run in runs:
        cuts = [(run[:i], run[i + 1 :]) for i, sign in enumerate(run) if sign == "="]
        fallback = cuts[0] if cuts else ("", run)
        label, folder = next((cut for cut in [("", run), *cuts] if as_path(cut[1]).is_dir()), fallback)
        curves[label or as_path(folder).resolve().name] = read_curves(folder)
    if len(curves) < len(runs):
        raise ValueError(f"runs {', '.join(runs)}: two have the same name. Pass LABEL=DIR to name them.")
    return curves


@one_line_errors()
def main(arguments: Sequence[str] | None = None) -> None:
    parser = parser_of("curves", __doc__)
    parser.add_argument("runs", nargs="+", metavar="[LABEL=]RUN", help="directory of a run, with a name for the legend")
    parser.add_argument("--out", required=True, metavar="FILE.png", help="picture to write")
    parser.add_argument(
        "--panels",
        nargs="+",
        metavar="NAME[,NAME]",
        help="columns of metrics.csv, each in a panel; a comma puts two into one; default: loss, cosines, standard "
        "deviation and accuracy, where logged",
    )
    args = parser.parse_args(arguments)
    runs = labeled_curves(args.runs)
    draw_curves(runs, args.out, args.panels)
    for line in not_logged(runs, args.panels):
        print(line)
    print(args.out)
