"""Find the nearest neighbors of images by cosine similarity: a table, and a contact sheet.

    self-supervised nearest features.parquet photos/cat/12.jpg another.jpg --out nearest.png -k 12

If IMAGE already has a row (looked up by its path on disk or, if there is no such file, by its path in the features),
that row is the query and is left out of its own neighbors. Any other image is embedded by the checkpoint of the
features.
"""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from attrs import frozen
from PIL import Image, ImageDraw, ImageFont

from self_supervised.data.image_files import preprocessing
from self_supervised.embeddings import parquet
from self_supervised.embeddings.batches import Batches
from self_supervised.embeddings.projection import unit_rows
from self_supervised.embeddings.sources import Folder, ImageSource, picture_of, source_of_features
from self_supervised.fields import as_path
from self_supervised.networks.encoder_hash import checkpoint_hash, encoder_hash
from self_supervised.networks.pretrained import load_encoder
from self_supervised.program import in_one_line, one_line_errors
from self_supervised.runs.command_line import FEATURES, FOLDER, parser_of
from self_supervised.safe_files import atomic_file, check_file

# Sizes of the contact sheet in pixels.
PICTURE_SIDE = 176
SHEET_GAP = 18  # between pictures
SHEET_MARGIN = 28
CAPTION_HEIGHT = 21  # per line
SHEET_COLUMNS = 6  # neighbors per line
WHITE, BOX, RULE, TEXT, FAINT = "#ffffff", "#f3f4f6", "#d8dce2", "#1b1f24", "#68707b"
LEAD_COLOR, SAME_COLOR, OTHER_COLOR = "#1f6feb", "#1a7f37", "#bc4c00"  # frames: query, same label, other label
FONT_FOLDER = Path(matplotlib.get_data_path(), "fonts", "ttf")  # matplotlib's fonts are the same on every machine
PLAIN_FONT = ImageFont.truetype(str(FONT_FOLDER / "DejaVuSans.ttf"), 14)
BOLD_FONT = ImageFont.truetype(str(FONT_FOLDER / "DejaVuSans-Bold.ttf"), 15)

Piece = tuple[list[str], np.ndarray, list[str | None]]  # paths, embeddings [n, E], labels


# ---- search ----


@frozen
class Neighbor:
    path: str
    label: str | None
    cosine: float


def nearest_rows(
    features: str | Path, queries: np.ndarray, k: int = 12, own: list[str | None] | None = None
) -> list[list[Neighbor]]:
    """Return for each query the k rows of `features` with the largest cosine similarity, the nearest first.

    The file is read in pieces, so it may be larger than the memory.

    Args:
        queries: embeddings [Q, E].
        own: for each query the path of its own row, which is left out, or None.
    """
    return best_of(parquet.pieces(features), queries, k, own)


def best_of(
    pieces: Iterable[Piece], queries: np.ndarray, k: int, own: list[str | None] | None = None
) -> list[list[Neighbor]]:
    """Return for each query [Q, E] the k rows of all pieces with the largest cosine similarity, the nearest first,
    without the query's own row (see `nearest_rows`)."""
    if k < 1:
        raise ValueError(f"k={k} must be at least 1")
    best: list[list[Neighbor]] = [[] for _ in queries]
    queries = unit_rows(queries)
    for paths, embeddings, labels in pieces:
        cosines = (queries @ unit_rows(embeddings).T).clip(-1, 1)
        for i, cosine in enumerate(cosines):
            top = np.argsort(-cosine, kind="stable")[: k + 1]  # one more than k, because the own row may be among them
            neighbors = (Neighbor(paths[j], labels[j], float(cosine[j])) for j in top)
            candidates = best[i] + [neighbor for neighbor in neighbors if own is None or neighbor.path != own[i]]
            best[i] = sorted(candidates, key=lambda neighbor: -neighbor.cosine)[:k]
    return best


# ---- queries ----


@frozen
class Query:
    name: str
    embedding: np.ndarray
    picture: Image.Image
    own: str | None = None  # path of its row in the features
    label: str | None = None


def find_queries(features: str | Path, images: list[str], source: ImageSource, checkpoint: str | None) -> list[Query]:
    """Return a query for each image: the row of that file or, if there is no such file, the row with that path; or else
    the embedded file."""
    files = {image: as_path(image) for image in images}
    candidates = {
        image: [*([] if file.is_file() else [image]), *source.paths_of(file)] for image, file in files.items()
    }
    rows = parquet.rows_of_ids(features, [path for paths in candidates.values() for path in paths])
    own = {image: next((path for path in paths if path in rows), None) for image, paths in candidates.items()}
    others = [image for image in images if own[image] is None]
    for image in others:
        if not files[image].is_file():
            raise ValueError(f"{image} is neither a file nor the path of a row of {features}")
    embedded = embed_files(features, others, checkpoint) if others else {}
    queries = []
    for image in images:
        if row := own[image]:
            embedding, label = rows[row]
            queries.append(Query(row, embedding, shown(row, source.picture), row, label))
        else:
            queries.append(Query(image, embedded[image], shown(str(files[image]), picture_of)))
    return queries


