"""What a picture looks like, in few bytes: hashes by which copies are found, and a thumbnail by which they are compared.

The hash is pHash (Zauner 2010): 32x32 of luma, its discrete cosine transform, and of the 63 lowest frequencies beside the mean which lie
above their median. Scaling, compression and brightness turn few of its bits; a crop turns many, 4 to 10 where a twentieth of each side is
gone. So five crops are hashed besides the whole: the copy's whole picture is one of the original's crops, nearly.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, UInt8, UInt64
from PIL import Image

from mm_core.data.image import decode_luma

VERSION = 1
HASHES = 6
"""The whole picture, then crops of 95 % of each side: from the middle and from the four corners."""
THUMBNAIL = 16
LEAST_CONTRAST = 4.0
"""Grey levels. What has less is a plain surface, whose hash would be of its noise."""
_CROP = 0.95
_CORNERS = ((0.5, 0.5), (0.0, 0.0), (0.0, 1.0), (1.0, 0.0), (1.0, 1.0))
_SIDE, _KEPT = 32, 8
_DECODED_SIDE = 64


@dataclass(frozen=True)
class PictureHash:
    digest: bytes
    """128 bits of SHA-256 of the picture's own bytes: the same file, whatever text goes with it."""
    hashes: UInt64[np.ndarray, " kinds"]
    thumbnail: UInt8[np.ndarray, "16 16"]
    contrast: float
    """Standard deviation of the thumbnail, grey levels."""


def hash_picture(data: bytes) -> PictureHash:
    """
    Raises:
        SampleProblem: the picture cannot be decoded.
    """
    luma = Image.fromarray(np.ascontiguousarray(decode_luma(data, _DECODED_SIDE)))
    whole = (0.0, 0.0, float(luma.width), float(luma.height))
    crops = [_crop(luma.width, luma.height, *corner) for corner in _CORNERS]
    scaled = [np.asarray(luma.resize((_SIDE, _SIDE), Image.Resampling.BILINEAR, box=box)) for box in (whole, *crops)]
    thumbnail = np.asarray(luma.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX))
    return PictureHash(hashlib.sha256(data).digest()[:16], dct_hashes(np.stack(scaled)), thumbnail, float(thumbnail.std()))


def dct_hashes(luma: UInt8[np.ndarray, "n 32 32"]) -> UInt64[np.ndarray, " n"]:
    """Coefficients are rounded to hundredths of a grey level first: a symmetrical drawing has many that are 0, and which side of the
    median those fall on must not depend on a processor's last digit."""
    coefficients = np.round(_BASIS @ luma.astype(np.float64) @ _BASIS.T, 2).reshape(len(luma), -1)[:, 1:]
    above = coefficients > np.median(coefficients, axis=1, keepdims=True)
    return np.packbits(np.pad(above, ((0, 0), (0, 1))), axis=1).view(">u8")[:, 0].astype(np.uint64)


def _basis() -> Float[np.ndarray, "8 32"]:
    """The lowest frequencies of the orthonormal DCT-II, scaled so that coefficients are in grey levels."""
    frequency, place = np.arange(_KEPT)[:, None], np.arange(_SIDE)[None]
    return np.cos(np.pi * frequency * (2 * place + 1) / (2 * _SIDE)) * np.where(frequency == 0, 1, np.sqrt(2)) / _SIDE


_BASIS = _basis()


def _crop(width: int, height: int, across: float, down: float) -> tuple[float, float, float, float]:
    left, top = width * (1 - _CROP) * across, height * (1 - _CROP) * down
    return left, top, left + width * _CROP, top + height * _CROP
