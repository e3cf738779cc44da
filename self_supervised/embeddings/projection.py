"""A map of embeddings in two dimensions: a picture, and a page to look around in, with nothing but one file.

    self-supervised map features.parquet --out map.png map.html --sample 5000

t-SNE is scikit-learn's; --method umap needs the package umap-learn. Both see the embeddings on the unit sphere.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE

from self_supervised import numerics
from self_supervised.embeddings import parquet
from self_supervised.embeddings.map_page import WRITERS, Map
from self_supervised.embeddings.sources import open_source
from self_supervised.fields import as_path
from self_supervised.program import one_line_errors
from self_supervised.runs.command_line import parser_of
from self_supervised.safe_files import atomic_file, check_file

CLUSTERS = 10  # where there are no labels
NO_LABEL = "no label"


def unit_rows(x: np.ndarray) -> np.ndarray:
    """Each row divided by its length, whatever its scale: their products are cosines. Raises ValueError where a number
    is not finite."""
    return numerics.unit(numerics.finite(torch.tensor(x), "embeddings")).numpy()


# ---- from embeddings to points ----


def tsne(x: np.ndarray, seed: int) -> np.ndarray:
    """scikit-learn's, from the first two principal components; perplexity 30, or less for few images."""
    perplexity = min(30.0, (len(x) - 1) / 3)
    return TSNE(init="pca", perplexity=perplexity, random_state=seed).fit_transform(x)


def umap(x: np.ndarray, seed: int) -> np.ndarray:
    """umap-learn's, on one core: with more it could not be repeated."""
    try:
        from umap import UMAP
    except ImportError as error:
        raise ValueError(
            "--method umap needs the package umap-learn, which is not installed: pip install umap-learn"
        ) from error
    return UMAP(n_neighbors=min(15, len(x) - 1), random_state=seed, n_jobs=1).fit_transform(x)


METHODS = {"tsne": tsne, "umap": umap}
TITLES = {"tsne": "t-SNE", "umap": "UMAP"}


def project(embeddings: np.ndarray, method: str, seed: int) -> np.ndarray:
    """[N, E] -> [N, 2], by way of at most 50 principal components, as is usual.

    Raises:
        ValueError: the method is unknown or not installed; there are too few directions; a number is not finite.
    """
    if method not in METHODS:
        raise ValueError(f"method={method!r} is unknown: choose one of {', '.join(METHODS)}")
    x = unit_rows(embeddings)
    if (n := count_distinct(x)) < 4:
        raise ValueError(f"a map needs at least 4 different images, and there are {n} (those of one direction are one)")
    if min(x.shape) > 50:
        x = PCA(50, random_state=seed).fit_transform(x)
    with Console().status(f"{TITLES[method]} of {len(x):,} embeddings"):
        return METHODS[method](x, seed)


def count_distinct(embeddings: np.ndarray) -> int:
    return len(np.unique(embeddings, axis=0))


# ---- colors ----


def kinds(labels: list[str | None], embeddings: np.ndarray, seed: int) -> tuple[np.ndarray, list[str], str]:
    """(an index for each row, names, what they are): labels; k-means clusters where there are none."""
    if any(label is not None for label in labels):
        names = sorted({label for label in labels if label is not None}, key=natural)
        names += [NO_LABEL] * (None in labels)
        index = {name: i for i, name in enumerate(names)}
        return np.array([index[label or NO_LABEL] for label in labels]), names, "colored by label"
    x = unit_rows(embeddings)
    clusters = KMeans(min(CLUSTERS, count_distinct(x)), n_init=3, random_state=seed).fit_predict(x)
    found, kind = np.unique(clusters, return_inverse=True)
    names = [f"cluster {i + 1}" for i in range(len(found))]
    return kind, names, f"no labels: colored by {len(found)} k-means clusters of the embeddings"


def natural(name: str) -> tuple:
    """Numbers in their order, before words."""
    return (0, int(name), name) if name.isdecimal() else (1, 0, name)


# ---- A map of embeddings in two dimensions: a picture, and a page to look around in, with nothing but one file ----


def sample(features: str | Path, n: int, seed: int) -> tuple[list[str], np.ndarray, list[str | None]]:
    """n random rows in their order, or all if there are no more. The file is read in pieces."""
    total, start = parquet.count_rows(features), 0
    chosen = np.sort(np.random.default_rng(seed).choice(total, min(n, total), replace=False))
    paths, embeddings, labels = [], [], []
    for some, x, y in parquet.pieces(features):
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
    about = parquet.facts_of_file(features)
    paths, embeddings, labels = sample(features, n, seed)
    points = project(embeddings, method, seed)
    kind, names, meaning = kinds(labels, embeddings, seed)
    of = f"{len(paths):,} of {parquet.count_rows(features):,} images"
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
        with atomic_file(as_path(file)) as unfinished:
            WRITERS[file.suffix](found, source, unfinished)
        print(file)
    return found


@one_line_errors()
def main(arguments: Sequence[str] | None = None) -> None:
    parser = parser_of("map", __doc__)
    parser.add_argument("features", metavar="FILE.parquet")
    parser.add_argument("--out", type=as_path, nargs="+", default=[Path("map.png"), Path("map.html")], metavar="FILE")
    parser.add_argument("--method", choices=METHODS, default="tsne")
    parser.add_argument("--sample", type=int, default=5000, metavar="N", dest="n", help="so many rows, drawn at random")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", help="of the features' images, if it is not where it was")
    make_map(**vars(parser.parse_args(arguments)))
