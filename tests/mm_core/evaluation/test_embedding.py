from __future__ import annotations

import numpy as np
import pytest

from mm_core.evaluation import embedding
from mm_core.evaluation.embedding import alignment, effective_rank, embedding_statistics, modality_gap, uniformity


def unit(features: np.ndarray) -> np.ndarray:
    return (features / np.linalg.norm(features, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture
def pairs() -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(0)
    return unit(draw.normal(size=(50, 8))), unit(draw.normal(size=(50, 8)) + 0.5)


def test_they_are_what_brute_force_finds(pairs: tuple[np.ndarray, np.ndarray], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedding, "_BLOCK_SCORES", 350)  # seven rows at a time
    images, texts = pairs
    found = embedding_statistics(images, texts)
    assert found["alignment"] == pytest.approx(np.mean([np.sum((a - b) ** 2) for a, b in zip(images, texts, strict=True)]))
    kernel = [np.exp(-2 * np.sum((images[i] - images[j]) ** 2)) for i in range(50) for j in range(i)]
    assert found["uniformity_image"] == pytest.approx(np.log(np.mean(kernel)))
    singular = np.linalg.svd(texts, compute_uv=False)
    shares = singular / singular.sum()
    assert found["effective_rank_text"] == pytest.approx(np.exp(-np.sum(shares * np.log(shares))), rel=1e-5)
    assert found["modality_gap"] == pytest.approx(np.linalg.norm(images.mean(0) - texts.mean(0)), rel=1e-5)


def test_a_space_that_collapsed_is_seen() -> None:
    point = unit(np.ones((40, 16)))
    assert uniformity(point) == pytest.approx(0, abs=1e-6)
    assert effective_rank(point) == pytest.approx(1, abs=1e-3)
    assert alignment(point, point) == 0
    assert modality_gap(point, -point) == pytest.approx(2, rel=1e-6)


def test_axes_are_of_full_rank_and_equally_far_apart() -> None:
    axes = np.eye(12, dtype=np.float32)
    assert effective_rank(axes) == pytest.approx(12)
    assert uniformity(axes) == pytest.approx(-4)
    assert "uniformity_image" not in embedding_statistics(axes[:1], axes[:1])
