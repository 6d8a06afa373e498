"""What a report is made of, each beside the plain way to work it out."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.curate.report import maps, svg
from pipelines.curate.report.histogram import Axis, Histogram, Spread
from pipelines.curate.report.tally import co_failures

NUMBERS = st.lists(st.floats(width=32, min_value=-(2.0**30), max_value=2.0**30, allow_subnormal=False) | st.just(float("nan")), min_size=1)


@given(NUMBERS, st.integers(1, 5))
def test_a_spread_of_parts_is_that_of_the_whole_and_every_value_is_in_one_bin(numbers: list[float], parts: int) -> None:
    values = np.array(numbers)
    kept = np.arange(len(values)) % 3 > 0
    whole, added = Spread.of(values), Spread()
    for part in np.array_split(values, parts):
        added.add(Spread.of(part))
    there = values[~np.isnan(values)]
    assert (added.low, added.high, added.whole, added.total) == (whole.low, whole.high, whole.whole, len(there))
    if not len(there):
        return
    for share in (0.0, 0.5, 0.99):
        exact = np.sort(there)[min(len(there) - 1, int(share * len(there)))]
        assert whole.quantile(share) == pytest.approx(exact, rel=0.01, abs=1e-30)
    axis = Axis.of(whole, [0.5])
    counts = axis.count(values, kept)
    assert (np.diff(axis.edges) > 0).all()
    assert counts.sum(axis=0).tolist() == [int((kept & ~np.isnan(values)).sum()), int((~kept & ~np.isnan(values)).sum())]
    inside = (there >= axis.edges[0]) & (there < axis.edges[-1])
    assert (counts.sum(axis=1) >= np.histogram(there[inside], axis.edges)[0] - 1).all()
    assert svg.histogram(Histogram(axis, whole, counts, (("min", 0.5),)), "x").endswith("</svg>")


def test_axes_fit_their_values() -> None:
    words = Axis.of(Spread.of(np.arange(3.0, 20)), [5.0])
    assert words.edges.tolist() == [n - 0.5 for n in range(3, 21)], "of integers a bin each"
    long_tail = Axis.of(Spread.of(np.append(np.random.default_rng(0).uniform(0, 1, 10_000), 1e9)), [0.5, 1e12])
    assert long_tail.edges[-1] < 2, "one value far out, or a threshold, does not squeeze the others"
    assert Axis.of(Spread.of(np.geomspace(1.5, 1e6, 1000))).logarithmic
    beyond = svg.beyond(Histogram(long_tail, Spread.of(np.array([0.5, 1e9])), np.zeros((48, 2), dtype=np.int64), (("max", 1e12),)))
    assert beyond == ["max 1T lies beyond the axis", "the last bar holds all above, up to 1G"]


@given(st.lists(st.integers(0, 2**64 - 1) | st.sampled_from([0, 1, 3, 2**63])))
def test_co_failures_are_those_of_brute_force(fails: list[int]) -> None:
    together, alone = co_failures(np.array(fails, dtype=np.uint64))
    for i in (0, 1, 2, 30, 63):
        assert alone[i] == sum(f == 1 << i for f in fails)
        for j in (0, 1, 63):
            assert together[i, j] == sum(f >> i & 1 and f >> j & 1 for f in fails)


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0, 7), (-3.2, 12_345.6), (0.001, 0.0013)])
def test_ticks_are_round_and_inside(low: float, high: float) -> None:
    found = svg.ticks(low, high, 5)
    assert 2 <= len(found) <= 11
    assert low - 1e-9 <= found[0] < found[-1] <= high + 1e-9
    assert all(re.fullmatch(r"-?\d+(\.\d+)?[kM]?", svg.number(tick)) for tick in found)


def test_a_map_shows_what_belongs_together_together() -> None:
    draw = np.random.default_rng(0)
    centres = np.eye(3, 16, dtype=np.float32) * 5
    embeddings = np.repeat(centres, (80, 60, 40), axis=0) + draw.normal(0, 0.2, (180, 16)).astype(np.float32)
    clusters, typical = maps._clusters(embeddings, seed=0)
    groups = np.repeat(np.arange(3), (80, 60, 40))
    assert all(len(set(groups[clusters == cluster])) == 1 for cluster in set(clusters))
    assert [clusters[place] for place in typical] == list(range(len(typical)))
    assert np.bincount(clusters).tolist() == sorted(np.bincount(clusters), reverse=True)
    places = maps.positions(embeddings, seed=0)
    assert places.min() == 0
    assert places.max() == 1
    near = np.linalg.norm(places[:, None] - places, axis=2) + np.eye(180) * 9
    assert (groups[near.argmin(axis=1)] == groups).mean() > 0.98
    alike = np.ones((15, 4), dtype=np.float32)
    assert np.isfinite(maps.positions(alike, seed=0)).all()
    assert set(maps._clusters(alike, seed=0)[0]) == {0}
