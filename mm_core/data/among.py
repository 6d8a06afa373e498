"""What several ledgers keep together: for what works on those samples alone, and for the reasons why others are not among them.

Wherever a command takes `--ledger`, several are taken together: a sample is among them if all keep it, and of those that drop it the first,
in the order given, is its reason.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from mm_core.data.index import Index
from mm_core.data.ledger import Ledger, kept_fingerprint
from mm_core.data.personal import PersonalKind
from mm_core.data.scan import usable
from mm_core.data.side_table import SideTable


@dataclass(frozen=True)
class Among:
    """The samples of an index that all of some ledgers keep; of none, the usable ones. Small enough to go to every task."""

    ledgers: tuple[str, ...] = ()
    """In the order given, each once."""
    fingerprint: str = ""
    """Of the choice that they make together."""
    mask: tuple[PersonalKind, ...] = ()
    """Personal data that any of them masks."""

    @classmethod
    def of(cls, index: Index, ledgers: Sequence[str]) -> Among:
        """
        Raises:
            DataError: a ledger that is not there, or is of another index.
        """
        names = tuple(dict.fromkeys(ledgers))
        found = [Ledger(index, name).summary() for name in names]
        mask = tuple(kind for kind in PersonalKind if any(kind in summary.mask for summary in found))
        return cls(names, kept_fingerprint(index, found) if names else "", mask)

    def __str__(self) -> str:
        """What a ledger or scores made of these samples say of it; nothing where no ledger chooses."""
        return f", among {' and '.join(sorted(self.ledgers))} {self.fingerprint}" if self.ledgers else ""

    def rows(self, index: Index, first: int, last: int) -> NDArray[np.bool_]:
        """Which of the rows `first` up to `last` are among them."""
        found = usable(index.locators["flags"][first:last], index.summary.need)
        for name in self.ledgers:
            found &= Ledger(index, name).decisions.between(first, last, ["repeat"])["repeat"].to_numpy() > 0
        return found

    def reasons(self, index: Index, first: int, last: int) -> pa.Array:
        """Of those rows that are usable and not among them `LEDGER: REASON`, as strings."""
        return named(self.decisions(index, first, last))

    def decisions(self, index: Index, first: int, last: int) -> pa.Table:
        """`combine` of those rows."""
        good = usable(index.locators["flags"][first:last], index.summary.need)
        return combine({name: Ledger(index, name).decisions.between(first, last, ["repeat", "reason"]) for name in self.ledgers}, good)


def combine(decisions: Mapping[str, pa.Table], usable: NDArray[np.bool_]) -> pa.Table:
    """Some rows under several ledgers, as a run reads them together: `repeat` (the product), and of usable rows that are dropped the first
    `ledger`, in the order given, that drops them, with its `reason`.

    Args:
        decisions: by ledger the columns `repeat` and `reason` of the rows.
    """
    repeat, first = usable.astype(np.float32), np.full(len(usable), -1)
    reasons = pa.nulls(len(usable), pa.string())
    for number, table in enumerate(decisions.values()):
        weights = table["repeat"].to_numpy()
        drops = usable & (weights == 0) & (first < 0)
        first[drops] = number
        repeat *= weights
        reasons = pc.if_else(pa.array(drops), table["reason"].combine_chunks().cast(pa.string()), reasons)
    names = pa.array(list(decisions), pa.string()).take(pa.array(first, mask=first < 0))
    return pa.table({"repeat": repeat, "ledger": names.dictionary_encode(), "reason": reasons.dictionary_encode()})


def named(decisions: pa.Table) -> pa.Array:
    """Of `combine`'s rows that are dropped `LEDGER: REASON`, as strings; of the others null."""
    names, reasons = (decisions[column].combine_chunks().cast(pa.string()) for column in ("ledger", "reason"))
    return pc.binary_join_element_wise(names, pc.fill_null(reasons, "dropped"), ": ")


def first_reasons(index: Index, ledgers: Sequence[str]) -> Iterator[pa.Table]:
    """`combine` of all rows of an index, chunk by chunk.

    Raises:
        DataError: a ledger that is not there, or is of another index.
    """
    among, chunks = Among.of(index, ledgers), SideTable(index.url, index.summary.rows)
    for chunk in range(len(chunks)):
        yield among.decisions(index, *chunks.bounds(chunk))
