"""Ledgers: a decision per sample of an index; and the kept set they compile to.

    INDEX/ledgers/NAME/ledger.json           index fingerprint, rule, counts
    INDEX/ledgers/NAME/decisions/*.parquet   `repeat` (0 dropped, 1 kept, else a weight) and `reason`, in the index's order;
                                             of rules also `fails` (a bit per rule) and each rule's `value.RULE`
    INDEX/ledgers/NAME/concepts.parquet      of rules that count what captions are about, samples before and after by concept
    INDEX/ledgers/NAME/groups.json           what `mm data groups` counted

Several ledgers on one run: what all keep is kept, their weights multiply. A place of an epoch → sample ordinal is one array look-up,
with weights other than 0 and 1 one more (`copies.py`).
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from pydantic import Field

from mm_core.cache import cache_folder
from mm_core.config import Config
from mm_core.data.copies import Copies
from mm_core.data.index import Index
from mm_core.data.permutation import U64
from mm_core.data.personal import PersonalKind
from mm_core.data.scan import usable
from mm_core.data.side_table import SideTable, check_name
from mm_core.errors import ConfigError, DataError
from mm_core.store import open_file, open_store, reaching, write_whole


class LedgerSummary(Config):
    """ledger.json."""

    index_fingerprint: str
    rule: str = Field(description="What decided.")
    kept: int
    dropped: dict[str, int] = Field(description="Usable samples that are dropped, by the first reason.")
    fingerprint: str
    rules: dict[str, dict[str, Any]] = Field(default_factory=dict, description="Rules with their parameters, by name, in order.")
    tables: dict[str, str] = Field(default_factory=dict, description="By rule what it looked up that other software brings, as letters.")
    failed: dict[str, int] = Field(default_factory=dict, description="By rule the samples that fail it, whatever else they fail.")
    bounds: dict[str, float] = Field(default_factory=dict, description="By rule the least value that `top` keeps.")
    scores: dict[str, str] = Field(default_factory=dict, description="Fingerprints of the scores that the rules read, by name.")
    mask: tuple[PersonalKind, ...] = Field(default=(), description="Personal data that is masked in captions as they are read.")
    counts: dict[str, dict[str, int]] = Field(default_factory=dict, description="Of duplicates: what each method found.")


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
    copies: Copies | None = None
    """How often each of them comes in an epoch, or None where all come once."""
    mask: tuple[PersonalKind, ...] = ()
    """Personal data that is masked in captions as they are read."""

    def __len__(self) -> int:
        """Places in an epoch."""
        return len(self.ordinals) if self.copies is None or not len(self.ordinals) else len(self.copies)

    def at(self, places: U64, epochs: U64, seed: int) -> U64:
        """The ordinals at `places` of `epochs`."""
        chosen = places if self.copies is None else self.copies.at(places, epochs, seed)
        return np.asarray(self.ordinals[chosen.astype(np.int64)])


@dataclass(frozen=True)
class Decided:
    """What a chunk of a ledger came to."""

    kept: int
    dropped: dict[str, int]
    digest: str
    """Of its weights."""


@dataclass(frozen=True)
class Ledger:
    """A ledger of an index, by name: being written, or there."""

    index: Index
    name: str

    def __post_init__(self) -> None:
        check_name(self.name)

    @property
    def url(self) -> str:
        return f"{self.index.url}/ledgers/{self.name}"

    @property
    def decisions(self) -> SideTable:
        return SideTable(f"{self.url}/decisions", self.index.summary.rows)

    def write_chunk(
        self, chunk: int, repeat: NDArray[np.floating[Any]], reasons: pa.Array, more: Mapping[str, Any] | None = None
    ) -> Decided:
        """Write the decisions on one chunk's rows.

        Args:
            repeat: one per row: 0 drops, 1 keeps, anything else is a sampling weight: 2 is twice an epoch, 0.5 every second.
                What is not usable is dropped whatever it says.
            reasons: strings, why a row is dropped.
            more: further columns.

        Raises:
            DataError: a weight that is negative or not finite.
        """
        if not (np.isfinite(repeat).all() and (repeat >= 0).all()):
            raise DataError(f"ledger {self.name!r}: weights must be finite and not negative")
        first, last = self.decisions.bounds(chunk)
        good = usable(self.index.locators["flags"][first:last], self.index.summary.need)
        repeat = np.where(good, repeat, 0).astype(np.float32)
        reasons = pc.if_else(pa.array(good & (repeat == 0)), reasons, None).cast(pa.string())
        columns = {"repeat": repeat, "reason": reasons.dictionary_encode()} | dict(more or {})
        self.decisions.write(chunk, pa.table(columns))
        counts = {item["values"]: item["counts"] for item in pc.value_counts(reasons.drop_null()).to_pylist()}
        return Decided(int((repeat > 0).sum()), counts, hashlib.blake2b(repeat.tobytes(), digest_size=16).hexdigest())

    def finish(self, decided: Sequence[Decided], *, rule: str, **facts: Any) -> LedgerSummary:
        """Write ledger.json, with which the ledger is there. `facts` are more of its fields."""
        dropped: Counter[str] = Counter()
        for chunk in decided:
            dropped.update(chunk.dropped)
        text = " ".join([self.index.summary.fingerprint, rule, *(chunk.digest for chunk in decided)])
        summary = LedgerSummary(
            index_fingerprint=self.index.summary.fingerprint,
            rule=rule,
            kept=sum(chunk.kept for chunk in decided),
            dropped=dict(dropped),
            fingerprint=hashlib.blake2b(text.encode(), digest_size=16).hexdigest(),
            **facts,
        )
        write_whole(f"{self.url}/ledger.json", summary.model_dump_json(indent=1).encode())
        return summary

    def exists(self) -> bool:
        fs, folder = open_store(self.url)
        return bool(fs.exists(f"{folder}/ledger.json"))

    def claim(
        self,
        rule: str,
        scores: Mapping[str, str] | None = None,
        *,
        rules: Mapping[str, Any] | None = None,
        tables: Mapping[str, str] | None = None,
        among: Sequence[str] = (),
        replace: bool = False,
    ) -> LedgerSummary | None:
        """What is there already by the same rule and scores; None where it is to be written.

        Args:
            rules, tables: what `LedgerSummary` would say, to name what differs; `rule` has a hash of them.
            among: ledgers that are read to write this one.
            replace: write it, whatever is there.

        Raises:
            ConfigError: another ledger of this name is there and is not to be replaced, or it would be read while it is written.
            DataError: what is there cannot be read.
        """
        if self.name in among:
            raise ConfigError(f"the ledger {self.name!r} cannot be written while it is read: give another name than those of --ledger")
        if replace or not self.exists():
            return None
        found = self.summary()
        if (found.rule, found.scores) == (rule, dict(scores or {})):
            return found
        by = _difference(found, rule, scores or {}, rules or {}, tables or {})
        raise ConfigError(f"the index at {self.index.url} has a ledger {self.name!r} by {by}: give another name, or --replace")

    def remove(self) -> None:
        """Its summary first: without it the rest is no ledger."""
        fs, folder = open_store(self.url)
        if fs.exists(f"{folder}/ledger.json"):
            fs.rm(f"{folder}/ledger.json")
        if fs.exists(folder):
            fs.rm(folder, recursive=True)

    def summary(self) -> LedgerSummary:
        """
        Raises:
            DataError: there is no such ledger, or it is of another index.
        """
        try:
            with reaching(self.url), open_file(f"{self.url}/ledger.json", "rt") as file:
                summary = LedgerSummary.model_validate(json.load(file))
        except (FileNotFoundError, NotADirectoryError):
            known = ", ".join(ledger_names(self.index)) or "none (mm data filter and mm data split make some)"
            raise DataError(f"the index at {self.index.url} has no ledger {self.name!r}; it has: {known}") from None
        except (OSError, ValueError) as error:
            raise DataError(f"cannot read {self.url}/ledger.json: {' '.join(str(error).split())[:200]}") from None
        if summary.index_fingerprint != self.index.summary.fingerprint:
            raise DataError(f"ledger {self.name!r} was made for another state of the index at {self.index.url}: remove {self.url}")
        return summary

    def weights(self) -> NDArray[np.float32]:
        """`repeat` of every row.

        Raises:
            DataError: the decisions are damaged.
        """
        chunks = [table["repeat"].to_numpy() for table in self.decisions.tables(["repeat"])]
        repeat = np.concatenate(chunks) if chunks else np.zeros(0)
        if not (np.isfinite(repeat).all() and (repeat >= 0).all()):
            raise DataError(f"ledger {self.name!r} has sampling weights that are negative or not finite: make it again")
        return np.asarray(repeat, dtype=np.float32)


def _difference(found: LedgerSummary, rule: str, scores: Mapping[str, str], rules: Mapping[str, Any], tables: Mapping[str, str]) -> str:
    """By what `found` was made that these are not."""
    if found.rule == rule:
        return f"the same rules with other scores {', '.join(repr(name) for name in scores if found.scores.get(name) != scores[name])}"
    changed = {name: versions for name, versions in tables.items() if found.tables.get(name, versions) != versions}
    if changed and found.rules == rules:
        return "the same rules with " + ", ".join(f"{found.tables[name]} for {name!r}, here {here}" for name, here in changed.items())
    return f"other rules ({found.rule})"


def compile_kept(index: Index, ledgers: Sequence[str] = ()) -> Kept:
    """The kept set of `index` under all of `ledgers`, in whatever order, each once.

    Raises:
        DataError: a ledger that is not there, or is of another index.
    """
    found = [(ledger.summary(), ledger) for ledger in (Ledger(index, name) for name in dict.fromkeys(ledgers))]
    found.sort(key=lambda one: one[0].fingerprint)  # products of weights are rounded: in another order, otherwise
    summaries = [summary for summary, _ in found]
    fingerprint = kept_fingerprint(index, summaries)
    cached = cache_folder() / "kept" / f"{fingerprint}.npy"
    cached_copies = cached.with_suffix(".copies.npz")  # there where weights are, and written first
    if not cached.exists():
        weights = usable(index.locators["flags"], index.summary.need).astype(np.float32)
        with np.errstate(over="ignore", invalid="ignore"):
            for _, ledger in found:
                weights *= ledger.weights()
        if not np.isfinite(weights).all():
            raise DataError(f"the sampling weights of {', '.join(ledgers)} multiplied are more than a number can be: make them smaller")
        chosen = np.flatnonzero(weights).astype(np.uint64)
        weights = weights[chosen.astype(np.int64)]
        if (weights != 1).any():
            cached.parent.mkdir(parents=True, exist_ok=True)
            Copies.of(weights).save(cached_copies)
        _write(cached, chosen)
    copies = Copies.load(cached_copies) if cached_copies.exists() else None
    mask = tuple(kind for kind in PersonalKind if any(kind in summary.mask for summary in summaries))
    return Kept(np.load(cached, mmap_mode="r", allow_pickle=False), fingerprint, copies, mask)


def kept_fingerprint(index: Index, summaries: Sequence[LedgerSummary]) -> str:
    """The name of the choice that these ledgers make together, whatever their order."""
    text = " ".join([index.summary.fingerprint, *sorted(summary.fingerprint for summary in summaries)])
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def ledger_names(index: Index) -> list[str]:
    """Of the ledgers that are there, finished."""
    fs, folder = open_store(f"{index.url}/ledgers")
    found = sorted(path.rstrip("/").rpartition("/")[2] for path in fs.ls(folder, detail=False)) if fs.exists(folder) else []
    return [name for name in found if Ledger(index, name).exists()]


def _write(path: Path, array: NDArray[Any]) -> None:
    """Whole or not at all, also when several processes compile the same set."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{np.random.default_rng().integers(2**63):x}.tmp")
    with temporary.open("wb") as file:
        np.save(file, array)
    temporary.replace(path)
