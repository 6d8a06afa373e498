"""How a ledger treats groups of samples: counts before and after, keep rates, and where these surely differ by more than a bound."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from jaxtyping import Bool, Float, Int64, UInt64
from pydantic import Field

from mm_core.config import Config
from mm_core.curation.groups import Groups, GroupTerms
from mm_core.curation.rows import Rows

_Z = 1.96
"""Of the normal distribution: intervals hold the truth 95 times in 100."""
_WEIGHT_BITS = 24
"""Weights are added up in these units, as whole numbers: the sum then does not depend on the order."""
_CELL_ROWS = 1 << 22


class GroupCounts(Config):
    """A group of a category, or a combination of those that are crossed."""

    groups: tuple[str, ...] = Field(description="One name; of a crossing one for each of its categories.")
    samples: int = Field(description="Usable ones of the index.")
    kept: int
    keep_rate: float | None = Field(description="kept / samples; null where there are none.")
    share: float = Field(description="Of all samples.")
    epoch_share: float = Field(description="Of all places of an epoch, sampling weights counted.")
    rules: dict[str, float | None] = Field(description="By rule the share of its samples that the rule keeps, whatever the others do.")


class Difference(Config):
    """Two groups of a category that a rule treats differently."""

    rule: str | None = Field(description="Null: the ledger as a whole.")
    category: str
    within: tuple[str, ...] = Field(description="Of a crossing, the groups of its other categories that both are in; else empty.")
    groups: tuple[str, str] = Field(description="That of the higher keep rate first.")
    keep_rates: tuple[float, float]
    difference: float
    interval: tuple[float, float] = Field(description="In which the difference lies, 95 times in 100.")


class GroupReport(Config):
    """groups.json."""

    ledger: str | None = Field(description="Null: none, or several together.")
    ledger_fingerprint: str | None
    terms: str = Field(description="Digest of the file of terms.")
    samples: int
    kept: int
    max_difference: float
    categories: dict[str, list[GroupCounts]] = Field(description="By category its groups in the file's order, `none` the last.")
    crosses: list[tuple[tuple[str, ...], list[GroupCounts]]] = Field(description="Categories, and their combinations.")
    differences: list[Difference] = Field(description="Those that are surely above max_difference, the largest first.")


@dataclass(frozen=True)
class Fates:
    """What became of some rows."""

    repeat: Float[np.ndarray, " rows"]
    fails: UInt64[np.ndarray, " rows"]
    """A bit per rule."""
    rules: int

    @property
    def columns(self) -> Float[np.ndarray, "rows columns"]:
        """Whole numbers: 1, kept, weight, and for each rule whether it is failed."""
        bits = self.fails[:, None] >> np.arange(self.rules, dtype=np.uint64) & np.uint64(1)
        kept, units = self.repeat > 0, np.rint(self.repeat.astype(np.float64) * (1 << _WEIGHT_BITS))
        return np.column_stack([np.ones(len(kept)), kept, units, bits]).astype(np.float64)


def count_groups(groups: Groups, rows: Rows, fates: Sequence[Fates]) -> Int64[np.ndarray, "cells columns"]:
    """By cell, the first of all rows, what the columns of `fates`, one after another, add up to. Counts of parts add up."""
    columns = np.concatenate([each.columns for each in fates], axis=1)
    cells = np.concatenate([np.ones((1, len(rows)), dtype=bool), groups.cells(rows)])
    step = max(1, _CELL_ROWS // len(cells))
    parts = (cells[:, at : at + step].astype(np.float64) @ columns[at : at + step] for at in range(0, len(rows), step))
    return np.asarray(sum(part.astype(np.int64) for part in parts))  # sums below 2^53 are exact in float64


def report_groups(
    given: GroupTerms,
    counts: Int64[np.ndarray, "cells columns"],
    rules: Sequence[str],
    max_difference: float,
    facts: Mapping[str, str | None],
) -> GroupReport:
    """
    Args:
        counts: the columns of one ledger, over the whole index.
        facts: further fields.
    """
    every, at = counts[0], 1
    tables: dict[tuple[str, ...], list[GroupCounts]] = {}
    differences: list[Difference] = []
    for kind, cells in given.cells.items():
        some = counts[at : at + len(cells)]
        at += len(cells)
        tables[kind] = [_cell(groups, row, every, rules) for groups, row in zip(cells, some, strict=True)]
        for rule, kept in _kept_by(some, rules).items():
            for category in kind:
                for within, names, of_kept, of_samples in _comparable(given, kind, category, kept, some[:, 0]):
                    differences += _differences(rule, category, within, names, of_kept, of_samples, max_difference)
    return GroupReport(
        **facts,
        samples=int(every[0]),
        kept=int(every[1]),
        max_difference=max_difference,
        categories={kind[0]: table for kind, table in tables.items() if len(kind) == 1},
        crosses=[(kind, table) for kind, table in tables.items() if len(kind) > 1],
        differences=sorted(differences, key=lambda found: -found.difference),
    )


def _cell(
    groups: tuple[str, ...], row: Int64[np.ndarray, " columns"], every: Int64[np.ndarray, " columns"], rules: Sequence[str]
) -> GroupCounts:
    samples, kept, weight, *failed = row.tolist()
    return GroupCounts(
        groups=groups,
        samples=samples,
        kept=kept,
        keep_rate=kept / samples if samples else None,
        share=samples / max(1, int(every[0])),
        epoch_share=weight / max(1, int(every[2])),
        rules={rule: (samples - fails) / samples if samples else None for rule, fails in zip(rules, failed, strict=True)},
    )


def _kept_by(cells: Int64[np.ndarray, "cells columns"], rules: Sequence[str]) -> dict[str | None, Int64[np.ndarray, " cells"]]:
    by_rule: dict[str | None, Int64[np.ndarray, " cells"]] = {rule: cells[:, 0] - cells[:, 3 + i] for i, rule in enumerate(rules)}
    return {None: cells[:, 1]} | by_rule


def _comparable(
    given: GroupTerms,
    kind: tuple[str, ...],
    category: str,
    kept: Int64[np.ndarray, " cells"],
    samples: Int64[np.ndarray, " cells"],
) -> Iterator[tuple[tuple[str, ...], list[str], Int64[np.ndarray, " groups"], Int64[np.ndarray, " groups"]]]:
    """Cells that differ in `category` alone: the groups of the other categories, those of this one, and their counts."""
    names, place = {each: given.names(each) for each in kind}, kind.index(category)
    shape = [len(groups) for groups in names.values()]
    rows = (np.moveaxis(counts.reshape(shape), place, -1).reshape(-1, shape[place]) for counts in (kept, samples))
    others = product(*(groups for each, groups in names.items() if each != category))
    for within, some_kept, some in zip(others, *rows, strict=True):
        yield within, names[category], some_kept, some


def _differences(
    rule: str | None,
    category: str,
    within: tuple[str, ...],
    names: list[str],
    kept: Int64[np.ndarray, " groups"],
    samples: Int64[np.ndarray, " groups"],
    bound: float,
) -> list[Difference]:
    rates = kept / np.maximum(1, samples)
    lows, highs = difference_intervals(kept, samples)
    pairs: Bool[np.ndarray, "groups groups"] = (lows > bound) & (samples[:, None] > 0) & (samples > 0)
    return [
        Difference(
            rule=rule,
            category=category,
            within=within,
            groups=(names[a], names[b]),
            keep_rates=(rates[a], rates[b]),
            difference=rates[a] - rates[b],
            interval=(lows[a, b], highs[a, b]),
        )
        for a, b in np.argwhere(pairs).tolist()
    ]


def difference_intervals(
    kept: Int64[np.ndarray, " groups"], samples: Int64[np.ndarray, " groups"]
) -> tuple[Float[np.ndarray, "groups groups"], Float[np.ndarray, "groups groups"]]:
    """Between what the keep rate of one group (row) less that of another (column) lies, 95 times in 100: Newcombe 1998, method 10, of
    Wilson's intervals. Of few samples it is wide, so that these are not taken for unequal."""
    n = np.maximum(1, samples).astype(np.float64)
    rates = kept / n
    middle, half = rates + _Z**2 / (2 * n), _Z * np.sqrt(rates * (1 - rates) / n + (_Z / (2 * n)) ** 2)
    below = rates - (middle - half) / (1 + _Z**2 / n)
    above = (middle + half) / (1 + _Z**2 / n) - rates
    difference = rates[:, None] - rates
    return difference - np.hypot(below[:, None], above), difference + np.hypot(above[:, None], below)
