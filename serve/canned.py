"""The canned query: what a version must answer sensibly before it is asked anything else."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from mm_core.errors import BundleError
from serve.encoded import Encoded
from serve.facts import Facts
from serve.inputs import Picture

_TEXTS = ("a photo of a cat", "two blue squares on a white ground")
_TOLERANCE = 1e-3
_SAME = 1e-7


def canned_inputs() -> list[str | Picture]:
    """Two texts, a PNG of noise, a JPEG of a gradient."""
    noise = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    gradient = np.repeat(np.linspace(0, 255, 64, dtype=np.uint8)[None, :, None], 48, axis=0).repeat(3, axis=2)
    return [*_TEXTS, _picture(noise, "PNG"), _picture(gradient, "JPEG")]


def judge(answer: object, facts: Facts) -> None:
    """
    Raises:
        BundleError: the features are not what any working model would give: numbers, of length 1, different for different inputs.
    """
    if not isinstance(answer, Encoded):
        raise BundleError(f"the canned query was refused: {answer}")
    features = answer.features
    if features.shape != (4, facts.embed_dim):
        raise BundleError(f"the canned query of 4 inputs gave features of shape {features.shape}, not (4, {facts.embed_dim})")
    if not np.isfinite(features).all():
        raise BundleError("the canned query gave features that are no numbers: the weights are damaged, or training diverged")
    if (np.abs(np.linalg.norm(features, axis=1) - 1) > _TOLERANCE).any():
        raise BundleError("the canned query gave features that are not of length 1")
    for one, other, kind in ((0, 1, "texts"), (2, 3, "pictures")):
        if np.abs(features[one] - features[other]).max() < _SAME:
            raise BundleError(f"the canned query gave two different {kind} one vector: the model tells nothing apart")


def _picture(pixels: np.ndarray, kind: str) -> Picture:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return Picture(buffer.getvalue())
