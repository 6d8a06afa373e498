"""Weights are kept to the sample: rounded down or up in every epoch, up as often as they say, copies far apart."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mm_core.data.copies import Copies


def epoch(copies: Copies, number: int, seed: int = 0) -> np.ndarray:
    places = np.arange(len(copies), dtype=np.uint64)
    return copies.at(places, np.full(len(places), number, dtype=np.uint64), seed)


@given(weights=st.lists(st.floats(0.01, 6), min_size=1, max_size=60), number=st.integers(0, 1000))
@settings(max_examples=150, deadline=None)
def test_every_epoch_holds_each_sample_its_weight_rounded_down_or_up(weights: list[float], number: int) -> None:
    copies = Copies.of(np.array(weights))
    counts = np.bincount(epoch(copies, number).astype(int), minlength=len(weights))
    rounded = np.rint(np.array(weights) * 2**24) / 2**24
    fractions = (rounded % 1).sum()
    assert len(copies) == np.floor(rounded).sum() + (max(1, np.floor(fractions)) if fractions else 0)
    assert (counts >= np.floor(rounded)).all()
    assert (counts <= np.ceil(rounded)).all()


@pytest.mark.parametrize("weights", [[1.0] * 10 + [0.9], [2, 1, 0.5, 0.25, 1, 1], [0.3] * 50], ids=str)
def test_on_average_a_sample_comes_as_often_as_its_weight_says(weights: list[float]) -> None:
    copies = Copies.of(np.array(weights))
    counts = sum(np.bincount(epoch(copies, number).astype(int), minlength=len(weights)) for number in range(2000)) / 2000
    off = abs(len(copies) / np.sum(weights) - 1) * np.sum(weights) * np.max(np.mod(weights, 1)) / np.sum(np.mod(weights, 1))
    assert np.abs(counts - weights).max() <= off + 0.04  # an epoch has no part of a place


def test_copies_of_a_sample_lie_a_layer_apart() -> None:
    order = epoch(Copies.of(np.full(100, 3.0)), 0)
    assert [sorted(order[k : k + 100]) for k in (0, 100, 200)] == [list(range(100))] * 3


def test_they_are_what_was_saved(tmp_path: Path) -> None:
    copies = Copies.of(np.array([2.5, 1, 0.75, 1.25]))
    copies.save(tmp_path / "kept.copies.npz")
    again = Copies.load(tmp_path / "kept.copies.npz")
    np.testing.assert_array_equal(epoch(again, 5), epoch(copies, 5))
    assert copies.uneven == 3
    assert not list(tmp_path.glob("*.tmp"))
