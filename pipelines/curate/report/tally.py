"""Pass 1 over an index: what is counted and drawn of one chunk. Tallies of chunks add up, in any order, to that of the whole."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Bool, Float32, Int64, UInt64

from pipelines.curate.report import draw
from pipelines.curate.report.draw import Draws
from pipelines.curate.report.histogram import Spread
from pipelines.curate.report.view import Column, Question, View, counted, text

SIDES = (64, 128, 256, 512, 1024, 2048)
"""Pixels at which a class of widths and heights begins, the first class aside."""
MAX_RULES = 64
_SHOWN_MEMBERS = 6


@dataclass
class Duplicates:
    """Groups of a ledger that has some."""

    groups: int = 0
    samples: int = 0
    """In them, the kept ones included."""
    drawn: dict[tuple[int, int], list[int]] = field(default_factory=dict)
    """By key and ordinal of the kept sample, those dropped for it."""

    @classmethod
    def of(cls, view: View, ledger: str, question: Question) -> Duplicates:
        table = view.decisions[ledger]
        if "group" not in table.column_names:
            return cls()
        column = table["group"].combine_chunks()
        there = column.is_valid().to_numpy(zero_copy_only=False)
        groups, ordinals = column.drop_null().to_numpy().astype(np.uint64), view.ordinals[there]
        keys = draw.keys_of(groups, question.seed)
        copies = groups != ordinals
        names = np.unique(keys[copies])[: question.groups]
        drawn = {}
        for key in names:
            places = np.flatnonzero(copies & (keys == key))
            drawn[int(key), int(groups[places[0]])] = ordinals[places[:_SHOWN_MEMBERS]].tolist()
        return cls(int((~copies).sum()), len(groups), drawn)

    def add(self, other: Duplicates, count: int) -> None:
        self.groups += other.groups
        self.samples += other.samples
        for name, members in other.drawn.items():
            self.drawn[name] = sorted([*self.drawn.get(name, ()), *members])[:_SHOWN_MEMBERS]
        self.drawn = dict(sorted(self.drawn.items())[:count])


@dataclass
class LedgerTally:
    """What one ledger comes to."""

    kept: int = 0
    weight: float = 0.0
    """Sum of the sampling weights."""
    uneven: int = 0
    """Samples whose weight is neither 0 nor 1."""
    reasons: Counter[str] = field(default_factory=Counter)
    together: Int64[np.ndarray, "rules rules"] = field(default_factory=lambda: np.zeros((MAX_RULES, MAX_RULES), dtype=np.int64))
    """Samples that fail both of two rules; on the diagonal, that fail one."""
    alone: Int64[np.ndarray, " rules"] = field(default_factory=lambda: np.zeros(MAX_RULES, dtype=np.int64))
    """That fail one rule and no other."""
    labels: dict[str, Counter[tuple[str, bool]]] = field(default_factory=dict)
    """By rule: of each name it found, and kept or not."""
    duplicates: Duplicates = field(default_factory=Duplicates)

    @classmethod
    def of(cls, view: View, ledger: str, question: Question) -> LedgerTally:
        table, kept = view.decisions[ledger], view.kept(ledger)
        labels = {
            column.removeprefix("label."): _by_kept(text(table, column), kept)
            for column in table.column_names
            if column.startswith("label.")
        }
        together, alone = co_failures(table["fails"].to_numpy()) if "fails" in table.column_names else (_none(), _none().diagonal())
        weight, uneven = _weights(table["repeat"].to_numpy())
        duplicates = Duplicates.of(view, ledger, question)
        reasons = Counter(counted(view.reasons(ledger).filter(pa.array(~kept))))
        return cls(int(kept.sum()), weight, uneven, reasons, together, alone, labels, duplicates)

    def add(self, other: LedgerTally, question: Question) -> None:
        self.kept += other.kept
        self.weight += other.weight
        self.uneven += other.uneven
        self.reasons.update(other.reasons)
        self.together = self.together + other.together
        self.alone = self.alone + other.alone
        for rule, counts in other.labels.items():
            self.labels.setdefault(rule, Counter()).update(counts)
        self.duplicates.add(other.duplicates, question.groups)


@dataclass
class Tally:
    """What the index and its ledgers come to."""

    samples: int = 0
    kept: int = 0
    """By the ledgers that are read together."""
    weight: float = 0.0
    """Sum of their sampling weights, multiplied."""
    uneven: int = 0
    reasons: Counter[tuple[str, str]] = field(default_factory=Counter)
    """The first ledger, and its reason, of those that they do not keep."""
    ledgers: dict[str, LedgerTally] = field(default_factory=dict)
    sizes: Int64[np.ndarray, "7 7 2"] = field(default_factory=lambda: np.zeros((len(SIDES) + 1, len(SIDES) + 1, 2), dtype=np.int64))
    """By class of width, class of height, and kept (0) or dropped."""
    formats: Counter[tuple[str, bool]] = field(default_factory=Counter)
    spreads: dict[Column, Spread] = field(default_factory=dict)
    crossed: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Of two ledgers that are compared, the reasons of both; "" where one keeps."""
    draws: Draws = field(default_factory=dict)

    @classmethod
    def of(cls, question: Question, chunk: int) -> Tally:
        view = View.read(question, chunk)
        kept = view.kept()
        first = pa.array(~kept)
        pairs = zip(
            text(view.together, "ledger").filter(first).to_pylist(), text(view.together, "reason").filter(first).to_pylist(), strict=True
        )
        return cls(
            len(view.ordinals),
            int(kept.sum()),
            *_weights(view.together["repeat"].to_numpy()),
            Counter((ledger, reason or "") for ledger, reason in pairs),
            {name: LedgerTally.of(view, name, question) for name in question.ledgers},
            _sizes(view, kept),
            _by_kept(text(view.table, "image_format"), kept),
            {column: Spread.of(values) for column, values, _ in view.values()},
            _crossed(view, question),
            draw.of(view, question),
        )

    def add(self, other: Tally, question: Question) -> None:
        self.samples += other.samples
        self.kept += other.kept
        self.weight += other.weight
        self.uneven += other.uneven
        self.sizes = self.sizes + other.sizes
        self.reasons.update(other.reasons)
        self.formats.update(other.formats)
        self.crossed.update(other.crossed)
        for name, ledger in other.ledgers.items():
            self.ledgers.setdefault(name, LedgerTally()).add(ledger, question)
        for column, spread in other.spreads.items():
            self.spreads.setdefault(column, Spread()).add(spread)
        draw.merge(self.draws, other.draws, question)


