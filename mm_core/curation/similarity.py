"""How well a sample's picture and its captions fit, by a model's features: any number of captions to a picture."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int


class Similarities(NamedTuple):
    """Columns of `mm data score INDEX similarity`."""

    similarity: Float[np.ndarray, " n"]
    """The mean over a sample's captions."""
    similarity_lowest: Float[np.ndarray, " n"]
    """The caption that fits worst: training may draw it."""


def similarities(
    images: Float[np.ndarray, "n d"], texts: Float[np.ndarray, "captions d"], owners: Int[np.ndarray, " captions"]
) -> Similarities:
    """Cosines of pictures and their captions.

    Args:
        images, texts: L2-normalised.
        owners: the picture of each caption, ascending; each picture has one caption at least.
    """
    cosines = np.einsum("cd,cd->c", images[owners], texts)
    first = np.searchsorted(owners, np.arange(len(images)))
    return Similarities(_means(cosines[:, None], owners, first)[:, 0], np.minimum.reduceat(cosines, first))


def mean_texts(texts: Float[np.ndarray, "captions d"], owners: Int[np.ndarray, " captions"], count: int) -> Float[np.ndarray, "n d"]:
    """Of each of `count` samples the mean of its captions' features, L2-normalised."""
    means = _means(texts, owners, np.searchsorted(owners, np.arange(count)))
    return means / np.maximum(np.linalg.norm(means, axis=1, keepdims=True), 1e-12)


def _means(
    values: Float[np.ndarray, "captions d"], owners: Int[np.ndarray, " captions"], first: Int[np.ndarray, " n"]
) -> Float[np.ndarray, "n d"]:
    return np.add.reduceat(values, first) / np.bincount(owners, minlength=len(first))[:, None].astype(values.dtype)
