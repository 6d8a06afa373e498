"""Image-text retrieval: recall at k in both directions, as reported for Flickr30k and COCO."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from jaxtyping import Bool, Float, Int

from mm_core.errors import DataError

RECALL_AT = (1, 5, 10)
_BLOCK_SCORES = 1 << 22
"""Scores held at a time: 16 MB, whatever the number of images and texts."""


def retrieval_metrics(
    image_features: Float[np.ndarray, "n d"], text_features: Float[np.ndarray, "m d"], image_of_text: Int[np.ndarray, " m"]
) -> dict[str, float]:
    """`t2i_rK`: the text's image is among its K nearest. `i2t_rK`: any of the image's texts is among its K nearest.

    A tie counts against the right answer, as does a score that is not a number: a model that gives everything one vector, or
    NaN, finds nothing. An image without texts is no query, but stays among the targets.

    Raises:
        DataError: there are no texts.
    """
    if not len(text_features):
        raise DataError("retrieval needs captions, and there are none: give shards with .txt members or a caption in their .json")
    queries = np.unique(image_of_text)
    assert queries[0] >= 0, "a text without an image"
    assert queries[-1] < len(image_features), "a text of an image that is not there"
    columns = np.arange(len(image_features))
    t2i = _ranks(text_features, image_features, lambda rows: image_of_text[rows][:, None] == columns)
    i2t = _ranks(image_features[queries], text_features, lambda rows: queries[rows][:, None] == image_of_text)
    recalls = {f"t2i_r{k}": float((t2i < k).mean()) for k in RECALL_AT}
    return recalls | {f"i2t_r{k}": float((i2t < k).mean()) for k in RECALL_AT}


def _ranks(
    queries: Float[np.ndarray, "q d"], targets: Float[np.ndarray, "t d"], is_right: Callable[[slice], Bool[np.ndarray, "rows t"]]
) -> Int[np.ndarray, " q"]:
    """For each query, how many wrong targets do not score below its best right one. `is_right` is asked for blocks of queries."""
    ranks = []
    step = max(1, _BLOCK_SCORES // len(targets))
    for start in range(0, len(queries), step):
        rows = slice(start, start + step)
        scores, right = queries[rows] @ targets.T, is_right(rows)
        best = np.where(right, scores, -np.inf).max(axis=1, keepdims=True)
        ranks.append((~(scores < best) & ~right).sum(axis=1))
    return np.concatenate(ranks)
