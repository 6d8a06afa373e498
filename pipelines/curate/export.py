"""`mm data export`: the samples that ledgers keep, as new WebDataset shards. Each shard is written by a Ray task of its own.

    OUT/00000.tar, 00001.tar, …
    OUT/sizes.json     samples of each shard, as open_clip reads it
    OUT/export.json    what was exported and how; written last
    OUT/_export/       until then: the plan, and a note of each shard that is there

A shard is there whole or not at all, so the same call after a stop writes those that are missing.
"""

from __future__ import annotations

import json
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import numpy as np
from pydantic import Field

from mm_core.address import absolute
from mm_core.config import Config
from mm_core.data.export import END_BYTES, ExportOrder, ShardFile, blocks, members_of, sample_bytes, shard_ends
from mm_core.data.index import Index
from mm_core.data.ledger import Source, compile_kept
from mm_core.data.permutation import U64
from mm_core.data.personal import PersonalKind
from mm_core.data.problems import SampleProblem
from mm_core.data.reader import IndexReader
from mm_core.errors import ConfigError, DataError
from mm_core.store import open_file, open_store, reaching, write_whole, writing_whole
from pipelines.session import ray_session
from pipelines.shards import check_shards
from pipelines.tasks import run_tasks

DEFAULT_SHARD_BYTES = 256 * 10**6
_UNFINISHED = "_export"
_READ_BYTES = 32 << 20
"""Of samples that are held at a time; reads of a remote store within them run beside one another."""
Progress = Callable[[int], None]
"""Called with the number of samples written or left out since the last call."""


class ExportPlan(Config):
    """What decides on every byte of an export."""

    index_fingerprint: str
    kept_fingerprint: str = Field(description="Of the index and all ledgers.")
    max_bytes: int | None = Field(description="Of a shard; more where captions or uids are written into the JSON.")
    max_samples: int | None = Field(description="Of a shard.")
    repeat: bool
    shuffle: bool
    seed: int
    mask: tuple[PersonalKind, ...] = Field(description="Personal data that is masked in captions.")
    version: int = 1


class ExportSummary(Config):
    """export.json."""

    plan: ExportPlan
    index: str
    ledgers: tuple[str, ...]
    shards: int
    samples: int
    bytes: int
    skipped: dict[str, int] = Field(description="Samples that could not be read, by reason.")


