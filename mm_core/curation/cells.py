"""Vectors that are nearly the same, looked for cell by cell: k-means cells, then all pairs inside each (SemDeDup, Abbas et al. 2023).

Each vector is in the cells of its two nearest centres, so that a pair that a border divides is found too. Vectors have length 1; what
is the same is cosine similarity.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from jaxtyping import Float, Float32, Int64
from numpy.typing import NDArray

from mm_core.data.permutation import mix

CELL_VECTORS = 2048
"""Vectors of a cell on average: what comparing them costs then is like finding their cell among all."""
NEAREST = 2
_MOST_CELLS = 1 << 15
_SAMPLE = 1 << 17
_ROUNDS = 10
_BLOCK = 4096
_LARGEST = 1 << 15
"""Of a larger cell each vector is compared with that many of those that are about as near to the centre as it is, and no more."""
Vectors = Float32[np.ndarray, "n d"]


def cells_for(vectors: int) -> int:
    return max(1, min(_MOST_CELLS, -(-vectors // CELL_VECTORS)))


def sampled(ids: NDArray[np.int64], of: int) -> NDArray[np.bool_]:
    """Which ids are in a sample of at most some 131,072 of `of`: by the id alone."""
    if of <= _SAMPLE:
        return np.ones(len(ids), dtype=bool)
    return mix(0, 7, ids.astype(np.uint64)) < np.uint64(int(_SAMPLE / of * 2**64))


def centres(sample: Vectors, count: int) -> Vectors:
    """Spherical k-means (Dhillon and Modha 2001) from vectors at equal distances in the sample. A centre that loses all of its vectors
    stays where it is."""
    found = sample[np.linspace(0, len(sample) - 1, count).astype(np.int64)].copy()
    for _ in range(_ROUNDS if count > 1 else 1):
        own = nearest(sample, found)[:, 0]
        sums = np.zeros_like(found)
        np.add.at(sums, own, sample)
        norms = np.linalg.norm(sums, axis=1, keepdims=True)
        found = np.where(norms > 0, sums / np.maximum(norms, 1e-12), found)
    return found


def nearest(vectors: Vectors, cells: Vectors) -> Int64[np.ndarray, "n k"]:
    """The cells of each vector: of its two nearest centres, or of the only one."""
    count = min(NEAREST, len(cells))
    found = np.empty((len(vectors), count), dtype=np.int64)
    for at in range(0, len(vectors), _BLOCK):
        closeness = np.round(vectors[at : at + _BLOCK] @ cells.T, 4)
        for place in range(count):
            best = closeness.argmax(axis=1)
            found[at : at + _BLOCK, place] = best
            closeness[np.arange(len(best)), best] = -2
    return found


def similar_pairs(
    vectors: Float[np.ndarray, "n d"], ours: NDArray[np.bool_], theirs: NDArray[np.bool_], similarity: float
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Of one cell: places of pairs, one of `ours` and one of `theirs`, whose cosine is at least `similarity`, some at a time.

    Cosines are rounded to four digits first, so that a comparison comes out the same on every processor.
    """
    centre = vectors.astype(np.float32).mean(axis=0)
    order = np.argsort(np.round(vectors.astype(np.float32) @ centre, 4), kind="stable") if is_cut(len(vectors)) else np.arange(len(vectors))
    block = min(_BLOCK, _LARGEST // 2)
    for at in range(0, len(vectors), block):
        rows = order[at : at + block]
        around = order[max(0, at - _LARGEST // 2) : at + block + _LARGEST // 2] if is_cut(len(vectors)) else order
        rows, columns = rows[ours[rows]], around[theirs[around]]
        for start in range(0, len(columns), block):
            some = columns[start : start + block]
            cosines = np.round(vectors[rows].astype(np.float32) @ vectors[some].astype(np.float32).T, 4)
            first, second = np.nonzero(cosines >= np.float32(similarity))
            yield rows[first], some[second]


def is_cut(size: int) -> bool:
    return size > _LARGEST
