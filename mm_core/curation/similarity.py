"""How well a sample's picture and its captions fit, by a model's features: any number of captions to a picture.

Some pictures and captions are similar to all others, by a weak model most of all. What a pair's similarity is worth shows beside those that
its picture has with other captions, and its captions with other pictures: of reference samples, which the same model sees.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Float32, Int, UInt64
from scipy.special import logsumexp


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
    """Samples beside which others are seen: features of their pictures, and of a caption of each; L2-normalised."""

    ordinals: UInt64[np.ndarray, " r"]
    images: Float32[np.ndarray, "r d"]
    texts: Float32[np.ndarray, "r d"]

    def beside(self, ordinals: UInt64[np.ndarray, " n"], scale: float) -> Beside:
        """For some samples, by a model of this logit scale."""
        return Beside(self, ordinals[:, None] != self.ordinals, scale)


@dataclass(frozen=True)
class Beside:
    """References of each of n samples: all but the sample itself."""

    references: References
    others: Bool[np.ndarray, "n r"]
    scale: float

    def relative(
        self, images: Float[np.ndarray, "n d"], texts: Float[np.ndarray, "captions d"], owners: Int[np.ndarray, " captions"]
    ) -> Float[np.ndarray, " captions"]:
        """Cosines of pictures and captions less a soft maximum, at the model's own scale, of what they are with the references: a pair's
        negative contrastive loss, in units of the cosine (negCLIPLoss, Wang et al. 2024, arXiv 2405.19547)."""
        of_images = self._soft_maximum(images @ self.references.texts.T, self.others)
        of_texts = self._soft_maximum(texts @ self.references.images.T, self.others[owners])
        return np.einsum("cd,cd->c", images[owners], texts) - (of_images[owners] + of_texts) / 2

    def _soft_maximum(self, cosines: Float[np.ndarray, "m r"], others: Bool[np.ndarray, "m r"]) -> Float[np.ndarray, " m"]:
        """Of a row without others -1, the least a cosine can be."""
        there = others.any(axis=1)
        found = np.full(len(cosines), -1.0)
        weighed = np.where(others[there], self.scale * cosines[there], -np.inf)
        found[there] = (logsumexp(weighed, axis=1) - np.log(others[there].sum(axis=1))) / self.scale
        return found


def similarities(
    images: Float[np.ndarray, "n d"], texts: Float[np.ndarray, "captions d"], owners: Int[np.ndarray, " captions"], beside: Beside
) -> Similarities:
    """Cosines of pictures and their captions.

    Args:
        images, texts: L2-normalised.
        owners: the picture of each caption, ascending; each picture has one caption at least.
    """
    cosines = np.einsum("cd,cd->c", images[owners], texts)
    first = np.searchsorted(owners, np.arange(len(images)))
    means = _means(np.stack([cosines, beside.relative(images, texts, owners)], axis=1), owners, first)
    return Similarities(means[:, 0], np.minimum.reduceat(cosines, first), means[:, 1])


def mean_texts(texts: Float[np.ndarray, "captions d"], owners: Int[np.ndarray, " captions"], count: int) -> Float[np.ndarray, "n d"]:
    """Of each of `count` samples the mean of its captions' features, L2-normalised."""
    means = _means(texts, owners, np.searchsorted(owners, np.arange(count)))
    return means / np.maximum(np.linalg.norm(means, axis=1, keepdims=True), 1e-12)


def _means(
    values: Float[np.ndarray, "captions d"], owners: Int[np.ndarray, " captions"], first: Int[np.ndarray, " n"]
) -> Float[np.ndarray, "n d"]:
    return np.add.reduceat(values, first) / np.bincount(owners, minlength=len(first))[:, None].astype(values.dtype)
