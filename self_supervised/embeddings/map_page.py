"""A map as files: a picture with a legend, and a page with everything in it (its template is map.html)."""

import base64
import html
import io
import textwrap
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
from attrs import frozen
from PIL import Image

from self_supervised.embeddings.sources import ImageSource
from self_supervised.runs.command_line import bar, in_one_line, label
from self_supervised.safe_files import to_json

matplotlib.use("Agg")
# noqa: E402  (the backend must be chosen first)

NOTE = 400  # characters of the picture's second line
LEGEND = 30  # rows of the picture's legend
THUMBNAIL_SIDE = 64  # pixels; of the page's pictures at most
BUDGET = 12_000_000  # characters of all pictures of a page


@frozen
class Map:
    """Points of the plane and what they stand for."""

    title: str
    note: str
    paths: list[str]
    points: np.ndarray  # [N, 2]
    kind: np.ndarray  # [N], an index of names
    names: list[str]

    @property
    def colors(self) -> list[str]:
        """Of each name."""
        return palette(len(self.names))


def palette(n: int) -> list[str]:
    """n colors; from 21 on neighboring ones are hard to tell apart, whatever they are."""
    if n <= 20:
        table = matplotlib.colormaps["tab10" if n <= 10 else "tab20"]
        colors = [table(i) for i in range(n)]
    else:
        hues = np.arange(n) * 0.618034 % 1  # golden ratio: those of neighbors lie far apart
        colors = [matplotlib.colors.hsv_to_rgb((hue, 0.75, (0.95, 0.7)[i % 2])) for i, hue in enumerate(hues)]
    return [matplotlib.colors.to_hex(color) for color in colors]


def draw_map(found: Map, source: ImageSource | None, file: Path) -> None:
    """A PNG with a legend of the most frequent names."""
    width, height = np.ptp(found.points, axis=0)
    aspect = float(np.clip(width / max(height, 1e-12), 0.6, 1.8))
    figure, axis = plt.subplots(figsize=(7 * aspect + 2, 7.5), layout="constrained")
    size = float(np.clip(45000 / len(found.points), 3, 40))
    colors = np.array(found.colors)
    axis.scatter(*found.points.T, s=size, c=colors[found.kind], linewidths=0, alpha=0.8)
    counts = np.bincount(found.kind, minlength=len(found.names))
    listed = np.sort(np.argsort(-counts, kind="stable")[:LEGEND])
    handles = [
        plt.Line2D(
            [], [], marker="o", linestyle="", color=colors[i], label=label(f"{found.names[i][:28]} ({counts[i]:,})")
        )
        for i in listed
    ]
    more = f"the {LEGEND} largest of {len(found.names)}" if len(found.names) > LEGEND else None
    figure.legend(handles=handles, title=more, loc="outside right center", frameon=False)
    note = [label(line) for line in textwrap.wrap(in_one_line(found.note)[:NOTE], 80)]  # breaks long names, too
    axis.set_title("\n".join([label(found.title, 80), *note]), loc="left", fontsize=11, wrap=True)
    axis.set(xticks=[], yticks=[], aspect="equal")
    axis.spines[:].set_color("#d8dce2")
    figure.savefig(file, format="png", dpi=120)
    plt.close(figure)


def page(found: Map, source: ImageSource | None, file: Path) -> None:
    file.write_text(as_html(found, source, BUDGET), encoding="utf-8")


def as_html(found: Map, source: ImageSource | None, budget: int) -> str:
    """The template with the points within the unit square, and as many pictures as the budget allows."""
    low, high = found.points.min(0), found.points.max(0)
    points = (found.points - (low + high) / 2) / max((high - low).max(), 1e-12) + 0.5
    content = {
        "note": found.note,
        "names": found.names,
        "colors": found.colors,
        "kind": found.kind.tolist(),
        "x": [round(float(x), 5) for x in points[:, 0]],
        "y": [round(float(y), 5) for y in points[:, 1]],
        "paths": found.paths,
        "pictures": [None] * len(found.paths) if source is None else pictures(found.paths, source, budget),
    }
    text = Path(__file__).with_name("map.html").read_text(encoding="utf-8")
    text = text.replace("__TITLE__", html.escape(in_one_line(found.title)))
    return text.replace("__DATA__", in_script(content))


def in_script(content: Any) -> str:
    """JSON that no text in it can end the script with."""
    return to_json(content).replace("<", "\\u003c")


def pictures(paths: list[str], source: ImageSource, budget: int) -> list[str | None]:
    """Small JPEGs as data URIs; at random None, once the budget is spent, and where a file is gone or no picture."""
    uris, left = [None] * len(paths), budget
    with bar() as progress:
        for i in progress.track(np.random.default_rng(0).permutation(len(paths)), description="pictures"):
            try:
                uri = thumbnail(source.picture(paths[i], side=THUMBNAIL_SIDE))
            except (OSError, ValueError):
                continue
            left -= len(uri)
            if left < 0:
                break
            uris[i] = uri
    return uris


def thumbnail(picture: Image.Image) -> str:
    picture.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    return data_uri(picture, "JPEG", quality=80)


def data_uri(picture: Image.Image, kind: str, **options: Any) -> str:
    """The picture in the words of a page; `kind` and `options` are those of its `save`."""
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


WRITERS = {".png": draw_map, ".html": page}
