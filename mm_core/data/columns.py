"""Arrays as columns of a table and back, over the same memory: what crosses the object store is never copied for its form."""

from __future__ import annotations

from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

Scalar = TypeVar("Scalar", bound=np.generic)


def column_of(values: NDArray[Any], present: NDArray[np.bool_] | None = None) -> pa.Array:
    """Rows of an array as binary values.

    Args:
        values: [rows, ...], contiguous.
        present: which rows of the column have one, in order, where not all have; the others are empty.
    """
    present = np.ones(len(values), dtype=bool) if present is None else present
    width = values[0].nbytes if len(values) else 0
    offsets = np.zeros(len(present) + 1, dtype=np.int64)
    np.cumsum(present * width, out=offsets[1:])
    return pa.LargeBinaryArray.from_buffers(pa.large_binary(), len(present), [None, pa.py_buffer(offsets), pa.py_buffer(values)])


def vectors_column(values: NDArray[Any], present: NDArray[np.bool_]) -> pa.Array:
    """Vectors as fixed-width binary values, null where a row has none.

    Args:
        values: [rows, d], zero where absent.
        present: which rows have one.
    """
    bits = pa.py_buffer(np.packbits(present, bitorder="little"))
    width = values.shape[1] * values.itemsize
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(width), len(values), [bits, pa.py_buffer(np.ascontiguousarray(values))])


def vectors_of(column: pa.ChunkedArray, dtype: type[Scalar]) -> NDArray[Scalar]:
    """[rows, d] as a view, of a column that `vectors_column` made; what a null row holds means nothing."""
    array = column.chunk(0) if column.num_chunks == 1 else pa.concat_arrays(column.chunks)
    width = array.type.byte_width
    flat = np.frombuffer(array.buffers()[1], dtype=np.uint8)[array.offset * width : (array.offset + len(array)) * width]
    return flat.view(dtype).reshape(len(array), -1)


def rows_of(column: pa.ChunkedArray, shape: tuple[int, ...], dtype: type[Scalar]) -> NDArray[Scalar] | None:
    """The array a column holds, as a view: [rows, *shape]; None where every row is empty."""
    array = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
    if isinstance(array, pa.ChunkedArray):
        array = array.chunk(0)
    offsets = np.frombuffer(array.buffers()[1], dtype=np.int64)[array.offset : array.offset + len(array) + 1]
    if offsets[0] == offsets[-1]:
        return None
    flat = np.frombuffer(array.buffers()[2], dtype=np.uint8)[offsets[0] : offsets[-1]]
    return flat.view(dtype).reshape(len(array), *shape)
