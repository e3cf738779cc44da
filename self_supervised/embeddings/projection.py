"""Draw a map of embeddings in two dimensions: a picture, and a self-contained page to explore it.

    self-supervised map features.parquet --out map.png map.html --sample 5000
    self-supervised map features.parquet --clusters 30 --out map.html clusters.parquet

A .parquet file in --out is a copy of FILE.parquet with a column `cluster`: the k-means cluster of every row.
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
from self_supervised.embeddings.sources import source_of_features
from self_supervised.fields import as_path
from self_supervised.program import one_line_errors
from self_supervised.runs.command_line import FEATURES, FOLDER, parser_of
from self_supervised.runs.values import ListOption, items
from self_supervised.safe_files import atomic_file, check_file

TITLES = {"tsne": "t-SNE", "umap": "UMAP"}
CLUSTERS = 10  # of k-means
CLUSTERED = ".parquet"  # extension of a copy with clusters
EXAMPLES = 4  # representative images of a label or cluster
NO_LABEL = "no label"


def sample(features: str | Path, n: int, seed: int) -> tuple[list[str], np.ndarray, list[str | None]]:
    """Return paths, embeddings and labels of n random rows in the order of the file, or of all if there are fewer. The
    file is read in pieces."""
    total = parquet.count_rows(features)
    chosen = np.sort(np.random.default_rng(seed).choice(total, min(n, total), replace=False))
    paths, embeddings, labels = [], [], []
    start = 0
    for some, x, y in parquet.pieces(features):
        rows = chosen[(chosen >= start) & (chosen < start + len(some))] - start
        paths += [some[i] for i in rows]
        labels += [y[i] for i in rows]
        embeddings.append(x[rows])
        start += len(some)
    return paths, np.concatenate(embeddings), labels


# ---- points ----


def unit_rows(x: np.ndarray) -> np.ndarray:
    """Return each row divided by its length, so that products of rows are cosines; rows may have any scale.

    Raises:
        ValueError: a number is not finite.
    """
    return numerics.unit(numerics.finite(torch.tensor(x), "embeddings")).numpy()


def tsne(x: np.ndarray, seed: int) -> np.ndarray:
    """Return scikit-learn's t-SNE, initialized by the first two principal components; perplexity 30, or less if there
    are few images."""
    perplexity = min(30.0, (len(x) - 1) / 3)
    return TSNE(init="pca", perplexity=perplexity, random_state=seed).fit_transform(x)


def umap(x: np.ndarray, seed: int) -> np.ndarray:
    """Return umap-learn's UMAP, computed on one core: on multiple cores it is not reproducible."""
    try:
        from umap import UMAP
    except ImportError as error:
        raise ValueError(
            "--method umap needs the package umap-learn, which is not installed: pip install umap-learn"
        ) from error
    return UMAP(n_neighbors=min(15, len(x) - 1), random_state=seed, n_jobs=1).fit_transform(x)


METHODS = {"tsne": tsne, "umap": umap}


def project(embeddings: np.ndarray, method: str, seed: int) -> np.ndarray:
    """Return points [N, 2] for embeddings [N, E], which are first reduced to at most 50 principal components, as is
    usual.

    Raises:
        ValueError: the method is unknown or not installed; there are too few directions; a number is not finite.
    """
    if method not in METHODS:
        raise ValueError(f"method={method!r} is unknown: choose one of {', '.join(METHODS)}")
    x = unit_rows(embeddings)
    if (n := count_distinct(x)) < 4:
        raise ValueError(f"a map needs embeddings with at least 4 different directions, but there are {n}")
    if min(x.shape) > 50:
        x = PCA(50, random_state=seed).fit_transform(x)
    with Console().status(f"{TITLES[method]} of {len(x):,} embeddings"):
        return METHODS[method](x, seed)


def count_distinct(embeddings: np.ndarray) -> int:
    return len(np.unique(embeddings, axis=0))


# ---- colors ----


def clustering(embeddings: np.ndarray, n: int | None, seed: int) -> KMeans:
    """Return k-means of embeddings on the unit sphere, with n clusters, or fewer if there are fewer directions."""
    x = unit_rows(embeddings)
    return KMeans(min(n or CLUSTERS, count_distinct(x)), n_init=3, random_state=seed).fit(x)


