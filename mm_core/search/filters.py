"""Conditions on the metadata of what is searched."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from pydantic import Field, StrictBool, StrictFloat, StrictInt, StrictStr

from mm_core.config import Config, nearest
from mm_core.errors import ConfigError

Scalar = StrictBool | StrictInt | StrictFloat | StrictStr
_OPERATIONS: dict[str, Callable[[Any, Any], Any]] = {
    "=": pc.equal,
    "!=": pc.not_equal,
    "<": pc.less,
    "<=": pc.less_equal,
    ">": pc.greater,
    ">=": pc.greater_equal,
}


class Condition(Config):
    """One column against one value."""

    field: str
    op: Literal["=", "!=", "<", "<=", ">", ">=", "in", "contains"] = "="
    value: Scalar | list[Scalar] = Field(description="`in` takes a list, `contains` a text, whose case does not count.")


def rows_that_meet(table: pa.Table, conditions: Sequence[Condition]) -> NDArray[np.bool_]:
    """[rows]: which meet all. A row without a value meets none.

    Raises:
        ConfigError: a column that there is not, or a value that cannot be compared with it.
    """
    met = np.ones(table.num_rows, dtype=bool)
    for condition in conditions:
        if condition.field not in table.column_names:
            raise ConfigError(f"no field {condition.field[:100]!r}{nearest(condition.field, table.column_names)}")
        try:
            found = _compared(table[condition.field], condition)
        except (pa.ArrowException, OverflowError, TypeError) as error:
            kind = table.schema.field(condition.field).type
            reason = " ".join(str(error).split())[:200]
            raise ConfigError(f"{condition.field} ({kind}) cannot be compared with {condition.value!r:.100}: {reason}") from None
        met &= np.asarray(pc.fill_null(found, False))
    return met


def _compared(column: pa.ChunkedArray, condition: Condition) -> pa.ChunkedArray:
    value = condition.value
    if condition.op == "in":
        if not isinstance(value, list):
            raise TypeError("`in` takes a list")
        return pc.is_in(column, value_set=pa.array(value, column.type))
    if isinstance(value, list):
        raise TypeError(f"`{condition.op}` takes one value")
    if condition.op == "contains":
        if not isinstance(value, str):
            raise TypeError("`contains` takes a text")
        return pc.match_substring(column, value, ignore_case=True)
    if isinstance(value, str) != pa.types.is_string(column.type):
        raise TypeError("a text and a number")
    return _OPERATIONS[condition.op](column, pa.scalar(value))
