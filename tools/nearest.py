"""The nearest neighbours of images, by cosine of their embeddings: a table, and a contact sheet.

    python -m tools.nearest features.parquet photos/cat/12.jpg another.jpg --out nearest.png -k 12

An IMAGE is one of the features' own, by its path in the file or on the disk, and is then not its own neighbour; or any
other image, which the features' checkpoint embeds.
"""

from pathlib import Path

import numpy as np

from fields import as_path
from program import one_line_errors
from tools import feature_files
from tools.commands import parser_of
from tools.contact_sheet import contact_sheet
from tools.embed import digest
from tools.image_sources import Batches, Folder, Source, open_source, picture_of
from tools.neighbours import Neighbour, Query, best_of, tiles
from weights import load_encoder
from whole_files import check_file, whole


def nearest(
    features: str | Path, queries: np.ndarray, k: int = 12, own: list[str | None] | None = None
) -> list[list[Neighbour]]:
    """The k rows of `features` with the largest cosine to each query, the nearest first.

    The file is read in pieces, so it may be larger than the memory.

    Args:
        queries: embeddings [Q, E].
        own: for each query the path of its own row, which is left out, or None.
    """
    return best_of(feature_files.pieces(features), queries, k, own)


def find_queries(features: str | Path, images: list[str], source: Source, checkpoint: str | None) -> list[Query]:
    """An image is looked for as a path of a row, as a file that has a row, and as any other file."""
    candidates = {image: [image, source.path_of(Path(image).expanduser())] for image in images}
    rows = feature_files.rows_of(features, [path for paths in candidates.values() for path in paths if path])
    own = {image: next((path for path in paths if path in rows), None) for image, paths in candidates.items()}
    others = [image for image in images if own[image] is None]
    for image in others:
        if not Path(image).expanduser().is_file():
            raise ValueError(f"{image} is neither a file nor the path of a row of {features}")
    embedded = embed_files(features, others, checkpoint) if others else {}
    return [
        Query(own[image], rows[own[image]][0], source.picture(own[image]), own[image], rows[own[image]][1])
        if own[image]
        else Query(image, embedded[image], picture_of(str(Path(image).expanduser())))
        for image in images
    ]


def embed_files(features: str | Path, files: list[str], checkpoint: str | None) -> dict[str, np.ndarray]:
    """By the features' checkpoint, which may lie elsewhere by now. Raises ValueError if it is another one."""
    about = feature_files.about(features)
    encoder = load_encoder(checkpoint or about["checkpoint"], **about["overrides"])
    if digest(encoder) != about["sha256"]:
        raise ValueError(
            f"{encoder.report.source} is not the checkpoint of {features}, or has changed since: name a copy with "
            "--checkpoint, or embed the images anew"
        )
    embedded = {}
    for file in files:
        path = Path(file).expanduser()
        prepared = Batches(Folder(path.parent), encoder.params).prepared(path.name)
        embedded[file] = encoder.embed(prepared[None])[0].numpy()
    return embedded


# ---- what is shown ----


def table(query: Query, found: list[Neighbour]) -> str:
    rows = [("rank", "cosine", "label", "path")]
    rows += [(str(i), f"{n.cosine:.4f}", n.label or "-", n.path) for i, n in enumerate(found, start=1)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [f"  {a:>{widths[0]}}  {b:>{widths[1]}}  {c:<{widths[2]}}  {d}" for a, b, c, d in rows]
    return "\n".join([query.name + (f" ({query.label})" if query.label else ""), *lines])


def nearest_sheet(
    features: str | Path,
    images: list[str],
    out: str | Path,
    k: int = 12,
    checkpoint: str | None = None,
    folder: str | None = None,
) -> list[list[Neighbour]]:
    """The neighbours of each image, also as a contact sheet, the PNG `out`.

    Args:
        checkpoint: of the features, if it is not where it was.
        folder: of the features' images, likewise.
    """
    features = as_path(features)
    check_file("out", out)
    source = open_source(folder or feature_files.about(features)["images"])
    queries = find_queries(features, images, source, checkpoint)
    found = nearest(features, np.stack([query.embedding for query in queries]), k, [query.own for query in queries])
    sheet = contact_sheet([tiles(query, row, source) for query, row in zip(queries, found, strict=True)])
    with whole(as_path(out)) as file:
        sheet.save(file, "PNG")
    for query, row in zip(queries, found, strict=True):
        print(table(query, row), end="\n\n")
    print(out)
    return found


@one_line_errors()
def main() -> None:
    parser = parser_of("nearest", __doc__)
    parser.add_argument("features", metavar="FILE.parquet")
    parser.add_argument("images", nargs="+", metavar="IMAGE")
    parser.add_argument("--out", type=as_path, default=Path("nearest.png"), metavar="FILE.png")
    parser.add_argument("-k", type=int, default=12, help="neighbours of each image")
    parser.add_argument("--checkpoint", help="of the features, if it is not where it was")
    parser.add_argument("--folder", help="of the features' images, likewise")
    nearest_sheet(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()