def kinds(labels: list[str | None], clusters: np.ndarray | None) -> tuple[np.ndarray, list[str], str]:
    """Return (an index of the names for each row, the names, an explanation): the names are labels, or clusters if
    these are passed."""
    if clusters is None:
        names = sorted({label for label in labels if label is not None}, key=natural)
        if None in labels:
            names.append(NO_LABEL)
        index = {name: i for i, name in enumerate(names)}
        return np.array([index[label or NO_LABEL] for label in labels]), names, "colored by label"
    cluster_numbers, kind = np.unique(clusters, return_inverse=True)
    unlabeled = "no labels: " if not any(label is not None for label in labels) else ""
    names = [f"cluster {i + 1}" for i in cluster_numbers]
    return kind, names, f"{unlabeled}colored by {len(cluster_numbers)} k-means clusters of the embeddings"


def examples(embeddings: np.ndarray, kind: np.ndarray) -> list[list[int]]:
    """Return for each kind the rows that are nearest to its mean direction, by cosine."""
    x = unit_rows(embeddings)
    rows_of_kinds = []
    for one in range(kind.max() + 1):
        rows = np.flatnonzero(kind == one)
        nearest = np.argsort(-(x[rows] @ x[rows].mean(0)), kind="stable")
        rows_of_kinds.append(rows[nearest[:EXAMPLES]].tolist())
    return rows_of_kinds


def natural(name: str) -> tuple:
    """Return a sort key that puts numbers in numerical order, before words."""
    return (0, int(name), name) if name.isdecimal() else (1, 0, name)


# ---- the command ----


def make_map(
    features: str | Path,
    out: list[Path],
    method: str = "tsne",
    n: int = 5000,
    seed: int = 0,
    folder: str | None = None,
    clusters: int | None = None,
) -> Map:
    """Return a map of n random rows of `features`, and write it to each file of `out`, a .png or an .html. A .parquet
    file is a copy of `features` with the cluster of every row.

    Args:
        clusters: color by so many k-means clusters of these rows; None: by label, or by CLUSTERS clusters if there are
            no labels.
        folder: directory of the features' images, if it has moved. If it is not found, the page has no pictures.
    """
    for file in out:
        check_file("out", file, *WRITERS, CLUSTERED)
        if file.resolve() == as_path(features).resolve():
            raise ValueError(f"out={str(file)!r} is the file of the embeddings. Choose another name for the copy.")
    if clusters is not None and clusters < 2:
        raise ValueError(f"clusters={clusters} must be at least 2")
    if n < 4:
        raise ValueError(f"sample={n} must be at least 4")
    features = as_path(features)
    about = parquet.facts_of_file(features)
    paths, embeddings, labels = sample(features, n, seed)
    points = project(embeddings, method, seed)
    by_label = clusters is None and any(label is not None for label in labels)
    needed = not by_label or any(file.suffix.lower() == CLUSTERED for file in out)
    model = clustering(embeddings, clusters, seed) if needed else None
    kind, names, meaning = kinds(labels, None if by_label else model.labels_)
    images = f"{len(paths):,} of {parquet.count_rows(features):,} images in {Path(about['images']).name}"
    encoder = f"{about['encoder_arch']} of {Path(about['checkpoint']).name}"
    note = f"{images}, {encoder}; {meaning}"
    title = f"{TITLES[method]} of {Path(features).name}"
    drawn = Map(title, note, paths, points, kind, names, examples(embeddings, kind))
    try:
        source = source_of_features(about, folder)
    except ValueError as error:
        print(f"the page has no pictures: {error}")
        source = None
    for file in out:
        if file.suffix.lower() == CLUSTERED:
            parquet.write_clusters(features, file, lambda x: model.predict(unit_rows(x)) + 1)
        else:
            with atomic_file(as_path(file)) as unfinished:
                WRITERS[file.suffix.lower()](drawn, source, unfinished)
        print(file)
    return drawn


@one_line_errors()
def main(arguments: Sequence[str] | None = None) -> None:
    parser = parser_of("map", __doc__)
    parser.add_argument("features", metavar="FILE.parquet", help=FEATURES)
    parser.add_argument(
        "--out",
        action=ListOption,
        type=items(as_path, r"(?<=\.png),|(?<=\.html),|(?<=\.parquet),"),  # names of files may have commas
        default=[Path("map.png"), Path("map.html")],
        metavar="FILE",
        help="pictures (.png), pages (.html), and copies with clusters (.parquet); default: map.png map.html",
    )
    parser.add_argument("--method", choices=METHODS, default="tsne", help="method of projection (default: tsne)")
    parser.add_argument(
        "--sample", type=int, default=5000, metavar="N", dest="n", help="rows to draw, at random (default: 5000)"
    )
    parser.add_argument("--clusters", type=int, metavar="K", help="color by K k-means clusters, not by label")
    parser.add_argument("--seed", type=int, default=0, help="seed of sample and projection (default: 0)")
    parser.add_argument("--folder", help=FOLDER)
    make_map(**vars(parser.parse_args(arguments)))
