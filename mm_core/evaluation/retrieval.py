"""Image-text retrieval: recall at k in both directions, as reported for Flickr30k and COCO."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float, Int

_CHUNK = 1024
RECALL_AT = (1, 5, 10)


def retrieval_metrics(
    image_features: Float[np.ndarray, "n d"], text_features: Float[np.ndarray, "m d"], image_of_text: Int[np.ndarray, "m"]
) -> dict[str, float]:
    """`t2i_rK`: the text's image is among its K nearest. `i2t_rK`: any of the image's texts is among its K nearest.

    A tie counts against the right answer, so a model that gives everything one vector finds nothing. The n x m scores are made a
    block of rows at a time.
    """
    t2i = _ranks(text_features, image_features, lambda rows: image_of_text[rows, None] == np.arange(len(image_features))[None])
    i2t = _ranks(image_features, text_features, lambda rows: rows[:, None] == image_of_text[None])
    recalls = {f"t2i_r{k}": float((t2i < k).mean()) for k in RECALL_AT}
    return recalls | {f"i2t_r{k}": float((i2t < k).mean()) for k in RECALL_AT}


def _ranks(queries: Float[np.ndarray, "q d"], targets: Float[np.ndarray, "t d"], is_right: object) -> Int[np.ndarray, "q"]:
    """For each query, how many wrong targets score at least as high as its best right one."""
    assert callable(is_right)
    ranks = []
    for start in range(0, len(queries), _CHUNK):
        rows = np.arange(start, min(start + _CHUNK, len(queries)))
        scores = queries[rows] @ targets.T
        right: Bool[np.ndarray, "q t"] = is_right(rows)
        best = np.where(right, scores, -np.inf).max(axis=1, keepdims=True)
        ranks.append(((scores >= best) & ~right).sum(axis=1))
    return np.concatenate(ranks)
