from __future__ import annotations

import io

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageEnhance
from scipy.fft import dctn

from mm_core.curation.alignment import SAME, aligned_correlation, leaders
from mm_core.curation.picture_hash import HASHES, LEAST_CONTRAST, PictureHash, dct_hashes, hash_picture
from mm_core.data.problems import SampleProblem


def drawn(seed: int, side: int = 160) -> Image.Image:
    """A picture with shapes of many sizes."""
    rng = np.random.default_rng(seed)
    layers = [
        np.asarray(
            Image.fromarray(rng.normal(0, 60 / size**0.5, (size, size)).astype(np.float32)).resize((side, side), Image.Resampling.BICUBIC)
        )
        for size in (3, 6, 12, 24)
    ]
    return Image.fromarray((128 + sum(layers)).clip(0, 255).astype(np.uint8)).convert("RGB")


def saved(image: Image.Image, quality: int = 90) -> bytes:
    data = io.BytesIO()
    image.save(data, "JPEG", quality=quality)
    return data.getvalue()


def test_the_hash_is_the_sign_of_the_lowest_frequencies() -> None:
    luma = np.random.default_rng(0).integers(0, 256, (5, 32, 32), dtype=np.uint8)
    expected = dctn(luma.astype(np.float64), axes=(1, 2))[:, :8, :8] * 1.0
    # scipy's unnormalised transform has its first row and column √2 larger than an orthonormal one.
    expected[:, 0] /= np.sqrt(2)
    expected[:, :, 0] /= np.sqrt(2)
    flat = expected.reshape(5, 64)[:, 1:]
    bits = flat > np.median(flat, axis=1, keepdims=True)
    assert [f"{value:064b}"[:63] for value in dct_hashes(luma).tolist()] == ["".join(map(str, row)) for row in bits.astype(int)]


CHANGES = {
    "smaller": lambda image: saved(image.resize((80, 80))),
    "compressed": lambda image: saved(image, 30),
    "darker": lambda image: saved(ImageEnhance.Brightness(image).enhance(0.8)),
    "cropped": lambda image: saved(image.crop((8, 3, 160, 155))),
}


def near(one: PictureHash, other: PictureHash) -> int:
    """As a join compares: one's whole picture with every hash of the other, and the other way."""
    either = [np.bitwise_count(a.hashes[0] ^ b.hashes).min() for a, b in ((one, other), (other, one))]
    return int(min(either))


@pytest.mark.parametrize("change", CHANGES)
def test_a_copy_is_near_and_its_thumbnail_agrees(change: str) -> None:
    for seed in range(10):
        original, copy = hash_picture(saved(drawn(seed))), hash_picture(CHANGES[change](drawn(seed)))
        other = hash_picture(saved(drawn(seed + 100)))
        assert near(original, copy) <= 8 < near(original, other)
        pairs = np.stack([original.thumbnail] * 2), np.stack([copy.thumbnail, other.thumbnail])
        same, different = aligned_correlation(*pairs)
        assert same >= SAME > different
        assert original.digest != copy.digest


def test_a_plain_picture_has_no_contrast_and_what_is_no_picture_is_a_problem() -> None:
    plain = hash_picture(saved(Image.new("RGB", (64, 64), "grey")))
    assert plain.contrast < LEAST_CONTRAST < hash_picture(saved(drawn(0))).contrast
    assert plain.hashes.shape == (HASHES,)
    with pytest.raises(SampleProblem):
        hash_picture(b"no picture")


def thumbnails(*seeds: int) -> NDArray[np.uint8]:
    return np.stack([hash_picture(saved(drawn(seed))).thumbnail for seed in seeds])


def test_a_leader_is_the_first_that_is_the_same_and_what_is_too_many_has_none() -> None:
    assert leaders(thumbnails(1, 2, 1, 3, 2, 1), 9).tolist() == [0, 1, 0, 3, 1, 0]
    assert leaders(thumbnails(1, 2, 1, 3, 2, 1), 2).tolist() == [0, 1, 0, -1, 1, 0]
    assert aligned_correlation(thumbnails(1)[:0], thumbnails(1)[:0]).shape == (0,)
