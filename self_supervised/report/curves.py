"""Curves of runs side by side, from the metrics.csv of each: one color a run, one panel a figure.

    self-supervised curves runs/byol_cifar10 lower_lr=runs/byol_low --out curves.png
    self-supervised curves runs/simclr --out curves.png --panels step_train_loss step_pos_cos,step_neg_cos

What healthy and collapsed curves look like: docs/troubleshooting.md.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from self_supervised.fields import as_path
from self_supervised.program import one_line_errors
from self_supervised.report import figures
from self_supervised.runs.command_line import label, parser_of
from self_supervised.safe_files import atomic_file, check_file
from self_supervised.training.monitor import COLLAPSED_STD

matplotlib.use("Agg")
# noqa: E402  (the backend must be chosen first)

PANELS = ("step_train_loss", "step_pos_cos,step_neg_cos", "step_projection_std", "valid_class_acc")
MEANINGS = {  # of names in the titles
    "step_train_loss": "loss",
    "step_pos_cos,step_neg_cos": "cosine: same image —, others - -",
    "step_pos_cos": "cosine of two views of one image",
    "step_neg_cos": "cosine of views of different images",
    "step_projection_std": "step_projection_std",
    "valid_class_acc": "linear probe (%)",
}
COLORS = ("#1f6feb", "#d1242f", "#1a7f37", "#9a6700", "#8250df", "#57606a")  # on white; other pages see a white card
STYLES = ("-", "--", ":", "-.")
Curve = tuple[np.ndarray, np.ndarray]  # steps, values
Curves = dict[str, Curve]  # of one run, by the figure's name


def read_curves(folder: str | Path) -> Curves:
    """The figures of a run's pretraining.

    Raises:
        ValueError: the folder holds no metrics.csv.
    """
    folder = as_path(folder)
    paths = [folder / "pretraining" / "metrics.csv", folder / "metrics.csv"]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        raise ValueError(f"{folder} is no run: there is neither {paths[0]} nor {paths[1]}")
    return figures.read_metrics(path)


def draw_curves(
    runs: dict[str, Curves | list[Curves]], path: str | Path, panels: Sequence[str] | None = None, **of_figure: Any
) -> None:
    """Draw a PNG of runs, {label: what `read_curves` returns, or a list of that for runs of one color, such as seeds}.

    A panel is a figure's name, or several joined by commas; None: those of PANELS that are logged. `of_figure` are
    options of plt.subplots, such as figsize and sharey.

    Raises:
        ValueError: a figure is in none of the runs, or the path is no PNG.
    """
    if Path(path).suffix != ".png":
        raise ValueError(f"the curves are a PNG, and {path} does not end in .png")
    check_file("out", path)
    groups = {label: found if isinstance(found, list) else [found] for label, found in runs.items()}
    known = sorted({name for group in groups.values() for curves in group for name in curves})
    panels = panels or [panel for panel in PANELS if set(panel.split(",")) <= set(known)] or PANELS
    for name in {name for panel in panels for name in panel.split(",")} - set(known):
        raise ValueError(f"{name!r} is logged in none of the runs: choose of {', '.join(known)}")
    of_figure = {"figsize": (3.2 * len(panels), 3), "layout": "constrained", **of_figure}
    figure, axes = plt.subplots(1, len(panels), squeeze=False, **of_figure)
    for axis, panel in zip(axes[0], panels, strict=True):
        fill(axis, groups, panel)
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=len(runs), frameon=False)
    with atomic_file(as_path(path)) as unfinished:
        figure.savefig(unfinished, format="png", dpi=90, facecolor="white")
    plt.close(figure)


def fill(axis: Axes, groups: dict[str, list[Curves]], panel: str) -> None:
    for i, (name_of_group, group) in enumerate(groups.items()):
        shown = label(name_of_group, 40)
        for j, name in enumerate(panel.split(",")):
            style = {"linestyle": STYLES[j % len(STYLES)], "marker": "." if name.startswith("valid") else None}
            for curves in group:
                axis.plot(*curves.get(name, ([], [])), color=COLORS[i % len(COLORS)], label=shown, **style)
                shown = None  # one entry of the legend
    if panel == "step_projection_std":
        axis.axhline(COLLAPSED_STD, color="black", linewidth=0.8, linestyle=":")  # where the warning comes
        axis.set_ylim(bottom=0)
    axis.set_title(label(MEANINGS.get(panel, panel)), fontsize=10)
    axis.set_xlabel("step")
    axis.grid(alpha=0.3)


def labeled_curves(runs: Sequence[str]) -> dict[str, Curves]:
    """LABEL=FOLDER, or FOLDER, whose name is the label."""
    found = {}
    for run in runs:
        label, _, folder = run.rpartition("=") if not Path(run).is_dir() else ("", "", run)
        found[label or Path(folder).resolve().name] = read_curves(folder)
    if len(found) < len(runs):
        raise ValueError(f"of {', '.join(runs)} some have the same name: give them others, as LABEL=FOLDER")
    return found


@one_line_errors()
def main(arguments: Sequence[str] | None = None) -> None:
    parser = parser_of("curves", __doc__)
    parser.add_argument("runs", nargs="+", metavar="[LABEL=]RUN", help="folder of a run")
    parser.add_argument("--out", required=True, metavar="FILE.png")
    parser.add_argument("--panels", nargs="+", metavar="NAME[,NAME]", help="figures of metrics.csv")
    args = parser.parse_args(arguments)
    draw_curves(labeled_curves(args.runs), args.out, args.panels)
    print(args.out)
