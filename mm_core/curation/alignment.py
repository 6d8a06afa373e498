"""Whether two thumbnails are of one picture: their correlation, the best over crops of either.

A hash of 64 bits says that two pictures may be the same; among billions many pairs agree by chance. A thumbnail of 16x16 tells them
apart, once it is laid on the other as a crop of up to a tenth lies on its original. Correlation ignores brightness and contrast.
"""

from __future__ import annotations

from itertools import product

import numpy as np
from jaxtyping import Float32, Int64, UInt8

from mm_core.curation.picture_hash import THUMBNAIL

SAME = 0.9
"""Correlation of copies. Measured on 6,000 photos: copies have 0.9 and more, of a crop of a twentieth on every side; what the hashes alone
take for copies, 0.9 and less, but for pictures of one moment."""
_HOPELESS = 0.3
"""Below this as they are, crops are not tried: copies have 0.6 and more."""
_SCALES = (0.95, 0.9)
_PLACES = (0.0, 0.5, 1.0)
_BLOCK = 4096
Thumbnails = UInt8[np.ndarray, "n 16 16"]


def aligned_correlation(one: Thumbnails, other: Thumbnails) -> Float32[np.ndarray, " n"]:
    """Of each pair, to four digits, so that a comparison with a bound comes out the same on every processor."""
    if not len(one):
        return np.zeros(0, dtype=np.float32)
    return np.concatenate([_block(one[at : at + _BLOCK], other[at : at + _BLOCK]) for at in range(0, len(one), _BLOCK)])


def _block(one: Thumbnails, other: Thumbnails) -> Float32[np.ndarray, " n"]:
    a, b = one.astype(np.float32), other.astype(np.float32)
    best = _correlation(a, b)
    unsure = np.flatnonzero((best > _HOPELESS) & (best < SAME))
    a, b = a[unsure], b[unsure]
    for rows, columns in _CROPS:
        found = np.maximum(_correlation(rows @ a @ columns.T, b), _correlation(a, rows @ b @ columns.T))
        best[unsure] = np.maximum(best[unsure], found)
    return np.round(best, 4)


def _correlation(a: Float32[np.ndarray, "n h w"], b: Float32[np.ndarray, "n h w"]) -> Float32[np.ndarray, " n"]:
    a, b = (x.reshape(len(x), THUMBNAIL**2) - x.mean(axis=(1, 2), dtype=np.float64).astype(np.float32)[:, None] for x in (a, b))
    norms = np.sqrt(np.einsum("nd,nd->n", a, a) * np.einsum("nd,nd->n", b, b))
    return np.einsum("nd,nd->n", a, b) / np.maximum(norms, np.float32(1e-6))


def _resampling(start: float, length: float) -> Float32[np.ndarray, "16 16"]:
    """What takes [start, start + length] of 0 to 1 to the whole: each new cell is the mean of the old ones under it."""
    edges = (start + length * np.linspace(0, 1, THUMBNAIL + 1)) * THUMBNAIL
    cells = np.arange(THUMBNAIL)
    overlap = np.minimum(edges[1:, None], cells + 1) - np.maximum(edges[:-1, None], cells)
    return (overlap.clip(0) / overlap.clip(0).sum(axis=1, keepdims=True)).astype(np.float32)


_CROPS = [
    (_resampling((1 - scale) * down, scale), _resampling((1 - scale) * across, scale))
    for scale in _SCALES
    for down, across in product(_PLACES, _PLACES)
]


def leaders(thumbnails: Thumbnails, most: int) -> Int64[np.ndarray, " n"]:
    """For each the place of the first picture that it is the same as, its leader, itself where it leads; of pictures that more than
    `most` leaders lead, -1 for what none of those leads. Linear in the pictures, where all pairs are quadratic."""
    leader = np.full(len(thumbnails), -1)
    left = np.arange(len(thumbnails))
    for _ in range(most):
        if not len(left):
            break
        same = aligned_correlation(np.repeat(thumbnails[left[:1]], len(left), axis=0), thumbnails[left]) >= np.float32(SAME)
        same[0] = True
        leader[left[same]] = left[0]
        left = left[~same]
    return leader
