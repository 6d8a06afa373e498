"""Where drawn samples lie among one another by their embeddings: a map in two dimensions, and clusters.

The map is t-SNE (van der Maaten and Hinton 2008), started at the two directions along which the embeddings vary most, so that near is near
and most of the whole's shape is kept; clusters are k-means of the embeddings themselves, not of the map. Distances between far points, and
the size of an island, mean little.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Float32, Int

from mm_core.curation.score_rules import embedded_by
from mm_core.data.index import Index
from mm_core.data.scores import Scores
from mm_core.errors import ConfigError
from pipelines.curate.report.draw import Drawn

_COLUMN = "image"
_MIN_POINTS = 12
_DIRECTIONS = 50
"""That the embeddings are reduced to before t-SNE, as its authors do."""
_POINTS_OF_A_CLUSTER = 40
MAX_CLUSTERS = 8
"""As many as have colours that can be told apart."""


@dataclass(frozen=True)
class EmbeddingMap:
    """Drawn samples that have an embedding; empty where too few have one."""

    points: tuple[Drawn, ...]
    positions: Float[np.ndarray, "points 2"]
    """From 0 to 1."""
    clusters: Int[np.ndarray, " points"]
    """Numbered by size, the largest 0."""
    typical: tuple[int, ...]
    """Of each cluster the point next to its centre."""
    without: int
    """Drawn samples that have no embedding."""


def embedding_map(index: Index, name: str, drawn: Sequence[Drawn], seed: int) -> EmbeddingMap:
    """Of the scores `name`, of whose files only those are read that hold a drawn sample, one at a time.

    Raises:
        DataError: they are damaged.
    """
    vectors = _vectors(index, name, [point.ordinal for point in drawn])
    points = tuple(point for point in drawn if point.ordinal in vectors)
    without = len(drawn) - len(points)
    if len(points) < _MIN_POINTS:
        return EmbeddingMap((), np.zeros((0, 2)), np.zeros(0, dtype=np.int64), (), len(drawn))
    embeddings = np.stack([vectors[point.ordinal] for point in points])
    clusters, typical = _clusters(embeddings, seed)
    return EmbeddingMap(points, positions(embeddings, seed), clusters, typical, without)


def check_embeddings(index: Index, name: str) -> None:
    """
    Raises:
        DataError: there are no such scores, or they are not finished.
        ConfigError: they are no embeddings of pictures.
    """
    if _COLUMN not in Scores(index, name).complete(embedded_by(name)).vectors:
        raise ConfigError(
            f"scores {name!r} of {index.url} hold no embeddings of pictures; make some: mm data score {index.url} {embedded_by('NAME')}"
        )


def _vectors(index: Index, name: str, ordinals: Sequence[int]) -> dict[int, Float32[np.ndarray, " d"]]:
    """By ordinal; a sample without one is left out."""
    values = Scores(index, name).values
    wanted, found = np.sort(np.array(ordinals, dtype=np.int64)), dict[int, Float32[np.ndarray, " d"]]()
    for chunk in range(len(values)):
        first, last = values.bounds(chunk)
        some = wanted[np.searchsorted(wanted, first) : np.searchsorted(wanted, last)]
        if not len(some):
            continue
        vectors = values.read(chunk, [_COLUMN])[_COLUMN].take(some - first).to_pylist()
        for ordinal, vector in zip(some.tolist(), vectors, strict=True):
            if vector is not None:
                found[ordinal] = np.frombuffer(vector, dtype="<f2").astype(np.float32)
    return found


def positions(embeddings: Float32[np.ndarray, "n d"], seed: int) -> Float[np.ndarray, "n 2"]:
    """On a plane, from 0 to 1; of three at least."""
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    directions = min(_DIRECTIONS, *embeddings.shape)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of embeddings that are all alike
        reduced = PCA(directions, svd_solver="full").fit_transform(embeddings)
        perplexity = min(30.0, (len(embeddings) - 1) / 3)
        start = reduced[:, :2] / max(float(reduced[:, 0].std()), 1e-9) * 1e-4
        found = TSNE(perplexity=perplexity, init=start.astype(np.float32), learning_rate="auto", random_state=seed).fit_transform(reduced)
    low, high = found.min(axis=0), found.max(axis=0)
    return np.asarray((found - low) / np.maximum(high - low, 1e-9))


def _clusters(embeddings: Float32[np.ndarray, "n d"], seed: int) -> tuple[Int[np.ndarray, " n"], tuple[int, ...]]:
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    count = max(1, min(MAX_CLUSTERS, len(embeddings) // _POINTS_OF_A_CLUSTER))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # of fewer different embeddings than clusters
        found = KMeans(count, n_init=4, random_state=seed).fit(embeddings)
    sizes = np.bincount(found.labels_, minlength=count)
    order = np.argsort(-sizes, kind="stable")[: int((sizes > 0).sum())]
    numbers = np.empty(count, dtype=np.int64)
    numbers[order] = np.arange(len(order))
    distances = np.linalg.norm(embeddings - found.cluster_centers_[found.labels_], axis=1)
    typical = tuple(int(np.flatnonzero(found.labels_ == n)[np.argmin(distances[found.labels_ == n])]) for n in order)
    return numbers[found.labels_], typical
