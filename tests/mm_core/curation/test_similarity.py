from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from mm_core.curation.similarity import References, mean_texts, similarities


def units(rng: np.random.Generator, count: int, dim: int) -> np.ndarray:
    values = rng.normal(size=(count, dim)).astype(np.float32)
    return values / np.linalg.norm(values, axis=1, keepdims=True)


@given(st.lists(st.integers(1, 5), min_size=1, max_size=12), st.integers(0, 2**32 - 1))
def test_every_sample_is_its_own_pictures_and_captions(counts: list[int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    images, texts = units(rng, len(counts), 6), units(rng, sum(counts), 6)
    owners = np.repeat(np.arange(len(counts)), counts)
    references = References(np.arange(100, 109, dtype=np.uint64), units(rng, 9, 6), units(rng, 9, 6))
    beside = references.beside(np.arange(len(counts), dtype=np.uint64), 5.0)
    found, means = similarities(images, texts, owners, beside), mean_texts(texts, owners, len(counts))
    for i, image in enumerate(images):
        own = texts[owners == i]
        np.testing.assert_allclose(found.similarity[i], (own @ image).mean(), atol=1e-6)
        np.testing.assert_allclose(found.similarity_lowest[i], (own @ image).min(), atol=1e-6)
        others = np.log(np.exp(5 * references.texts @ image).mean()) / 5
        others = others + np.log(np.exp(5 * own @ references.images.T).mean(axis=1)) / 5
        np.testing.assert_allclose(found.similarity_relative[i], (own @ image - others / 2).mean(), atol=1e-5)
        mean = own.astype(np.float64).mean(axis=0)
        if np.linalg.norm(mean) > 1e-3:
            np.testing.assert_allclose(means[i], mean / np.linalg.norm(mean), atol=1e-4)


def test_a_sample_among_the_references_is_none_of_the_others_it_is_compared_with() -> None:
    rng = np.random.default_rng(0)
    images, texts, ordinals = units(rng, 8, 6), units(rng, 8, 6), np.arange(8, dtype=np.uint64)
    with_itself = similarities(images, texts, np.arange(8), References(ordinals, images, texts).beside(ordinals, 5.0))
    for i in range(8):
        rest = ordinals != i
        beside = References(ordinals[rest], images[rest], texts[rest]).beside(ordinals[i : i + 1], 5.0)
        alone = similarities(images[i : i + 1], texts[i : i + 1], np.zeros(1, int), beside)
        np.testing.assert_allclose(with_itself.similarity_relative[i], alone.similarity_relative[0], atol=1e-5)
    one = References(ordinals[:1], images[:1], texts[:1]).beside(ordinals[:1], 5.0)
    assert np.isfinite(similarities(images[:1], texts[:1], np.zeros(1, int), one).similarity_relative).all()
