"""The nearest neighbours among embeddings, and how a contact sheet shows them."""

from collections.abc import Iterable

import numpy as np
from attrs import frozen
from PIL import Image

from tools.contact_sheet import LEAD, OTHER, SAME, SIDE, Tile
from tools.image_sources import Source
from tools.projection import unit

Piece = tuple[list[str], np.ndarray, list[str | None]]  # paths, embeddings [n, E], labels


@frozen
class Neighbour:
    path: str
    label: str | None
    cosine: float


def best_of(
    pieces: Iterable[Piece], queries: np.ndarray, k: int, own: list[str | None] | None = None
) -> list[list[Neighbour]]:
    """The k rows of all pieces with the largest cosine to each query [Q, E], the nearest first; without the row whose
    path is that of `own`."""
    if k < 1:
        raise ValueError(f"k={k} must be at least 1")
    best: list[list[Neighbour]] = [[] for _ in queries]
    queries = unit(queries)
    for paths, embeddings, labels in pieces:
        cosines = (queries @ unit(embeddings).T).clip(-1, 1)
        for i, cosine in enumerate(cosines):
            top = np.argsort(-cosine, kind="stable")[: k + 1]  # one more than k, for the own row
            found = (Neighbour(paths[j], labels[j], float(cosine[j])) for j in top)
            found = best[i] + [neighbour for neighbour in found if own is None or neighbour.path != own[i]]
            best[i] = sorted(found, key=lambda neighbour: -neighbour.cosine)[:k]
    return best


@frozen
class Query:
    name: str
    embedding: np.ndarray
    picture: Image.Image
    own: str | None = None  # path of its row
    label: str | None = None


def tiles(query: Query, found: list[Neighbour], source: Source) -> tuple[Tile, list[Tile]]:
    """A neighbour's frame says whether its label is the query's, where both have one."""
    lead = Tile(query.picture, "query", "", (query.label, query.name) if query.label else (query.name,), LEAD)
    row = []
    for i, n in enumerate(found, start=1):
        colour = (SAME if n.label == query.label else OTHER) if n.label and query.label else None
        lines = (n.label, n.path) if n.label else (n.path,)
        row.append(Tile(source.picture(n.path, side=SIDE), str(i), f"{n.cosine:.3f}", lines, colour))
    return lead, row