def co_failures(fails: UInt64[np.ndarray, " rows"]) -> tuple[Int64[np.ndarray, "rules rules"], Int64[np.ndarray, " rules"]]:
    """For every two rules the rows that fail both, and for every rule those that fail it alone."""
    patterns, counts = np.unique(fails, return_counts=True)
    bits = (patterns[:, None] >> np.arange(MAX_RULES, dtype=np.uint64) & np.uint64(1)).astype(np.float64)
    together = (bits * counts[:, None]).T @ bits
    alone = counts @ (bits * (bits.sum(axis=1) == 1)[:, None])
    return np.rint(together).astype(np.int64), np.rint(alone).astype(np.int64)


def _none() -> Int64[np.ndarray, "rules rules"]:
    return np.zeros((MAX_RULES, MAX_RULES), dtype=np.int64)


def _by_kept(names: pa.Array, kept: Bool[np.ndarray, " rows"]) -> Counter[tuple[str, bool]]:
    """Null is no name."""
    return Counter(
        {(name, flag): count for flag in (True, False) for name, count in counted(names.filter(pa.array(kept == flag)).drop_null()).items()}
    )


def _sizes(view: View, kept: Bool[np.ndarray, " rows"]) -> Int64[np.ndarray, "7 7 2"]:
    classes = len(SIDES) + 1
    there = view.table["width"].is_valid().to_numpy(zero_copy_only=False) if view.table.num_rows else np.zeros(0, dtype=bool)
    width, height = (np.digitize(view.table[side].drop_null().to_numpy(), SIDES) for side in ("width", "height"))
    places = (width * classes + height) * 2 + ~kept[there]
    return np.bincount(places, minlength=classes * classes * 2).reshape(classes, classes, 2)


def _crossed(view: View, question: Question) -> Counter[tuple[str, str]]:
    if question.compare is None:
        return Counter()
    one, other = (pc.fill_null(view.reasons(name), "") for name in question.compare)
    table = pa.table({"one": one, "other": other}).group_by(["one", "other"]).aggregate([([], "count_all")])
    return Counter({(row["one"], row["other"]): row["count_all"] for row in table.to_pylist()})


def _weights(repeat: Float32[np.ndarray, " rows"]) -> tuple[float, int]:
    """Their sum, and how many are neither 0 nor 1."""
    return float(repeat.sum(dtype=np.float64)), int(((repeat != 0) & (repeat != 1)).sum())
