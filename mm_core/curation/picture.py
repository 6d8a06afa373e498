"""What is measured of a picture's pixels."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8

from mm_core.data.image import decode_luma

SIDE = 256
"""Pictures are measured with their shorter side at most this long: so that a threshold means the same for large and small ones, and a
large JPEG need not be decoded whole."""


class PictureScores(NamedTuple):
    """The columns of `mm data score INDEX image`."""

    sharpness: float
    information: float


def measure_picture(data: bytes) -> PictureScores:
    """
    Raises:
        SampleProblem: the picture cannot be decoded.
    """
    luma = decode_luma(data, SIDE)
    return PictureScores(sharpness(luma), information(luma))


def sharpness(luma: UInt8[np.ndarray, "h w"]) -> float:
    """The variance of the Laplacian (Pech-Pacheco et al. 2000): 0 of a plain surface, below about 100 of what looks blurred."""
    if min(luma.shape) < 3:
        return 0.0
    x = luma.astype(np.float32)
    laplacian = x[:-2, 1:-1] + x[2:, 1:-1] + x[1:-1, :-2] + x[1:-1, 2:] - 4 * x[1:-1, 1:-1]
    return float(laplacian.var())


def information(luma: UInt8[np.ndarray, "h w"]) -> float:
    """The entropy of the histogram (Shannon 1948), bits: 0 of one plain colour, 8 where all 256 levels are as frequent."""
    counts = np.bincount(luma.reshape(-1), minlength=256)
    shares = counts[counts > 0] / luma.size
    return float(-(shares * np.log2(shares)).sum())
