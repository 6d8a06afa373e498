"""Ledgers: a decision per sample of an index; and the kept set they compile to.

    INDEX/ledgers/NAME/ledger.json       index fingerprint, rule, its hash, counts
    INDEX/ledgers/NAME/decisions.parquet `repeat` (0 dropped, 1 kept) and `reason`, in the index's order

Several ledgers on one run: what all keep is kept. Position j of the kept set → sample ordinal is one array look-up.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from mm_core.cache import cache_folder
from mm_core.config import Config
from mm_core.data.index import Index
from mm_core.data.permutation import mix
from mm_core.data.scan import usable
from mm_core.errors import DataError


class LedgerSummary(Config):
    """ledger.json."""

    index_fingerprint: str
    rule: str
    kept: int
    dropped: dict[str, int]
    fingerprint: str


@dataclass(frozen=True)
class Kept:
    """The samples a run reads, as ordinals of the index in ascending order, and the name of this choice."""

    ordinals: NDArray[np.uint64]
    fingerprint: str

    def __len__(self) -> int:
        return len(self.ordinals)


def write_ledger(index: Index, name: str, *, rule: str, keep: NDArray[np.bool_], reason: str) -> LedgerSummary:
    """Write a ledger that keeps where `keep` is true and drops the other usable samples for `reason`.

    Args:
        keep: one per row of the index.
    """
    flags = index.locators["flags"]
    good = usable(flags, index.summary.need)
    repeat = (keep & good).astype(np.float32)
    reasons = pa.array([reason if dropped else None for dropped in good & ~keep], pa.string()).dictionary_encode()
    digest = hashlib.blake2b(repeat.tobytes(), digest_size=16)
    digest.update(f"{index.summary.fingerprint} {rule}".encode())
    summary = LedgerSummary(
        index_fingerprint=index.summary.fingerprint,
        rule=rule,
        kept=int(repeat.sum()),
        dropped={reason: int((good & ~keep).sum())},
        fingerprint=digest.hexdigest(),
    )
    fs, folder = fsspec.core.url_to_fs(f"{index.url}/ledgers/{name}")
    fs.makedirs(folder, exist_ok=True)
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
        write_ledger(index, names[0], rule=f"{rule} side={names[0]}", keep=~chosen, reason="held_out"),
        write_ledger(index, names[1], rule=f"{rule} side={names[1]}", keep=chosen, reason="not_held_out"),
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
    if not cached.exists():
        keep = usable(index.locators["flags"], index.summary.need)
        for name in ledgers:
            keep &= _repeat(index, name)
        _write(cached, np.flatnonzero(keep).astype(np.uint64))
    return Kept(np.load(cached, mmap_mode="r", allow_pickle=False), fingerprint)


def _repeat(index: Index, name: str) -> NDArray[np.bool_]:
    with fsspec.open(f"{index.url}/ledgers/{name}/decisions.parquet", "rb") as file:
        repeat = pq.read_table(file, columns=["repeat"])["repeat"]
    if pc.any(pc.and_(pc.not_equal(repeat, 0), pc.not_equal(repeat, 1))).as_py():
        raise DataError(f"ledger {name!r} has sampling weights other than 0 and 1, which this version does not read")
    return np.asarray(repeat.to_numpy() == 1)


def _summary(index: Index, name: str) -> LedgerSummary:
    try:
        with fsspec.open(f"{index.url}/ledgers/{name}/ledger.json", "rt") as file:
            values: dict[str, Any] = json.load(file)
    except (OSError, ValueError):
        raise DataError(f"the index at {index.url} has no ledger {name!r}; it has: {_names(index)}") from None
    summary = LedgerSummary.model_validate(values)
    if summary.index_fingerprint != index.summary.fingerprint:
        raise DataError(f"ledger {name!r} was made for another state of the index at {index.url}: make it again")
    return summary


def _names(index: Index) -> str:
    fs, folder = fsspec.core.url_to_fs(f"{index.url}/ledgers")
    found = sorted(path.rpartition("/")[2] for path in fs.ls(folder, detail=False)) if fs.exists(folder) else []
    return ", ".join(found) or "none"


def _write(path: Path, array: NDArray[Any]) -> None:
    """Whole or not at all, also when several processes compile the same set."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{np.random.default_rng().integers(2**63):x}.tmp")
    with temporary.open("wb") as file:
        np.save(file, array)
    temporary.replace(path)
