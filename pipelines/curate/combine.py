"""What several ledgers keep together, and which of them drops a sample first."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import pyarrow.compute as pc

from mm_core.data.among import first_reasons
from mm_core.data.index import Index

Why = tuple[str, str]
"""A ledger and its reason."""


def combined(index: Index, ledgers: Sequence[str]) -> tuple[int, dict[Why, int]]:
    """How many samples are kept, and how many are dropped by each reason of each ledger before another ledger would.

    Raises:
        DataError: a ledger that is not there, or is of another index.
    """
    kept, dropped = 0, Counter[Why]()
    for table in first_reasons(index, ledgers):
        kept += pc.sum(pc.greater(table["repeat"], 0)).as_py() or 0
        counts = table.group_by(["ledger", "reason"]).aggregate([([], "count_all")]).to_pylist()
        dropped.update({(row["ledger"], row["reason"]): row["count_all"] for row in counts if row["ledger"] is not None})
    order = {name: place for place, name in enumerate(ledgers)}
    return kept, dict(sorted(dropped.items(), key=lambda item: (order[item[0][0]], -item[1])))