@dataclass(frozen=True)
class Export:
    """An export that could be written: everything is known but the bytes."""

    index: Index
    source: Source
    order: ExportOrder
    plan: ExportPlan
    ends: list[int]
    """Of each shard, in places of the order."""
    bytes: int
    """What the samples take where they come from."""

    @classmethod
    def of(
        cls,
        source: Source,
        *,
        max_bytes: int | None = None,
        max_samples: int | None = None,
        repeat: bool = False,
        shuffle: bool = False,
        seed: int = 0,
    ) -> Export:
        """Shards of 256 MB where neither bound is given. Reads locators and ledgers alone.

        Raises:
            DataError: an index or ledger that is not there, or nothing is kept.
        """
        index = Index.open(source.index)
        kept = compile_kept(index, source.ledgers)
        if not len(kept.ordinals):
            raise DataError(f"nothing of {index.url} is kept by {', '.join(source.ledgers) or 'the index'}: there is nothing to export")
        if max_bytes is None and max_samples is None:
            max_bytes = DEFAULT_SHARD_BYTES
        order = ExportOrder(kept, repeat, shuffle, seed)
        sizes = sample_bytes(order, index.locators)
        plan = ExportPlan(
            index_fingerprint=index.summary.fingerprint,
            kept_fingerprint=kept.fingerprint,
            max_bytes=max_bytes,
            max_samples=max_samples,
            repeat=repeat,
            shuffle=shuffle,
            seed=seed,
            mask=kept.mask,
        )
        ends = shard_ends(sizes, max_bytes=max_bytes and max(1, max_bytes - END_BYTES), max_samples=max_samples)
        return cls(index, Source(index=index.url, ledgers=source.ledgers), order, plan, ends, int(sizes.sum(dtype=np.uint64)))

    @property
    def weighted(self) -> int:
        """Samples whose weight, other than 0 and 1, is lost."""
        copies = self.order.kept.copies
        return 0 if copies is None or self.order.repeat else copies.uneven

    def write(self, out: str, *, max_bad_fraction: float = 0.1, on_progress: Progress = lambda samples: None) -> ExportSummary:
        """Write the shards into the folder or URL `out`. An export by the same plan that is there is given back as it is, one that was
        stopped goes on; shards that lack samples are then tried again.

        Raises:
            ConfigError: `out` holds something else.
            DataError: the index has no digests, a shard of it is not what it was, or more samples than `max_bad_fraction` cannot be read.
        """
        out = absolute(out.rstrip("/"))
        IndexReader(self.index, verify=True)  # raises where that cannot be
        with _writing(out):
            found = _finished_export(out, self.plan)
        if found is not None:
            on_progress(len(self.order))
            return found
        with ray_session():
            check_shards([self.index])
            with _writing(out):
                write_whole(f"{out}/{_UNFINISHED}/plan.json", self.plan.model_dump_json().encode())
            notes = self._write_shards(out, max_bad_fraction, on_progress)
        skipped = sum((Counter(note["skipped"]) for note in notes), Counter[str]())
        summary = ExportSummary(
            plan=self.plan,
            index=self.index.url,
            ledgers=self.source.ledgers,
            shards=len(notes),
            samples=sum(note["samples"] for note in notes),
            bytes=sum(note["bytes"] for note in notes),
            skipped=dict(skipped.most_common()),
        )
        with _writing(out):
            sizes = {_name(number, len(self.ends)): note["samples"] for number, note in enumerate(notes)}
            write_whole(f"{out}/sizes.json", json.dumps(sizes, indent=1).encode())
            write_whole(f"{out}/export.json", summary.model_dump_json(indent=1).encode())
            fs, folder = open_store(out)
            fs.rm(f"{folder}/{_UNFINISHED}", recursive=True)
        return summary

    def _write_shards(self, out: str, max_bad_fraction: float, on_progress: Progress) -> list[dict[str, Any]]:
        """The note of each shard, in order."""
        shards = [
            _Shard(out, number, _name(number, len(self.ends)), first, last)
            for number, (first, last) in enumerate(zip([0, *self.ends], self.ends, strict=False))
        ]
        job = _Job(self.source, self.plan, uuid.uuid4().hex)
        notes: dict[int, dict[str, Any]] = {}
        skipped = Counter[str]()
        for number, note in run_tasks(partial(_write_shard, job), shards):
            notes[number] = note
            skipped.update(note["skipped"])
            if skipped.total() > max_bad_fraction * len(self.order):
                why = ", ".join(f"{reason} {n:,}" for reason, n in skipped.most_common())
                raise DataError(
                    f"{skipped.total():,} of {len(self.order):,} samples of {self.index.url} cannot be read, above --max-bad-fraction"
                    f" {max_bad_fraction}: {why}; mend the shards and give the command again, or raise the bound"
                )
            on_progress(note["samples"] + sum(note["skipped"].values()))
        return [notes[number] for number in sorted(notes)]


@dataclass(frozen=True)
class _Job:
    """What every task needs."""

    source: Source
    plan: ExportPlan
    call: str
    """So that what a reader remembers of damaged samples ends with the call that met them."""


@dataclass(frozen=True)
class _Shard:
    out: str
    number: int
    name: str
    first: int
    last: int

    @property
    def url(self) -> str:
        return f"{self.out}/{self.name}"

    @property
    def note(self) -> str:
        return f"{self.out}/{_UNFINISHED}/{self.name}.json"


def _name(number: int, shards: int) -> str:
    return f"{number:0{max(5, len(str(shards - 1)))}d}.tar"


