"""One self-contained HTML page about one run or several: what was set, what came out, every curve, and pictures.

    self-supervised report runs/byol_cifar10
    self-supervised report runs/byol_cifar10 runs/simclr_cifar10 --out both.html

The page asks the network for nothing. What a run has not left, or what is not on this machine, is left out, with the
reason. docs/report.md says what is to be seen.
"""

import html
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from self_supervised.embeddings.map_page import in_script
from self_supervised.program import one_line_errors
from self_supervised.report import compare, figures, pictures, tables
from self_supervised.runs.command_line import in_one_line, parser_of
from self_supervised.safe_files import atomic_write, check_file

MOST_RUNS = 8  # more colors cannot be told apart
IMAGES = 2000


def write_report(
    runs: Sequence[str | Path], out: str | Path | None = None, images: int = IMAGES, encoder: nn.Module | None = None
) -> Path:
    """The report on the folders of runs, as one HTML file.

    Args:
        out: the file; None: report.html, in the run's folder if it is one run, else here.
        images: at most so many test images are embedded, for map and neighbors, over all runs; 0: none.
        encoder: your own module, if the encoder of these runs was one.

    Raises:
        ValueError: a folder is none of a run; there are too many.
    """
    folders = [Path(run).expanduser() for run in runs]
    if not 1 <= len(folders) <= MOST_RUNS:
        raise ValueError(f"{len(folders)} runs: a report shows 1 to {MOST_RUNS}, more colors cannot be told apart")
    if images < 0:
        raise ValueError(f"images={images} must be at least 0")
    out = Path(out or (folders[0] / "report.html" if len(folders) == 1 else "report.html")).expanduser()
    check_file("out", out)
    found = content(folders, images, encoder)
    template = Path(__file__).with_name("report.html")
    page = template.read_text(encoding="utf-8")
    for mark, text in (
        ("__TITLE__", html.escape(in_one_line(found["title"]))),
        ("/*__STYLE__*/", template.with_suffix(".css").read_text(encoding="utf-8")),
        ("/*__SCRIPT__*/", template.with_suffix(".js").read_text(encoding="utf-8")),
        ("__DATA__", in_script(found)),  # last: it may hold any text
    ):
        page = page.replace(mark, text)
    atomic_write(out, page)
    return out


def content(folders: list[Path], images: int, encoder: nn.Module | None) -> dict[str, Any]:
    """Everything that the page shows."""
    runs, names = [compare.read_run(folder) for folder in folders], tables.names_of_runs(folders)
    about = [tables.facts_of_run(run, name) for run, name in zip(runs, names, strict=True)]
    for one, run in zip(about, runs, strict=True):
        one["steps_per_epoch"] = figures.steps_per_epoch(run.folder)
        each, budget = images // len(runs), pictures.MAP_BUDGET // len(runs)
        one |= dict(pictures.picture_parts(run.folder, run.settings, each, budget, encoder))
    silent = [{"m"} if run.settings.get("use_lagging_model") is False else set() for run in runs]
    return {
        "title": f"{', '.join(names)}: report",
        "written": time.strftime("%Y-%m-%d %H:%M"),
        "runs": about,
        "settings": tables.setting_rows(runs),
        "results": tables.result_rows(runs),
        "caution": compare.caution(runs),
        "figures": figures.figures_of_runs(folders, silent),
    }


@one_line_errors()
def main(arguments: Sequence[str] | None = None) -> None:
    parser = parser_of("report", __doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run")
    parser.add_argument(
        "--out", metavar="FILE.html", help="default: report.html in RUN's folder; of several runs, here"
    )
    parser.add_argument(
        "--images", type=int, default=IMAGES, metavar="N", help=f"test images to embed, at most; 0: none ({IMAGES})"
    )
    print(write_report(**vars(parser.parse_args(arguments))))
