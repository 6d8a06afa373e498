"""Conditions on metadata: each operation, what has no value, and what makes no sense."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pytest

from mm_core.errors import ConfigError
from mm_core.search.filters import Condition, rows_that_meet

TABLE = pa.table(
    {
        "width": pa.array([10, 20, None, 40], pa.uint32()),
        "caption": pa.array(["A red circle", "blue", None, "RED star"]),
        "label": pa.array([0, 1, 2, -1], pa.int32()),
    }
)


@pytest.mark.parametrize(
    ("field", "op", "value", "rows"),
    [
        ("width", "=", 20, [1]),
        ("width", "!=", 20, [0, 3]),
        ("width", "<", 20, [0]),
        ("width", "<=", 20.5, [0, 1]),
        ("width", ">", 20, [3]),
        ("width", ">=", -1, [0, 1, 3]),
        ("width", "in", [10, 40], [0, 3]),
        ("caption", "contains", "red", [0, 3]),
        ("caption", "=", "blue", [1]),
        ("caption", "contains", ".*", []),
        ("label", "<", 0, [3]),
    ],
)
def test_each_operation(field: str, op: Any, value: Any, rows: list[int]) -> None:
    assert rows_that_meet(TABLE, [Condition(field=field, op=op, value=value)]).nonzero()[0].tolist() == rows


def test_all_must_hold() -> None:
    conditions = [Condition(field="width", op=">", value=5), Condition(field="caption", op="contains", value="red")]
    assert rows_that_meet(TABLE, conditions).nonzero()[0].tolist() == [0, 3]
    assert rows_that_meet(TABLE, []).all()


@pytest.mark.parametrize(
    ("field", "op", "value", "words"),
    [
        ("widht", "=", 1, "did you mean 'width'"),
        ("width", "=", "wide", "uint32"),
        ("width", "contains", "1", "width"),
        ("width", "in", 3, "list"),
        ("width", "in", ["x"], "width"),
        ("width", "=", [1], "one value"),
        ("caption", "<", 3, "caption"),
        ("width", "=", 10**30, "width"),
    ],
)
def test_what_makes_no_sense_is_named(field: str, op: Any, value: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        rows_that_meet(TABLE, [Condition(field=field, op=op, value=value)])
