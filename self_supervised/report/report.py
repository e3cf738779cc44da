"""Write a self-contained HTML page on one or more runs: settings, results, curves and pictures.

    self-supervised report runs/byol_cifar10
    self-supervised report runs/byol_cifar10 runs/simclr_cifar10 --out both.html

The page makes no network requests. Parts whose files are missing are left out, with the reason. docs/report.md explains
each part.
"""

import html
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from self_supervised.embeddings.map_page import in_script
from self_supervised.fields import as_path
from self_supervised.program import in_one_line, one_line_errors
from self_supervised.report import compare, evaluations, figures, pictures, tables
from self_supervised.runs.command_line import parser_of
from self_supervised.safe_files import atomic_write, check_file

MOST_RUNS = 8  # more colors cannot be told apart
IMAGES = 2000  # default number of embedded test images


def write_report(
    runs: Sequence[str | Path], out: str | Path | None = None, images: int = IMAGES, encoder: nn.Module | None = None
) -> Path:
    """Write a report on runs as one HTML file, and return its path.

    Args:
        runs: directories of runs.
        out: the file; None: report.html, in the run's directory if there is one run, else in the current directory.
        images: most test images to embed for map and neighbors, in total over all runs; 0: none.
        encoder: your own module, if the encoder of these runs was one.

    Raises:
        ValueError: a directory is not that of a run, or there are too many runs.
    """
    folders = [as_path(run) for run in runs]
    if not 1 <= len(folders) <= MOST_RUNS:
        raise ValueError(f"{len(folders)} runs: a report shows 1 to {MOST_RUNS} runs. Write multiple reports.")
    if images < 0:
        raise ValueError(f"images={images} must be at least 0")
    out = as_path(out or (folders[0] / "report.html" if len(folders) == 1 else "report.html"))
    check_file("out", out, ".html")
    data = content(folders, images, encoder)
    template = Path(__file__).with_name("report.html")
    page = template.read_text(encoding="utf-8")
    for mark, text in (
        ("__TITLE__", html.escape(in_one_line(data["title"]))),
        ("/*__STYLE__*/", template.with_suffix(".css").read_text(encoding="utf-8")),
        ("/*__SCRIPT__*/", template.with_suffix(".js").read_text(encoding="utf-8")),
        ("__DATA__", in_script(data)),  # last, because the data may contain any text
    ):
        page = page.replace(mark, text)
    atomic_write(out, page)
    return out


def content(folders: list[Path], images: int, encoder: nn.Module | None) -> dict[str, Any]:
    """Return the data of the page."""
    runs = [compare.read_run(folder) for folder in folders]
    names = evaluations.names_of_runs(folders)
    about = [tables.facts_of_run(run, name) for run, name in zip(runs, names, strict=True)]
    images_per_run = images // len(runs)
    budget = pictures.MAP_BUDGET // len(runs)
    for facts, run in zip(about, runs, strict=True):
        facts["steps_per_epoch"] = figures.steps_per_epoch(run.folder)
        facts |= dict(pictures.picture_parts(run.folder, run.settings, images_per_run, budget, encoder))
    silent = [{"m"} if run.settings.get("use_lagging_model") is False else set() for run in runs]
    drawn = figures.figures_of_runs(folders, silent)
    return {
        "title": f"{', '.join(names)}: report",
        "written": time.strftime("%Y-%m-%d %H:%M"),
        "runs": about,
        "settings": tables.setting_rows(runs),
        "effective": tables.effective_rows(runs),
        "results": tables.result_rows(runs),
        "caution": tables.notes_on_results(runs),
        "verdicts": tables.verdicts(runs, names),
        "figures": drawn,
        "absent": figures.missing_figures(drawn, names),
    }


@one_line_errors()
def main(arguments: Sequence[str] | None = None) -> None:
    parser = parser_of("report", __doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="directory of a run")
    parser.add_argument(
        "--out",
        metavar="FILE.html",
        help="page to write; default: report.html in RUN; with multiple runs, in the current directory",
    )
    parser.add_argument(
        "--images",
        type=int,
        default=IMAGES,
        metavar="N",
        help=f"maximum number of test images to embed; 0 leaves out neighbors and map (default: {IMAGES})",
    )
    print(write_report(**vars(parser.parse_args(arguments))))
