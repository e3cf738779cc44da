"""A map of embeddings in two dimensions: a picture, and a page to look around in, with nothing but one file.

    python -m tools.map features.parquet --out map.png map.html --sample 5000

t-SNE is scikit-learn's; --method umap needs the package umap-learn. Both see the embeddings on the unit sphere.
"""

import argparse
from pathlib import Path

import numpy as np
from rich.console import Console
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE

from tools import feature_files
from tools.commands import in_words
from tools.feature_files import unit
from tools.image_sources import open_source
from tools.map_files import WRITERS, Map
from whole_files import whole

CLUSTERS = 10  # where there are no labels
NO_LABEL = "no label"


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
        ValueError: the method is unknown or not installed; there are too few rows.
    """
    if method not in METHODS:
        raise ValueError(f"method={method!r} is unknown: choose one of {', '.join(METHODS)}")
    if (n := different(embeddings)) < 4:
        raise ValueError(f"a map needs at least 4 different images, and there are {n}")
    x = unit(embeddings)
    if min(x.shape) > 50:
        x = PCA(50, random_state=seed).fit_transform(x)
    with Console().status(f"{TITLES[method]} of {len(x):,} embeddings"):
        return METHODS[method](x, seed)


def different(embeddings: np.ndarray) -> int:
    return len(np.unique(embeddings, axis=0))


# ---- colours ----


def kinds(labels: list[str | None], embeddings: np.ndarray, seed: int) -> tuple[np.ndarray, list[str], str]:
    """(an index for each row, names, what they are): labels; k-means clusters where there are none."""
    if any(label is not None for label in labels):
        names = sorted({label for label in labels if label is not None}, key=natural)
        names += [NO_LABEL] * (None in labels)
        index = {name: i for i, name in enumerate(names)}
        return np.array([index[label or NO_LABEL] for label in labels]), names, "coloured by label"
    clusters = KMeans(min(CLUSTERS, different(embeddings)), n_init=3, random_state=seed).fit_predict(unit(embeddings))
    found, kind = np.unique(clusters, return_inverse=True)
    names = [f"cluster {i + 1}" for i in range(len(found))]
    return kind, names, f"no labels: coloured by {len(found)} k-means clusters of the embeddings"


def natural(name: str) -> tuple:
    """Numbers in their order, before words."""
    return (0, int(name), name) if name.isdecimal() else (1, 0, name)


# ---- what is written ----


def make_map(
    features: str | Path, out: list[Path], method: str = "tsne", n: int = 5000, seed: int = 0, folder: str | None = None
) -> Map:
    """A map of n random rows of `features`, written as each file of `out`, a .png or an .html.

    Args:
        folder: of the features' images, if it is not where it was. Without images the page has no pictures.
    """
    for file in out:
        if file.suffix not in WRITERS:
            raise ValueError(f"{file} must end in {' or '.join(WRITERS)}")
    if n < 4:
        raise ValueError(f"sample={n} must be at least 4: a map needs some points")
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
        with whole(file) as unfinished:
            WRITERS[file.suffix](found, source, unfinished)
        print(file)
    return found


@in_words()
def main() -> None:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m tools.map", description=__doc__, formatter_class=formatter, allow_abbrev=False
    )
    parser.add_argument("features", metavar="FILE.parquet")
    parser.add_argument("--out", type=Path, nargs="+", default=[Path("map.png"), Path("map.html")], metavar="FILE")
    parser.add_argument("--method", choices=METHODS, default="tsne")
    parser.add_argument("--sample", type=int, default=5000, metavar="N", dest="n", help="so many rows, drawn at random")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", help="of the features' images, if it is not where it was")
    make_map(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()
