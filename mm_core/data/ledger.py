"""Ledgers: a decision per sample of an index; and the kept set they compile to.

    INDEX/ledgers/NAME/ledger.json       index fingerprint, rule, its hash, counts
    INDEX/ledgers/NAME/decisions.parquet `repeat` (0 dropped, 1 kept, else a weight) and `reason`, in the index's order

Several ledgers on one run: what all keep is kept, their weights multiply. A place of an epoch → sample ordinal is one array look-up,
with weights other than 0 and 1 a binary search in a second array.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from mm_core.cache import cache_folder
from mm_core.config import Config
from mm_core.data.index import Index
from mm_core.data.permutation import U64, mix
from mm_core.data.scan import usable
from mm_core.errors import DataError
from mm_core.store import make_folder, open_file, open_store

_ROUNDING = 6
"""Keeps the draw of an epoch's first point apart from the keys of the plan, the reader and the mix."""
_WEIGHT_BITS = 24


class LedgerSummary(Config):
    """ledger.json."""

    index_fingerprint: str
    rule: str
    kept: int
    dropped: dict[str, int]
    fingerprint: str


class Source(Config):
    """Where samples come from: an index, and the ledgers that choose among them."""

    index: str
    ledgers: tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: str, ledgers: Sequence[str] = ()) -> Source:
        """`INDEX` or `INDEX#LEDGER,LEDGER`; `ledgers` are read too."""
        index, _, named = text.partition("#")
        own = tuple(name for name in named.split(",") if name)
        return cls(index=index, ledgers=tuple(dict.fromkeys((*own, *ledgers))))

    def __str__(self) -> str:
        return f"{self.index}#{','.join(self.ledgers)}" if self.ledgers else self.index


