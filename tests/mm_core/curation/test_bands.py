from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from mm_core.curation.bands import Bands


def joined(bands: Bands, queries: NDArray[np.uint64], entries: NDArray[np.uint64], parts: int = 1) -> tuple[list[tuple[int, int]], int]:
    found, cuts = [], 0
    for band in range(bands.count):
        for part in range(parts):
            here = np.flatnonzero(bands.part_of(entries, band, parts) == part)
            keys = bands.keys(entries[here], band)
            order = np.argsort(keys, kind="stable")
            near = np.flatnonzero(np.bitwise_count(bands.part_of(queries, band, parts) ^ np.uint64(part)) <= bands.radius)
            for query, entry, cut in bands.pairs(bands.keys(queries[near], band), keys[order], band):
                found += list(zip(near[query].tolist(), here[order[entry]].tolist(), strict=True))
                cuts += cut
    return found, cuts


@given(
    st.integers(0, 2**32),
    st.integers(0, 10).flatmap(lambda k: st.tuples(st.just(k), st.integers(max(1, k // 2), k + 1))),
    st.sampled_from((1, 2, 8)),
)
@settings(deadline=None, max_examples=60)
def test_a_banded_join_finds_each_near_pair_once_however_it_is_divided(seed: int, distance_count: tuple[int, int], parts: int) -> None:
    distance, count = distance_count
    rng = np.random.default_rng(seed)
    hashes = rng.integers(0, 2**64, 12, dtype=np.uint64)
    flips = (rng.random((4, 12, 64)) < rng.random() * 0.25).astype(np.uint64) << np.arange(64, dtype=np.uint64)
    entries = np.concatenate([hashes, *(hashes ^ np.bitwise_or.reduce(some, axis=1) for some in flips)])
    expected = np.argwhere(np.bitwise_count(hashes[:, None] ^ entries[None]) <= distance)
    found, cuts = joined(Bands(distance, count), hashes, entries, parts)
    assert sorted(found) == [(int(a), int(b)) for a, b in expected]
    assert cuts == 0


def test_a_bucket_that_is_too_large_is_cut_and_counted() -> None:
    entries = np.arange(1000, dtype=np.uint64) << np.uint64(40)
    found, cuts = joined(Bands(0, 1, limit=100), entries, np.zeros(1000, dtype=np.uint64))
    assert found == [(0, i) for i in range(100)] or len(found) == 100
    assert cuts == 1


def test_more_hashes_are_looked_up_in_fewer_longer_bands() -> None:
    counts = [Bands.fitted(8, hashes).count for hashes in (10**3, 10**6, 10**9)]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > counts[-1]
