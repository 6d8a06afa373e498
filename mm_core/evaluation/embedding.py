"""The geometry of two modalities in one space: what tells a good space from a collapsed one where a loss alone does not."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

_BLOCK_SCORES = 1 << 22
"""Distances held at a time: 32 MB, whatever the number of samples."""
_TEMPERATURE = 2.0


def embedding_statistics(images: Float[np.ndarray, "n d"], texts: Float[np.ndarray, "n d"]) -> dict[str, float]:
    """All of this module of n pairs of L2-normalised features; what needs two samples is left out of one."""
    found = {
        "alignment": alignment(images, texts),
        "modality_gap": modality_gap(images, texts),
        "effective_rank_image": effective_rank(images),
        "effective_rank_text": effective_rank(texts),
    }
    if len(images) > 1:
        found |= {"uniformity_image": uniformity(images), "uniformity_text": uniformity(texts)}
    return found


def alignment(images: Float[np.ndarray, "n d"], texts: Float[np.ndarray, "n d"]) -> float:
    """The mean squared distance of the pairs, from 0 to 4; lower is better (Wang and Isola 2020, arXiv 2005.10242, with alpha = 2)."""
    return float(np.square(images.astype(np.float64) - texts).sum(axis=1).mean())


def uniformity(features: Float[np.ndarray, "n d"]) -> float:
    """The logarithm of the mean of exp(-2 distance²) over all pairs of different samples: 0 where all are one point, about
    -4 where they are spread over the sphere; lower is better (Wang and Isola 2020, with t = 2)."""
    rows, total = features.astype(np.float64), 0.0
    squares = np.square(rows).sum(axis=1)
    step = max(1, _BLOCK_SCORES // len(rows))
    for start in range(0, len(rows), step):
        block = slice(start, start + step)
        distances = squares[block, None] + squares - 2 * rows[block] @ rows.T
        total += float(np.exp(-_TEMPERATURE * distances.clip(min=0)).sum())
    return float(np.log((total - len(rows)) / (len(rows) * (len(rows) - 1))))  # without the n of each with itself


def modality_gap(images: Float[np.ndarray, "n d"], texts: Float[np.ndarray, "n d"]) -> float:
    """The distance of the modalities' means, from 0 to 2 (Liang et al. 2022, arXiv 2203.02053)."""
    return float(np.linalg.norm(images.mean(axis=0, dtype=np.float64) - texts.mean(axis=0, dtype=np.float64)))


def effective_rank(features: Float[np.ndarray, "n d"]) -> float:
    """exp of the entropy of the singular values as shares of their sum: from 1 to min(n, d) (Roy and Vetterli 2007; of features
    RankMe, Garrido et al. 2023, arXiv 2210.02885)."""
    rows = features.astype(np.float64)
    singular = np.sqrt(np.linalg.eigvalsh(rows.T @ rows).clip(min=0))  # d x d, whatever n
    shares = singular / singular.sum()
    shares = shares[shares > 0]
    return float(np.exp(-(shares * np.log(shares)).sum()))
