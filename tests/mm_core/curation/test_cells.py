from __future__ import annotations

import numpy as np
import pytest

from mm_core.curation import cells
from mm_core.curation.cells import centres, nearest, sampled, similar_pairs


def vectors(count: int, seed: int = 0) -> np.ndarray:
    """Unit vectors, of which every third is nearly that before it."""
    rng = np.random.default_rng(seed)
    found = rng.normal(size=(count, 32)).astype(np.float32)
    found[2::3] = found[1::3][: len(found[2::3])] + rng.normal(size=found[2::3].shape).astype(np.float32) * 0.05
    return found / np.linalg.norm(found, axis=1, keepdims=True)


@pytest.mark.parametrize("block", [7, 4096])
def test_pairs_of_a_cell_are_those_that_comparing_all_finds(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cells, "_BLOCK", block)
    found = vectors(90)
    ours = np.arange(90) % 2 == 0
    expected = np.argwhere(np.round(found @ found.T, 4) >= np.float32(0.9))
    pairs = [pair for one, other in similar_pairs(found, ours, ~ours, 0.9) for pair in zip(one.tolist(), other.tolist(), strict=True)]
    assert sorted(pairs) == sorted((a, b) for a, b in expected.tolist() if ours[a] and not ours[b])
    assert len(pairs) > 10


def test_a_large_cell_is_cut_to_what_is_about_as_far_from_its_middle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cells, "_LARGEST", 8)
    found = np.repeat(vectors(3)[:1], 30, axis=0)
    everyone = np.ones(30, dtype=bool)
    pairs = [
        pair for one, other in similar_pairs(found, everyone, everyone, 0.99) for pair in zip(one.tolist(), other.tolist(), strict=True)
    ]
    assert 30 * 8 <= len(set(pairs)) == len(pairs) < 30 * 30


def test_nearly_equal_vectors_share_a_cell() -> None:
    found = vectors(600)
    own = nearest(found, centres(found, 12))
    assert own.shape == (600, 2)
    assert (own[:, 0] != own[:, 1]).all()
    share = [bool(set(own[i].tolist()) & set(own[i + 1].tolist())) for i in range(1, 599, 3)]
    assert np.mean(share) == 1
    assert nearest(found, centres(found, 1)).tolist() == [[0]] * 600


def test_a_sample_is_drawn_by_number_alone() -> None:
    numbers = np.arange(1 << 18)
    drawn = sampled(numbers, 1 << 20)
    assert abs(drawn.mean() - 1 / 8) < 0.01
    assert (sampled(numbers[1000:2000], 1 << 20) == drawn[1000:2000]).all()
    assert sampled(numbers, 1 << 17).all()
