"""From embeddings to points of the plane and their colours: what a map shows."""

import numpy as np
import torch
from rich.console import Console
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE

import numerics

CLUSTERS = 10  # where there are no labels
NO_LABEL = "no label"


def unit(x: np.ndarray) -> np.ndarray:
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
    x = unit(embeddings)
    if (n := different(x)) < 4:
        raise ValueError(f"a map needs at least 4 different images, and there are {n} (those of one direction are one)")
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
    x = unit(embeddings)
    clusters = KMeans(min(CLUSTERS, different(x)), n_init=3, random_state=seed).fit_predict(x)
    found, kind = np.unique(clusters, return_inverse=True)
    names = [f"cluster {i + 1}" for i in range(len(found))]
    return kind, names, f"no labels: coloured by {len(found)} k-means clusters of the embeddings"


def natural(name: str) -> tuple:
    """Numbers in their order, before words."""
    return (0, int(name), name) if name.isdecimal() else (1, 0, name)