def embed_files(features: str | Path, files: list[str], checkpoint: str | None) -> dict[str, np.ndarray]:
    """Return embeddings of the files by the features' checkpoint, or by a copy of it at the path `checkpoint`.

    Raises:
        ValueError: it is a different checkpoint.
    """
    about = parquet.facts_of_file(features)
    encoder = load_encoder(checkpoint or about["checkpoint"], **about["overrides"])
    now = {
        "sha256": checkpoint_hash(encoder),
        "encoder": encoder_hash(encoder),
        "preprocessing": preprocessing(encoder.params),
    }
    before = {name: about.get(name, value) for name, value in now.items()}  # files of earlier versions have less
    before["preprocessing"] = {name: before["preprocessing"].get(name, x) for name, x in now["preprocessing"].items()}
    if before != now:
        raise ValueError(
            f"{encoder.report.source} is not the checkpoint of {features}, has changed since, or was read with other "
            "settings. Pass a copy of that checkpoint with --checkpoint, or embed the images again."
        )
    embedded = {}
    for file in files:
        path = as_path(file)
        try:
            prepared = Batches(Folder(path.parent), encoder.params).prepared(path.name)
        except Exception as error:  # readers raise many kinds on corrupt files
            raise ValueError(f"{file} could not be read as an image ({error}). Pass another image.") from error
        embedded[file] = encoder.embed(prepared[None])[0].numpy()
    return embedded


# ---- contact sheet ----


@frozen
class Tile:
    picture: Image.Image
    title: str  # bold, below the picture on the left
    note: str  # on the right of the title
    lines: tuple[str, ...]  # below the title; long ones are shortened at their beginning
    color: str | None = None  # of the frame and of the first line


def shown(path: str, read: Callable[..., Image.Image], **more: int) -> Image.Image:
    """Return read(path), or an empty picture if it cannot be shown."""
    try:
        return read(path, **more)
    except Exception as error:  # readers raise many kinds; LookupError: shards or rows that are gone
        print(f"{path}: its picture cannot be shown ({error})")
        return Image.new("RGB", (PICTURE_SIDE, PICTURE_SIDE), BOX)


def tiles(query: Query, neighbors: list[Neighbor], source: ImageSource) -> tuple[Tile, list[Tile]]:
    """Return the tile of the query and those of its neighbors. If both have a label, the color of a neighbor's frame
    shows whether they are the same."""
    lead = Tile(query.picture, "query", "", (query.label, query.name) if query.label else (query.name,), LEAD_COLOR)
    row = []
    for i, n in enumerate(neighbors, start=1):
        color = (SAME_COLOR if n.label == query.label else OTHER_COLOR) if n.label and query.label else None
        lines = (n.label, n.path) if n.label else (n.path,)
        picture = shown(n.path, source.picture, side=PICTURE_SIDE)
        row.append(Tile(picture, str(i), f"{n.cosine:.3f}", lines, color))
    return lead, row


