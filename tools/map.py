"""A map of embeddings in two dimensions: a picture, and a page to look around in, with nothing but one file.

    python -m tools.map features.parquet --out map.png map.html --sample 5000

t-SNE is scikit-learn's; --method umap needs the package umap-learn. Both see the embeddings on the unit sphere.
"""

from pathlib import Path

import numpy as np

from fields import as_path
from program import one_line_errors
from tools import feature_files
from tools.commands import parser_of
from tools.image_sources import open_source
from tools.map_files import WRITERS, Map
from tools.projection import METHODS, TITLES, kinds, project
from whole_files import check_file, whole


def sample(features: str | Path, n: int, seed: int) -> tuple[list[str], np.ndarray, list[str | None]]:
    """n random rows in their order, or all if there are no more. The file is read in pieces."""
    total, start = feature_files.count(features), 0
    chosen = np.sort(np.random.default_rng(seed).choice(total, min(n, total), replace=False))
    paths, embeddings, labels = [], [], []
    for some, x, y in feature_files.pieces(features):
        rows = chosen[(chosen >= start) & (chosen < start + len(some))] - start
        paths += [some[i] for i in rows]
        labels += [y[i] for i in rows]
        embeddings.append(x[rows])
        start += len(some)
    return paths, np.concatenate(embeddings), labels


def make_map(
    features: str | Path, out: list[Path], method: str = "tsne", n: int = 5000, seed: int = 0, folder: str | None = None
) -> Map:
    """A map of n random rows of `features`, written as each file of `out`, a .png or an .html.

    Args:
        folder: of the features' images, if it is not where it was. Without images the page has no pictures.
    """
    for file in out:
        check_file("out", file)
        if file.suffix not in WRITERS:
            raise ValueError(f"{file} must end in {' or '.join(WRITERS)}")
    if n < 4:
        raise ValueError(f"sample={n} must be at least 4: a map needs some points")
    features = as_path(features)
    about = feature_files.about(features)
    paths, embeddings, labels = sample(features, n, seed)
    points = project(embeddings, method, seed)
    kind, names, meaning = kinds(labels, embeddings, seed)
    of = f"{len(paths):,} of {feature_files.count(features):,} images"
    note = (
        f"{of} in {Path(about['images']).name}, {about['encoder_arch']} of {Path(about['checkpoint']).name}; {meaning}"
    )
    found = Map(f"{TITLES[method]} of {Path(features).name}", note, paths, points, kind, names)
    try:
        source = open_source(folder or about["images"])
    except ValueError as error:
        print(f"no pictures: {error}; --folder says where the images are")
        source = None
    for file in out:
        with whole(as_path(file)) as unfinished:
            WRITERS[file.suffix](found, source, unfinished)
        print(file)
    return found


@one_line_errors()
def main() -> None:
    parser = parser_of("map", __doc__)
    parser.add_argument("features", metavar="FILE.parquet")
    parser.add_argument("--out", type=as_path, nargs="+", default=[Path("map.png"), Path("map.html")], metavar="FILE")
    parser.add_argument("--method", choices=METHODS, default="tsne")
    parser.add_argument("--sample", type=int, default=5000, metavar="N", dest="n", help="so many rows, drawn at random")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", help="of the features' images, if it is not where it was")
    make_map(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()
