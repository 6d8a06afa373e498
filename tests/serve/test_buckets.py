"""Every text is in one bucket, which is as long as it needs and no longer than the next."""

from __future__ import annotations

import numpy as np
import pytest

from serve.encoder import buckets


@pytest.mark.parametrize(("doubling", "expected"), [(False, [8, 16, 24, 40, 77]), (True, [8, 16, 32, 64, 77])])
def test_texts_of_about_one_length_go_together(doubling: bool, expected: list[int]) -> None:
    lengths = np.array([3, 8, 9, 16, 17, 77, 33, 40, 73, 1], dtype=np.int32)
    found = dict(buckets(lengths, 77, doubling=doubling))
    assert list(found) == expected
    assert sorted(row for rows in found.values() for row in rows) == list(range(len(lengths)))
    for edge, rows in found.items():
        shorter = max(one for one in (0, *(range(8, 77, 8) if not doubling else (8, 16, 32, 64))) if one < edge)
        assert (lengths[rows] <= edge).all()
        assert (lengths[rows] > shorter).all()
