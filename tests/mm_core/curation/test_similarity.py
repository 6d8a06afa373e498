from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from mm_core.curation.similarity import mean_texts, similarities


def units(rng: np.random.Generator, count: int, dim: int) -> np.ndarray:
    values = rng.normal(size=(count, dim)).astype(np.float32)
    return values / np.linalg.norm(values, axis=1, keepdims=True)


@given(st.lists(st.integers(1, 5), min_size=1, max_size=12), st.integers(0, 2**32 - 1))
def test_every_sample_is_its_own_pictures_and_captions(counts: list[int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    images, texts = units(rng, len(counts), 6), units(rng, sum(counts), 6)
    owners = np.repeat(np.arange(len(counts)), counts)
    found, means = similarities(images, texts, owners), mean_texts(texts, owners, len(counts))
    for i, image in enumerate(images):
        own = texts[owners == i]
        np.testing.assert_allclose(found.similarity[i], (own @ image).mean(), atol=1e-6)
        np.testing.assert_allclose(found.similarity_lowest[i], (own @ image).min(), atol=1e-6)
        mean = own.astype(np.float64).mean(axis=0)
        if np.linalg.norm(mean) > 1e-3:
            np.testing.assert_allclose(means[i], mean / np.linalg.norm(mean), atol=1e-4)
