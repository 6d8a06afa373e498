from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from mm_core.curation.quantile import count, locate, value_at

NUMBERS = st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=50)


@given(NUMBERS, NUMBERS, st.data())
@settings(deadline=None, max_examples=200)
def test_the_kth_highest_is_exact_however_the_values_are_divided(some: list[float], others: list[float], data: st.DataObject) -> None:
    parts = [np.array([*some, np.nan], dtype=np.float32), np.array(others, dtype=np.float32)]
    k = data.draw(st.integers(1, len(some) + len(others)))
    cell, rest = locate(sum(count(part) for part in parts), k)
    place, _ = locate(sum(count(part, cell) for part in parts), rest)
    assert value_at(cell, place) == sorted([*some, *others], reverse=True)[k - 1]