@dataclass(frozen=True)
class Kept:
    """The samples a run reads, and the name of this choice."""

    ordinals: NDArray[np.uint64]
    """Of the index, ascending."""
    fingerprint: str
    ends: NDArray[np.uint64] | None = None
    """Running total of the samples' weights in units of 2^-24, or None where all weigh 1."""

    def __len__(self) -> int:
        """Places in an epoch: the sum of the weights, rounded down, one at least."""
        if self.ends is None or not len(self.ends):
            return len(self.ordinals)
        return max(1, int(self.ends[-1]) >> _WEIGHT_BITS)

    def at(self, places: U64, epochs: U64, seed: int) -> U64:
        """The ordinals at `places` of `epochs`.

        Weights by systematic sampling: the samples lie one after another on a circle, each as long as its weight; an epoch's places are
        points at equal distances, the first drawn from (seed, epoch). So an epoch holds each sample its weight rounded down or up,
        up with the probability of the fraction, and has the same length as every other.
        """
        if self.ends is None:
            return np.asarray(self.ordinals[places.astype(np.int64)])
        total = self.ends[-1]
        first = mix(seed, _ROUNDING, epochs) % total
        points = (places * (total // np.uint64(len(self))) + first) % total
        return np.asarray(self.ordinals[np.searchsorted(self.ends, points, side="right")])


def write_ledger(index: Index, name: str, *, rule: str, repeat: NDArray[np.floating[Any]], reason: str) -> LedgerSummary:
    """Write a ledger that drops the usable samples whose `repeat` is 0 for `reason`.

    Args:
        repeat: one per row of the index: 0 drops, 1 keeps, anything else is a sampling weight: 2 is twice an epoch, 0.5 every second.

    Raises:
        DataError: a weight that is negative or not finite.
    """
    if not (np.isfinite(repeat).all() and (repeat >= 0).all()):
        raise DataError(f"ledger {name!r}: weights must be finite and not negative")
    good = usable(index.locators["flags"], index.summary.need)
    keep = repeat > 0
    repeat = np.where(good, repeat, 0).astype(np.float32)
    reasons = pa.array([reason if dropped else None for dropped in good & ~keep], pa.string()).dictionary_encode()
    digest = hashlib.blake2b(repeat.tobytes(), digest_size=16)
    digest.update(f"{index.summary.fingerprint} {rule}".encode())
    summary = LedgerSummary(
        index_fingerprint=index.summary.fingerprint,
        rule=rule,
        kept=int((repeat > 0).sum()),
        dropped={reason: int((good & ~keep).sum())},
        fingerprint=digest.hexdigest(),
    )
    fs, folder = open_store(f"{index.url}/ledgers/{name}")
    make_folder(f"{index.url}/ledgers/{name}")
    pq.write_table(pa.table({"repeat": repeat, "reason": reasons}), f"{folder}/decisions.parquet", filesystem=fs, compression="zstd")
    with fs.open(f"{folder}/ledger.json", "w") as file:
        file.write(summary.model_dump_json(indent=1))
    return summary


def split(index: Index, *, heldout: float, seed: int, names: tuple[str, str] = ("train", "heldout")) -> tuple[LedgerSummary, LedgerSummary]:
    """Two ledgers that divide the usable samples at random; which side a sample falls on depends on
    the seed and the names and sizes of its members alone, so a re-index of the same shards divides them the same way."""
    chosen = mix(seed, index.locators["check"].astype(np.uint64)) < np.uint64(int(heldout * 2**64))
    rule = f"split heldout={heldout} seed={seed}"
    return (
        write_ledger(index, names[0], rule=f"{rule} side={names[0]}", repeat=(~chosen).astype(np.float32), reason="held_out"),
        write_ledger(index, names[1], rule=f"{rule} side={names[1]}", repeat=chosen.astype(np.float32), reason="not_held_out"),
    )


def compile_kept(index: Index, ledgers: Sequence[str] = ()) -> Kept:
    """The kept set of `index` under all of `ledgers`.

    Raises:
        DataError: a ledger that is not there, or is of another index.
    """
    summaries = {name: _summary(index, name) for name in ledgers}
    text = " ".join([index.summary.fingerprint, *sorted(s.fingerprint for s in summaries.values())])
    fingerprint = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
    cached = cache_folder() / "kept" / f"{fingerprint}.npy"
    cached_ends = cached.with_suffix(".ends.npy")  # there where weights are, and written first
    if not cached.exists():
        weights = usable(index.locators["flags"], index.summary.need).astype(np.float32)
        for name in ledgers:
            weights *= _repeat(index, name)
        chosen = np.flatnonzero(weights).astype(np.uint64)
        weights = weights[chosen.astype(np.int64)]
        if (weights != 1).any():
            units = np.maximum(1, np.rint(weights.astype(np.float64) * (1 << _WEIGHT_BITS))).astype(np.uint64)
            _write(cached_ends, np.cumsum(units, dtype=np.uint64))
        _write(cached, chosen)
    ends = np.load(cached_ends, mmap_mode="r", allow_pickle=False) if cached_ends.exists() else None
    return Kept(np.load(cached, mmap_mode="r", allow_pickle=False), fingerprint, ends)


def _repeat(index: Index, name: str) -> NDArray[np.float32]:
    with open_file(f"{index.url}/ledgers/{name}/decisions.parquet", "rb") as file:
        repeat = pq.read_table(file, columns=["repeat"])["repeat"].to_numpy()
    if not (np.isfinite(repeat).all() and (repeat >= 0).all()):
        raise DataError(f"ledger {name!r} has sampling weights that are negative or not finite: make it again")
    return np.asarray(repeat, dtype=np.float32)


def _summary(index: Index, name: str) -> LedgerSummary:
    try:
        with open_file(f"{index.url}/ledgers/{name}/ledger.json", "rt") as file:
            values: dict[str, Any] = json.load(file)
    except (OSError, ValueError):
        raise DataError(f"the index at {index.url} has no ledger {name!r}; it has: {_names(index)}") from None
    summary = LedgerSummary.model_validate(values)
    if summary.index_fingerprint != index.summary.fingerprint:
        raise DataError(f"ledger {name!r} was made for another state of the index at {index.url}: make it again")
    return summary


def _names(index: Index) -> str:
    fs, folder = open_store(f"{index.url}/ledgers")
    found = sorted(path.rpartition("/")[2] for path in fs.ls(folder, detail=False)) if fs.exists(folder) else []
    return ", ".join(found) or "none"


def _write(path: Path, array: NDArray[Any]) -> None:
    """Whole or not at all, also when several processes compile the same set."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{np.random.default_rng().integers(2**63):x}.tmp")
    with temporary.open("wb") as file:
        np.save(file, array)
    temporary.replace(path)
