"""Files of a map: a picture with a legend, and a self-contained page (its template is map.html)."""

import base64
import html
import io
import textwrap
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
from attrs import field, frozen
from PIL import Image

from self_supervised.embeddings.sources import ImageSource
from self_supervised.program import bar, in_one_line, label
from self_supervised.safe_files import to_json

matplotlib.use("Agg")

NOTE = 400  # most characters of the note below the picture's title
LEGEND = 30  # most rows of the picture's legend
THUMBNAIL_SIDE = 64  # pixels, most on the longer side of the page's pictures
BUDGET = 12_000_000  # most characters of all pictures of a page


@frozen
class Map:
    """Points in the plane, one for each image."""

    title: str
    note: str
    paths: list[str]
    points: np.ndarray  # [N, 2]
    kind: np.ndarray  # [N], indices of names
    names: list[str]  # labels or clusters
    examples: list[list[int]] = field(factory=list)  # rows of the representative images of each name

    @property
    def colors(self) -> list[str]:
        """Color of each name."""
        return palette(len(self.names))


def palette(n: int) -> list[str]:
    """Return n colors. With more than 20, similar colors are hard to tell apart."""
    if n <= 20:
        table = matplotlib.colormaps["tab10" if n <= 10 else "tab20"]
        colors = [table(i) for i in range(n)]
    else:
        hues = np.arange(n) * 0.618034 % 1  # golden ratio: successive hues are far apart
        colors = [matplotlib.colors.hsv_to_rgb((hue, 0.75, (0.95, 0.7)[i % 2])) for i, hue in enumerate(hues)]
    return [matplotlib.colors.to_hex(color) for color in colors]


# ---- picture ----


def draw_map(image_map: Map, source: ImageSource | None, file: Path) -> None:
    """Write a PNG with a legend of the most frequent names. `source` is not used."""
    width, height = np.ptp(image_map.points, axis=0)
    aspect = float(np.clip(width / max(height, 1e-12), 0.6, 1.8))
    figure, axis = plt.subplots(figsize=(7 * aspect + 2, 7.5), layout="constrained")
    size = float(np.clip(45000 / len(image_map.points), 3, 40))
    colors = np.array(image_map.colors)
    axis.scatter(*image_map.points.T, s=size, c=colors[image_map.kind], linewidths=0, alpha=0.8)
    counts = np.bincount(image_map.kind, minlength=len(image_map.names))
    listed = np.sort(np.argsort(-counts, kind="stable")[:LEGEND])
    handles = [
        plt.Line2D(
            [], [], marker="o", linestyle="", color=colors[i], label=label(f"{image_map.names[i][:28]} ({counts[i]:,})")
        )
        for i in listed
    ]
    more = f"the {LEGEND} largest of {len(image_map.names)}" if len(image_map.names) > LEGEND else None
    figure.legend(handles=handles, title=more, loc="outside right center", frameon=False)
    note = [label(line) for line in textwrap.wrap(in_one_line(image_map.note)[:NOTE], 80)]  # breaks long names, too
    axis.set_title("\n".join([label(image_map.title, 80), *note]), loc="left", fontsize=11, wrap=True)
    axis.set(xticks=[], yticks=[])
    axis.set_aspect("equal", adjustable="datalim")  # fills the page whatever the shape of the points
    axis.spines[:].set_color("#d8dce2")
    figure.savefig(file, format="png", dpi=120)
    plt.close(figure)


# ---- page ----


def page(image_map: Map, source: ImageSource | None, file: Path) -> None:
    """Write the page, with pictures from `source`; None: without pictures."""
    file.write_text(as_html(image_map, source, BUDGET), encoding="utf-8")


def as_html(image_map: Map, source: ImageSource | None, budget: int) -> str:
    """Return the template with the points, scaled to the unit square, and as many pictures as the budget allows."""
    low = image_map.points.min(0)
    high = image_map.points.max(0)
    points = (image_map.points - (low + high) / 2) / max((high - low).max(), 1e-12) + 0.5
    content = {
        "note": image_map.note,
        "names": image_map.names,
        "colors": image_map.colors,
        "kind": image_map.kind.tolist(),
        "x": [round(float(x), 5) for x in points[:, 0]],
        "y": [round(float(y), 5) for y in points[:, 1]],
        "paths": image_map.paths,
        "examples": image_map.examples,
        "pictures": [None] * len(image_map.paths) if source is None else pictures(image_map, source, budget),
    }
    text = Path(__file__).with_name("map.html").read_text(encoding="utf-8")
    text = text.replace("__TITLE__", html.escape(in_one_line(image_map.title)))
    return text.replace("__DATA__", in_script(content))


def in_script(content: Any) -> str:
    """Return JSON in which no text can end the surrounding script element."""
    return to_json(content).replace("<", "\\u003c")


def pictures(image_map: Map, source: ImageSource, budget: int) -> list[str | None]:
    """Return small JPEGs as data URIs, made of the examples first and then in random order; None where the budget is
    used up, or where a file is missing or is not a picture."""
    uris = [None] * len(image_map.paths)
    left = budget
    failed = []
    order = [*sum(image_map.examples, []), *np.random.default_rng(0).permutation(len(image_map.paths)).tolist()]
    with bar() as progress:
        for i in progress.track([*dict.fromkeys(order)], description="pictures"):
            try:
                uri = thumbnail(source.picture(image_map.paths[i], side=THUMBNAIL_SIDE))
            except Exception as error:  # readers raise many kinds on corrupt files
                failed.append(f"{image_map.paths[i]} ({error})")
                continue
            left -= len(uri)
            if left < 0:
                break
            uris[i] = uri
    if failed:
        print(f"without a picture: {len(failed):,} of the images, such as {failed[0]}")
    return uris


def thumbnail(picture: Image.Image) -> str:
    picture.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    return data_uri(picture, "JPEG", quality=80)


def data_uri(picture: Image.Image, kind: str, **options: Any) -> str:
    """Return the picture as a data URI for a page. `kind` and `options` are passed to its `save`."""
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


WRITERS = {".png": draw_map, ".html": page}
