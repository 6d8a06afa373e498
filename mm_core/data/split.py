"""Ledgers whose weights are known for the whole index: of a list of samples, and of a division at random."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow.compute as pc
from numpy.typing import NDArray

from mm_core.data.among import Among
from mm_core.data.index import Index
from mm_core.data.ledger import Ledger, LedgerSummary
from mm_core.data.permutation import mix
from mm_core.data.side_table import check_name
from mm_core.errors import ConfigError

_ALL = Among()
"""Every usable sample."""


def write_ledger(
    index: Index, name: str, *, rule: str, repeat: NDArray[np.floating[Any]], reason: str, among: Among = _ALL
) -> LedgerSummary:
    """Write a ledger that drops the usable samples whose `repeat`, one per row of the index, is 0 for `reason`, and those that are not
    `among` some for the reasons of those; in place of an earlier one.

    Raises:
        DataError: a weight that is negative or not finite.
    """
    ledger = Ledger(index, name)
    ledger.remove()
    decided = []
    for chunk in range(len(ledger.decisions)):
        first, last = ledger.decisions.bounds(chunk)
        weights = np.where(among.rows(index, first, last), repeat[first:last], 0)
        reasons = pc.fill_null(among.reasons(index, first, last), reason)
        decided.append(ledger.write_chunk(chunk, weights, reasons))
    return ledger.finish(decided, rule=rule, mask=among.mask)


def split(
    index: Index,
    *,
    heldout: float,
    seed: int,
    names: tuple[str, str] = ("train", "heldout"),
    among: Among = _ALL,
    replace_ledgers: bool = False,
) -> tuple[LedgerSummary, LedgerSummary]:
    """Two ledgers that divide the samples `among` some at random; which side a sample falls on depends on the seed and the names and
    sizes of its members alone, so a re-index of the same shards divides them the same way. What is there by the same settings stays.

    Raises:
        ConfigError: there are other ledgers of these names and they are not to be replaced, or they are no two names.
    """
    if len({check_name(name) for name in names}) < 2:
        raise ConfigError(f"both sides of the split are called {names[0]!r}: give two names")
    draws, limit = mix(seed, index.locators["check"].astype(np.uint64)), int(heldout * 2**64)
    chosen = draws <= np.uint64(limit - 1) if limit else np.zeros(len(draws), dtype=bool)
    rules = [f"split heldout={heldout} seed={seed} side={name}{among}" for name in names]
    claimed = [
        Ledger(index, name).claim(rule, among=among.ledgers, replace=replace_ledgers) for name, rule in zip(names, rules, strict=True)
    ]
    sides = ((~chosen).astype(np.float32), "held_out"), (chosen.astype(np.float32), "not_held_out")
    ours, theirs = (
        found or write_ledger(index, name, rule=rule, repeat=repeat, reason=reason, among=among)
        for found, name, rule, (repeat, reason) in zip(claimed, names, rules, sides, strict=True)
    )
    return ours, theirs