def _write_shard(job: _Job, shard: _Shard) -> dict[str, Any]:
    """Write a shard, or take the one that an earlier run wrote. Returns its note: samples, bytes, and what was left out."""
    with _writing(shard.out):
        if (found := _finished(shard)) is not None:
            return found
    order, reader = _opened(job)
    ordinals = order.between(shard.first, shard.last)
    skipped = Counter[str]()
    with _writing(shard.out), writing_whole(shard.url, f"{shard.out}/{_UNFINISHED}") as file:
        writer = ShardFile(file)
        for first, last in blocks(reader.index.locators["span"][ordinals.astype(np.int64)], _READ_BYTES):
            skipped.update(_copy(reader, ordinals[first:last], shard.first + first, writer, job.plan.mask))
        writer.close()
        size = file.tell()
    note = {"samples": len(ordinals) - skipped.total(), "bytes": size, "skipped": dict(skipped)}
    with _writing(shard.out):
        write_whole(shard.note, json.dumps(note).encode())
    return note


def _copy(reader: IndexReader, ordinals: U64, place: int, writer: ShardFile, mask: Sequence[PersonalKind]) -> Counter[str]:
    """Write some samples, the first of them under `place`. Returns those that cannot be, by reason."""
    skipped = Counter[str]()
    for i, (ordinal, group) in enumerate(zip(map(int, ordinals), reader.groups(ordinals), strict=True)):
        try:
            if isinstance(group, SampleProblem):
                raise group
            writer.write(place + i, members_of(group, reader.name_of(ordinal), mask))
        except SampleProblem as problem:
            skipped[problem.reason.value] += 1
    return skipped


def _finished(shard: _Shard) -> dict[str, Any] | None:
    """The note of a shard that is there, and lacks nothing."""
    note = _json(shard.note)
    if note is None or note.get("skipped") != {}:
        return None
    fs, path = open_store(shard.url)
    return note if fs.exists(path) and fs.size(path) == note["bytes"] else None


@lru_cache(maxsize=2)
def _opened(job: _Job) -> tuple[ExportOrder, IndexReader]:
    index = Index.open(job.source.index)
    kept = compile_kept(index, job.source.ledgers)
    if kept.fingerprint != job.plan.kept_fingerprint:
        raise DataError(f"a ledger of the index at {index.url} was made again while it was exported: give the command again")
    return ExportOrder(kept, job.plan.repeat, job.plan.shuffle, job.plan.seed), IndexReader(index, verify=True)


def _finished_export(out: str, plan: ExportPlan) -> ExportSummary | None:
    """What came of the same export, if it is there; None where the folder is new, empty, or left by a stop of it."""
    fs, folder = open_store(out)
    ours = plan.model_dump(mode="json")
    if (found := _json(f"{out}/export.json")) is not None:
        if found.get("plan") == ours:
            return ExportSummary.model_validate(found)
        raise ConfigError(f"{out} holds another export (its export.json says which): give another --out, or remove it first")
    if (found := _json(f"{out}/{_UNFINISHED}/plan.json")) is not None:
        if found != ours:
            raise ConfigError(f"{out} holds a stopped export of other samples or settings: give another --out, or remove it first")
        return None
    if fs.exists(folder) and (entries := fs.ls(folder, detail=False)):
        names = ", ".join(sorted(entry.rstrip("/").rpartition("/")[2] for entry in entries)[:3])
        raise ConfigError(f"{out} exists and holds other things ({names}): give another --out")
    return None


def _json(url: str) -> dict[str, Any] | None:
    """None where it is not there; what is no object is empty."""
    try:
        with reaching(url), open_file(url, "rt") as file:
            found = json.load(file)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


@contextmanager
def _writing(out: str) -> Iterator[None]:
    try:
        with reaching(out):
            yield
    except OSError as error:
        raise DataError(f"cannot write shards to {out}: {error}") from None
