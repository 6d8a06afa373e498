"""`mm data peek`: a few samples as training sees them, or some of those that a ledger drops for one reason, and what was decided."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mm_core.config import nearest
from mm_core.data.among import Among, named
from mm_core.data.index import Index
from mm_core.data.ledger import Ledger
from mm_core.data.permutation import permute
from mm_core.data.side_table import SideTable
from mm_core.errors import ConfigError
from pipelines.curate.report.draw import keys_of
from pipelines.curate.report.pictures import Shown, read_samples

_COLUMNS = ["image_format", "width", "height"]


@dataclass(frozen=True)
class Peeked:
    """One sample."""

    shown: Shown
    image_format: str | None
    width: int | None
    height: int | None
    bytes: int
    """In its shard, headers too."""
    repeat: float
    """How often an epoch reads it: 0 of one that is dropped."""
    reason: str | None
    """`LEDGER: REASON` of the first that drops it."""

    @property
    def decided(self) -> str:
        return self.reason or ("" if self.repeat == 1 else f"weight {self.repeat:.3g}")

    @property
    def picture(self) -> str:
        return f"{self.image_format} {self.width}x{self.height}" if self.image_format else ""

    def facts(self) -> dict[str, Any]:
        """For `--json`."""
        shown = {"ordinal": self.shown.ordinal, "uid": self.shown.uid, "place": self.shown.place, "captions": list(self.shown.captions)}
        measured = {"format": self.image_format, "width": self.width, "height": self.height, "bytes": self.bytes}
        return shown | measured | {"repeat": self.repeat, "reason": self.reason, "problem": self.shown.problem}


def peek(index: Index, among: Among, count: int, *, reason: str | None = None, seed: int = 0, pictures: bool = False) -> list[Peeked]:
    """Up to `count` samples drawn at random: of those that all ledgers keep, or of those whose first reason is `reason`, with or without
    its ledger's name in front. Chunks of the index are looked at in an order drawn from the seed, until there are enough.

    Raises:
        ConfigError: no ledger drops a sample for this reason.
        DataError: decisions that are damaged.
    """
    if reason is not None:
        _check_reason(index, among, reason)
    drawn: dict[int, tuple[float, str | None]] = {}
    for first, last in _chunks(index, seed):
        decisions = among.decisions(index, first, last)
        reasons, both = decisions["reason"].combine_chunks().cast(pa.string()), named(decisions)
        repeat = decisions["repeat"].to_numpy()
        chosen = repeat > 0 if reason is None else _equal(reasons, reason) | _equal(both, reason)
        ordinals = np.flatnonzero(chosen).astype(np.uint64) + np.uint64(first)
        for ordinal in ordinals[np.argsort(keys_of(ordinals, seed))][: count - len(drawn)].tolist():
            drawn[ordinal] = (float(repeat[ordinal - first]), both[ordinal - first].as_py())
        if len(drawn) == count:
            break
    shown = read_samples(index, drawn, among.mask, pictures=pictures)
    return [_peeked(index, shown[ordinal], *decided) for ordinal, decided in drawn.items()]


def _chunks(index: Index, seed: int) -> Iterator[tuple[int, int]]:
    chunks = SideTable("", index.summary.rows)
    for chunk in permute(np.arange(len(chunks), dtype=np.uint64), len(chunks), seed).tolist():
        yield chunks.bounds(chunk)


def _equal(names: pa.Array, name: str) -> np.ndarray[Any, np.dtype[np.bool_]]:
    return np.asarray(pc.fill_null(pc.equal(names, name), False).to_numpy(zero_copy_only=False), dtype=bool)


def _check_reason(index: Index, among: Among, reason: str) -> None:
    if not among.ledgers:
        raise ConfigError("--reason is why a ledger drops samples: name one with --ledger")
    known = {name: list(Ledger(index, name).summary().dropped) for name in among.ledgers}
    whole = [f"{name}: {each}" for name, reasons in known.items() for each in reasons]
    alone = [each for reasons in known.values() for each in reasons]
    if reason not in whole + alone:
        raise ConfigError(f"no sample is dropped for {reason!r}; reasons are {', '.join(whole) or '(none)'}{nearest(reason, alone)}")


def _peeked(index: Index, shown: Shown, repeat: float, reason: str | None) -> Peeked:
    (row,) = index.rows(shown.ordinal, shown.ordinal + 1, _COLUMNS).to_pylist()
    size = int(index.locators["span"][shown.ordinal])
    return Peeked(shown, row["image_format"], row["width"], row["height"], size, repeat, reason)
