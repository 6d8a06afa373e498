"""How well a sample's picture and its captions fit, by a model's features: any number of captions to a picture.

Some pictures and captions are similar to all others, by a weak model most of all. What a pair's similarity is worth shows beside those that
its picture has with other captions, and its captions with other pictures: of reference samples, which the same model sees.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float32, Int
from scipy.special import logsumexp

_SAME = 0.9999
"""Cosine of a picture, or a caption, with itself: it is no other one."""


class Similarities(NamedTuple):
    """Columns of `mm data score INDEX similarity`."""

    similarity: Float[np.ndarray, " n"]
    """The mean over a sample's captions."""
    similarity_lowest: Float[np.ndarray, " n"]
    """The caption that fits worst: training may draw it."""
    similarity_relative: Float[np.ndarray, " n"]
    """The mean over a sample's captions, relative to the references: 0 where others fit as well."""


@dataclass(frozen=True)
class References:
    """Features of some samples, a caption of each; L2-normalised."""

    images: Float32[np.ndarray, "r d"]
    texts: Float32[np.ndarray, "r d"]

    def relative(
        self,
        images: Float[np.ndarray, "n d"],
        texts: Float[np.ndarray, "captions d"],
        owners: Int[np.ndarray, " captions"],
        scale: float,
    ) -> Float[np.ndarray, " captions"]:
        """Cosines of pictures and captions less what they are with the references, a soft maximum at the model's own scale: the negative
        contrastive loss of a pair, in units of the cosine (negCLIPLoss, Wang et al. 2024, arXiv 2405.19547)."""
        others = _soft_maximum(images @ self.texts.T, images @ self.images.T, scale)[owners]
        others += _soft_maximum(texts @ self.images.T, texts @ self.texts.T, scale)
        return np.einsum("cd,cd->c", images[owners], texts) - others / 2


def _soft_maximum(cosines: Float[np.ndarray, "n r"], itself: Float[np.ndarray, "n r"], scale: float) -> Float[np.ndarray, " n"]:
    """Over references that are not the row itself, whose cosines with it on its own side are `itself`."""
    others = itself < _SAME
    counts = np.maximum(1, others.sum(axis=1))
    return (logsumexp(np.where(others, scale * cosines, -np.inf), axis=1) - np.log(counts)) / scale


def similarities(
    images: Float[np.ndarray, "n d"],
    texts: Float[np.ndarray, "captions d"],
    owners: Int[np.ndarray, " captions"],
    references: References,
    scale: float,
) -> Similarities:
    """Cosines of pictures and their captions.

    Args:
        images, texts: L2-normalised.
        owners: the picture of each caption, ascending; each picture has one caption at least.
        scale: the model's logit scale.
    """
    cosines = np.einsum("cd,cd->c", images[owners], texts)
    relative = references.relative(images, texts, owners, scale)
    first = np.searchsorted(owners, np.arange(len(images)))
    means = _means(np.stack([cosines, relative], axis=1), owners, first)
    return Similarities(means[:, 0], np.minimum.reduceat(cosines, first), means[:, 1])


def mean_texts(texts: Float[np.ndarray, "captions d"], owners: Int[np.ndarray, " captions"], count: int) -> Float[np.ndarray, "n d"]:
    """Of each of `count` samples the mean of its captions' features, L2-normalised."""
    means = _means(texts, owners, np.searchsorted(owners, np.arange(count)))
    return means / np.maximum(np.linalg.norm(means, axis=1, keepdims=True), 1e-12)


def _means(
    values: Float[np.ndarray, "captions d"], owners: Int[np.ndarray, " captions"], first: Int[np.ndarray, " n"]
) -> Float[np.ndarray, "n d"]:
    return np.add.reduceat(values, first) / np.bincount(owners, minlength=len(first))[:, None].astype(values.dtype)