def neighbor_sheet(rows: list[tuple[Tile, list[Tile]]]) -> Image.Image:
    """Return a sheet with a row for each query: its picture, then its neighbors, SHEET_COLUMNS per line."""
    n_lines = max(len(tile.lines) for lead, tiles in rows for tile in (lead, *tiles))
    cell = CAPTION_HEIGHT * (1 + n_lines) + PICTURE_SIDE + SHEET_GAP
    columns = min(SHEET_COLUMNS, max(len(tiles) for _, tiles in rows))
    heights = [max(1, -(-len(tiles) // SHEET_COLUMNS)) * cell for _, tiles in rows]
    first = SHEET_MARGIN + PICTURE_SIDE + 2 * SHEET_GAP  # left edge of the first neighbor
    size = (
        first + columns * (PICTURE_SIDE + SHEET_GAP) - SHEET_GAP + SHEET_MARGIN,
        sum(heights) + SHEET_GAP * (len(rows) - 1) + 2 * SHEET_MARGIN - SHEET_GAP,
    )
    sheet = Image.new("RGB", size, WHITE)
    draw = ImageDraw.Draw(sheet)
    top = SHEET_MARGIN
    for number, ((lead, tiles), height) in enumerate(zip(rows, heights, strict=True)):
        if number:
            draw.line((SHEET_MARGIN, top - SHEET_GAP, sheet.width - SHEET_MARGIN, top - SHEET_GAP), fill=RULE)
        paste(sheet, lead, SHEET_MARGIN, top)
        draw.line((first - SHEET_GAP, top, first - SHEET_GAP, top + height - SHEET_GAP), fill=RULE)
        for i, tile in enumerate(tiles):
            paste(sheet, tile, first + i % SHEET_COLUMNS * (PICTURE_SIDE + SHEET_GAP), top + i // SHEET_COLUMNS * cell)
        top += height + SHEET_GAP
    return sheet


def paste(sheet: Image.Image, tile: Tile, left: int, top: int) -> None:
    draw = ImageDraw.Draw(sheet)
    right = left + PICTURE_SIDE
    bottom = top + PICTURE_SIDE
    draw.rectangle((left, top, right - 1, bottom - 1), fill=BOX)
    picture = fitted(tile.picture)
    sheet.paste(picture, (left + (PICTURE_SIDE - picture.width) // 2, top + (PICTURE_SIDE - picture.height) // 2))
    if tile.color:
        draw.rectangle((left - 3, top - 3, right + 2, bottom + 2), outline=tile.color, width=3)
    draw.text((left, bottom + 6), in_one_line(tile.title), TEXT, BOLD_FONT)
    draw.text((right, bottom + 6), in_one_line(tile.note), TEXT, PLAIN_FONT, anchor="ra")
    for i, line in enumerate(tile.lines):
        color = (tile.color or TEXT) if i == 0 else FAINT
        draw.text((left, bottom + 6 + CAPTION_HEIGHT * (i + 1)), shortened(line), color, PLAIN_FONT)


def fitted(picture: Image.Image) -> Image.Image:
    """Return the picture scaled to the box, with its aspect ratio; small ones by a whole factor, so that their pixels
    show."""
    factor = PICTURE_SIDE / max(picture.size)
    factor = int(factor) if factor >= 2 else factor
    size = tuple(max(1, round(edge * factor)) for edge in picture.size)
    method = Image.Resampling.NEAREST if factor >= 2 else Image.Resampling.LANCZOS
    return picture.convert("RGB").resize(size, method)


def shortened(line: str) -> str:
    """Return the line, or as much of its end as fits the width of a picture."""
    line = in_one_line(line)
    line = f"…{line[-PICTURE_SIDE:]}" if len(line) > PICTURE_SIDE else line  # a letter is wider than a pixel
    if PLAIN_FONT.getlength(line) <= PICTURE_SIDE:
        return line
    return next((f"…{line[i:]}" for i in range(len(line)) if PLAIN_FONT.getlength(f"…{line[i:]}") <= PICTURE_SIDE), "…")


# ---- the command ----


def nearest_sheet(
    features: str | Path,
    images: list[str],
    out: str | Path,
    k: int = 12,
    checkpoint: str | None = None,
    folder: str | None = None,
) -> list[list[Neighbor]]:
    """Return the neighbors of each image, print them as tables, and write them as a contact sheet, the PNG `out`.

    Args:
        checkpoint: path of the features' checkpoint, if it has moved.
        folder: directory of the features' images, if it has moved.
    """
    features = as_path(features)
    check_file("out", out, ".png", read=[features, *images, *([checkpoint] if checkpoint else [])])
    about = parquet.facts_of_file(features)
    source = source_of_features(about, folder)
    queries = find_queries(features, images, source, checkpoint)
    embeddings = np.stack([query.embedding for query in queries])
    neighbors = nearest_rows(features, embeddings, k, [query.own for query in queries])
    sheet = neighbor_sheet([tiles(query, row, source) for query, row in zip(queries, neighbors, strict=True)])
    with atomic_file(as_path(out)) as file:
        sheet.save(file, "PNG")
    for query, row in zip(queries, neighbors, strict=True):
        print(neighbor_table(query, row), end="\n\n")
    print(out)
    return neighbors


def neighbor_table(query: Query, neighbors: list[Neighbor]) -> str:
    rows = [("rank", "cosine", "label", "path")]
    rows += [(str(i), f"{n.cosine:.4f}", n.label or "-", n.path) for i, n in enumerate(neighbors, start=1)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [f"  {a:>{widths[0]}}  {b:>{widths[1]}}  {c:<{widths[2]}}  {d}" for a, b, c, d in rows]
    title = f"{query.name} ({query.label})" if query.label else query.name
    return "\n".join([title, *lines])


@one_line_errors()
def main(arguments: Sequence[str] | None = None) -> None:
    parser = parser_of("nearest", __doc__)
    parser.add_argument("features", metavar="FILE.parquet", help=FEATURES)
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="path of an image, on disk or in the file")
    parser.add_argument("-k", type=int, default=12, help="number of neighbors per image (default: 12)")
    parser.add_argument(
        "--out",
        type=as_path,
        default=Path("nearest.png"),
        metavar="FILE.png",
        help="contact sheet to write (default: nearest.png)",
    )
    parser.add_argument("--checkpoint", help="checkpoint of the features, or directory of its run, if it has moved")
    parser.add_argument("--folder", help=FOLDER)
    nearest_sheet(**vars(parser.parse_args(arguments)))
