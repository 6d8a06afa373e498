"""The rows of an index for curation's tasks: a chunk of a ledger after another, in batches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import lru_cache

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from mm_core.curation.rows import Rows
from mm_core.data.among import Among
from mm_core.data.index import Index
from mm_core.data.scan import BATCH_ROWS
from mm_core.data.scores import Scores
from mm_core.data.side_table import SideTable

ALL = Among()
"""Every usable sample."""


@lru_cache(maxsize=8)
def opened(url: str) -> Index:
    """Once in a process."""
    return Index.open(url)


def chunks_of(index: Index) -> range:
    return range(len(SideTable(index.url, index.summary.rows)))


def bounds_of(index: Index, chunk: int) -> tuple[int, int]:
    """First row of a chunk, and the first after it."""
    return SideTable(index.url, index.summary.rows).bounds(chunk)


def rows_of(index: Index, chunk: int, among: Among) -> NDArray[np.bool_]:
    """Which of a chunk's are among those."""
    return among.rows(index, *bounds_of(index, chunk))


def batches(
    index: Index, chunk: int, columns: list[str], scores: Mapping[str, list[str]] | None = None, among: Among = ALL
) -> Iterator[Rows]:
    """The rows of a chunk that are `among` some. Batches small enough for a processor's cache: larger ones take five times as long.

    Args:
        scores: by name the columns of each that are read.
    """
    first, last = bounds_of(index, chunk)
    good = rows_of(index, chunk, among)
    table = index.rows(first, last, columns or ["row"]).filter(pa.array(good))
    values = {
        name: Scores(index, name).values.between(first, last, wanted).filter(pa.array(good)) for name, wanted in (scores or {}).items()
    }
    checks = index.locators["check"][first:last][good].astype(np.uint64)
    for at in range(0, table.num_rows, BATCH_ROWS):
        of_batch = {name: some.slice(at, BATCH_ROWS) for name, some in values.items()}
        yield Rows(table.slice(at, BATCH_ROWS), of_batch, checks[at : at + BATCH_ROWS])
