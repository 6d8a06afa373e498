from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from mm_core.curation.components import NO_PAIRS, forest, grouped, lowest_match

PAIRS = st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)).filter(lambda pair: pair[0] != pair[1]), max_size=25)


def closure(pairs: list[tuple[int, int]]) -> dict[int, int]:
    lowest = {sample: sample for pair in pairs for sample in pair}
    for _ in lowest:
        for a, b in pairs:
            lowest[a] = lowest[b] = min(lowest[a], lowest[b])
    return lowest


@given(PAIRS)
@settings(deadline=None, max_examples=100)
def test_groups_are_what_hangs_together_and_a_forest_has_the_same(pairs: list[tuple[int, int]]) -> None:
    array = np.array(pairs, dtype=np.int64).reshape(-1, 2)
    found = grouped(array)
    assert dict(zip(found.samples.tolist(), found.groups.tolist(), strict=True)) == closure(pairs)
    fewer = forest(array)
    assert len(fewer) == len(found.samples) - found.count
    again = grouped(fewer)
    assert again.samples.tolist() == found.samples.tolist()
    assert again.groups.tolist() == found.groups.tolist()


def test_the_best_has_the_highest_key_then_the_next_then_is_the_first() -> None:
    groups = grouped(np.array([(1, 2), (2, 3), (5, 6), (8, 9)]))
    pixels = np.array([10.0, 20.0, 20.0, np.nan, 1.0, 7.0, 7.0])
    characters = np.array([9, 1, 2, 3, 4, 5, 5])
    assert groups.best(pixels, characters).tolist() == [3, 3, 3, 6, 6, 8, 8]
    assert groups.best().tolist() == [1, 1, 1, 5, 5, 8, 8]
    assert (groups.count, groups.largest) == (3, 3)


def test_no_pairs_make_no_groups() -> None:
    assert (grouped(NO_PAIRS).count, grouped(NO_PAIRS).largest, len(forest(NO_PAIRS)), len(lowest_match(NO_PAIRS))) == (0, 0, 0, 0)
    assert len(grouped(NO_PAIRS).best()) == 0


def test_of_several_matches_the_lowest_stays() -> None:
    assert lowest_match(np.array([(4, 9), (1, 8), (4, 7)])).tolist() == [[1, 8], [4, 7]]
