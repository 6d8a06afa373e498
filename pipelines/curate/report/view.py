"""What every pass over an index looks at: the usable rows of a chunk with the decisions of each ledger."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Bool, Float, UInt64

from mm_core.data.among import combine
from mm_core.data.index import Index
from mm_core.data.ledger import Ledger
from mm_core.data.scan import usable
from mm_core.data.side_table import SideTable
from pipelines.curate.batches import opened

_COLUMNS = ["image_format", "width", "height", "caption_characters"]
CAPTION_CHARACTERS = "caption_characters"
Column = tuple[str, str]
"""A ledger's name, or "" for the index, and a column of numbers."""


@dataclass(frozen=True)
class Question:
    """What a report is asked for, small enough to send to every task."""

    index: str
    ledgers: tuple[str, ...]
    """All that are shown."""
    together: tuple[str, ...]
    """Those of them that are read together, in the order in which the first reason wins."""
    compare: tuple[str, str] | None
    """Two of them."""
    gallery: int
    """Samples of a gallery."""
    groups: int
    """Groups of duplicates of a ledger."""
    points: int
    """Samples on the map of embeddings."""
    seed: int


@dataclass(frozen=True)
class View:
    """The usable rows of one chunk."""

    ordinals: UInt64[np.ndarray, " rows"]
    table: pa.Table
    """Columns of the index."""
    decisions: dict[str, pa.Table]
    """By ledger."""
    together: pa.Table
    """What `combine` makes of those that are read together."""

    @classmethod
    def read(cls, question: Question, chunk: int) -> View:
        """
        Raises:
            DataError: decisions that are damaged.
        """
        index = opened(question.index)
        first, last = chunks(index).bounds(chunk)
        good = usable(index.locators["flags"][first:last], index.summary.need)
        chosen = pa.array(good)
        decisions = {name: Ledger(index, name).decisions.read(chunk).filter(chosen) for name in question.ledgers}
        return cls(
            np.flatnonzero(good).astype(np.uint64) + np.uint64(first),
            index.rows(first, last, _COLUMNS).filter(chosen),
            decisions,
            combine({name: decisions[name] for name in question.together}, np.ones(int(good.sum()), dtype=bool)),
        )

    def kept(self, ledger: str = "") -> Bool[np.ndarray, " rows"]:
        """By one ledger, or by those that are read together."""
        return np.asarray((self.decisions[ledger] if ledger else self.together)["repeat"].to_numpy() > 0)

    def reasons(self, ledger: str) -> pa.Array:
        """Of one ledger, null where it keeps."""
        return text(self.decisions[ledger], "reason")

    def values(self) -> Iterator[tuple[Column, Float[np.ndarray, " rows"], Bool[np.ndarray, " rows"]]]:
        """Every column of numbers, NaN where a row has none, and who of the rows is kept."""
        yield ("", CAPTION_CHARACTERS), _numbers(self.table, CAPTION_CHARACTERS), self.kept()
        for name, table in self.decisions.items():
            kept = self.kept(name)
            for column in table.column_names:
                if column.startswith("value."):
                    yield (name, column), _numbers(table, column), kept
            yield (name, "repeat"), np.where(kept, _numbers(table, "repeat"), np.nan), kept


def chunks(index: Index) -> SideTable:
    """How an index is divided: as every ledger of it."""
    return SideTable("", index.summary.rows)


def counted(names: pa.Array) -> dict[str, int]:
    """How often each comes; null as ""."""
    return {row["values"] or "": row["counts"] for row in pc.value_counts(names).to_pylist()}


def text(table: pa.Table, column: str) -> pa.Array:
    """A column of names as plain strings."""
    return table[column].cast(pa.string()).combine_chunks()


def _numbers(table: pa.Table, column: str) -> Float[np.ndarray, " rows"]:
    return np.asarray(pc.cast(table[column], pa.float64()).to_numpy(), dtype=np.float64)
