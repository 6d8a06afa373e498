"""`mm data index`: read every shard once, in Ray tasks, and write an index.

A task reads some shards and writes their part of the tables itself, under names nobody else uses, and a note of it last; so a part
is there whole or not at all, and the same command given again after a kill takes what is there. A shard that an earlier index
(`base`) holds unchanged is copied from it instead of read. `index.json` is written last: a folder without it is no index.
"""

from __future__ import annotations

import hashlib
import json
import math
import posixpath
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from mm_core.address import absolute
from mm_core.data.image import MAX_PIXELS
from mm_core.data.index import SHARD_SCHEMA, Index, IndexSummary, shard_version
from mm_core.data.locators import DIGEST, LOCATOR, write_parts
from mm_core.data.problems import Reason
from mm_core.data.scan import SAMPLE_SCHEMA, Batch, scan_shard, shard_name
from mm_core.errors import ConfigError, DataError
from mm_core.store import make_folder, open_file, open_store, reaching
from pipelines import exported
from pipelines.session import ray_session
from pipelines.shards import expand_shards
from pipelines.tasks import processors, run_tasks

_PARTS = "_parts"
_MAX_SHARDS_PER_PART = 32
_MAX_CUT = 100
_UID_RANGES, _UIDS_AT_ONCE = 64, 1 << 23
Progress = Callable[[int, str], None]
"""Called with the number of shards done since the last call, and a note."""


@dataclass(frozen=True)
class _Known:
    """A shard as an earlier index holds it."""

    shard: int
    file: str
    first_row: int
    rows: int
    bytes: int
    version: str


@dataclass(frozen=True)
class _Part:
    """One task: the shards it reads and where it writes. `first` is the number of its first shard."""

    number: int
    first: int
    urls: list[str]
    out: str
    need: list[str]
    max_pixels: int
    base: str
    known: list[_Known | None]

    @property
    def note(self) -> str:
        """What the part says of itself when it is done."""
        return f"{self.out}/{_PARTS}/{self.number:05d}.json"

    @property
    def task(self) -> dict[str, Any]:
        """What must be the same for a finished part to be taken."""
        return {
            "first": self.first,
            "urls": self.urls,
            "need": self.need,
            "max_pixels": self.max_pixels,
            "schema": str(SAMPLE_SCHEMA),
            "digests": True,
        }


def build_index(
    patterns: Sequence[str],
    out: str,
    *,
    base: str | None = None,
    need: tuple[str, ...] = ("image", "text"),
    max_bad_fraction: float = 0.1,
    max_pixels: int = MAX_PIXELS,
    on_progress: Progress = lambda shards, note: None,
    on_shards: Callable[[int], None] = lambda total: None,
) -> Index:
    """Index the shards that `patterns` name (files, folders, globs, `{00..12}` ranges; any fsspec URL).

    Args:
        base: an earlier index. The result is the same as without it, but shards whose size and etag (or time of the last write)
            are those it recorded are not read. It stays as it is.

    Raises:
        ConfigError: `out` holds something already, or `base` was made with other settings.
        DataError: no shard, one that cannot be read, or more unusable samples than `max_bad_fraction`. What was read stays, and
            the same call goes on from there.
    """
    out = absolute(out.rstrip("/"))
    urls = expand_shards(patterns)
    on_shards(len(urls))
    known = _known_shards(base, need, max_pixels) if base else {}
    with _writing(out):
        _claim(out)
    with ray_session():
        with _writing(out):
            per_part = _shards_per_part(out, len(urls))
        parts = [
            _Part(
                number,
                first,
                some := urls[first : first + per_part],
                out,
                [*need],
                max_pixels,
                absolute(base) if base else "",
                [*map(known.get, some)],
            )
            for number, first in enumerate(range(0, len(urls), per_part))
        ]
        found = _run(out, parts, on_progress)
    summary = _assemble(out, need, max_pixels, found)
    fs, folder = open_store(out)
    if not summary.samples:
        fs.rm(folder, recursive=True)
    _check_bad(summary, max_bad_fraction)
    fs.pipe_file(f"{folder}/{_PARTS}/index.json", summary.model_dump_json(indent=1).encode())
    fs.mv(f"{folder}/{_PARTS}/index.json", f"{folder}/index.json")
    fs.rm(f"{folder}/{_PARTS}", recursive=True)
    return Index.open(out)


def _known_shards(base: str, need: tuple[str, ...], max_pixels: int) -> dict[str, _Known]:
    index = Index.open(base)
    if (index.summary.need, index.summary.max_pixels) != (need, max_pixels):
        raise ConfigError(
            f"the index at {base} was made for {'-'.join(index.summary.need)} up to {index.summary.max_pixels:,} pixels, this one is for"
            f" {'-'.join(need)} up to {max_pixels:,}: give the same settings, or leave --base out"
        )
    rows = index.shards.select(["shard", "url", "file", "bytes", "version", "rows"]).to_pylist()
    firsts = np.cumsum([0, *(row["rows"] for row in rows)]).tolist()
    return {r.pop("url"): _Known(first_row=first, **r) for r, first in zip(rows, firsts, strict=False)}


@contextmanager
def _writing(out: str) -> Iterator[None]:
    try:
        with reaching(out):
            yield
    except OSError as error:
        raise DataError(f"cannot write an index to {out}: {error}") from None


def _claim(out: str) -> None:
    """Take the folder: new, empty, or left by a run that did not end."""
    fs, folder = open_store(out)
    if fs.exists(f"{folder}/index.json"):
        raise ConfigError(f"{out} is an index already; an index is never changed: give another --out, or remove it first")
    if fs.exists(folder):
        entries = {posixpath.basename(path.rstrip("/")) for path in fs.ls(folder, detail=False)}
        own = {_PARTS, "samples", "shards.parquet", "locators.npy", "digests.npy"}
        if entries and (entries - own or _PARTS not in entries):
            raise ConfigError(f"{out} exists and holds other things ({', '.join(sorted(entries)[:3])}); give another --out")
    make_folder(f"{out}/{_PARTS}")
    make_folder(f"{out}/samples")


def _shards_per_part(out: str, shards: int) -> int:
    """Eight parts for each CPU, but as many shards as the run before on a machine that may have been another, so that its parts are
    those of this one."""
    fs, folder = open_store(out)
    layout = f"{folder}/{_PARTS}/shards-per-part"
    try:
        return max(1, int(fs.cat_file(layout)))
    except (OSError, ValueError):
        per_part = max(1, min(_MAX_SHARDS_PER_PART, math.ceil(shards / (8 * processors()))))
        fs.pipe_file(layout, str(per_part).encode())
        return per_part


def _run(out: str, parts: list[_Part], on_progress: Progress) -> list[dict[str, Any]]:
    """What every part found, in order. Where one cannot be read, the others stay for the next call; where there are none, nothing does."""
    done: list[dict[str, Any]] = []
    samples, bad = 0, Counter[str]()
    try:
        for _, result in run_tasks(_read_part, parts):
            done.append(result)
            samples += sum(shard["samples"] for shard in result["shards"])
            bad.update(result["bad"])
            on_progress(len(result["shards"]), f"{samples:,} samples" + (f", {bad.total():,} unusable" if bad else ""))
    except DataError as error:
        fs, folder = open_store(out)
        if not fs.glob(f"{folder}/{_PARTS}/*.json"):
            fs.rm(folder, recursive=True)
            raise
        raise DataError(f"{error}; what was read of other shards is kept in {out}, and the same command goes on from there") from None
    return sorted(done, key=lambda result: result["shards"][0]["shard"])


def _read_part(part: _Part) -> dict[str, Any]:
    """Read some shards and write their rows."""
    return _finished(part) or _write_part(part)


def _finished(part: _Part) -> dict[str, Any] | None:
    """What an earlier run wrote of this part, if it did, of the same shards as they are now."""
    try:
        with open_file(part.note, "rt") as file:
            result: dict[str, Any] = json.load(file)
    except (OSError, ValueError):
        return None
    same = result["task"] == part.task and all(_version(s["url"]) == (s["bytes"], s["version"]) for s in result["shards"])
    return result if same else None


def _write_part(part: _Part) -> dict[str, Any]:
    token = f"{part.number:05d}-{uuid.uuid4().hex[:8]}"
    bad: Counter[str] = Counter()
    uids: list[NDArray[np.uint64]] = [np.zeros(0, dtype=np.uint64)]
    shards, digests, cut = [], [], dict[str, int]()
    with (
        open_file(f"{part.out}/samples/part-{token}.parquet", "wb") as file,
        open_file(f"{part.out}/{_PARTS}/{token}.locators", "wb") as locators,
        open_file(f"{part.out}/{_PARTS}/{token}.digests", "wb") as digests_file,
        pq.ParquetWriter(file, SAMPLE_SCHEMA, compression="zstd", sorting_columns=[pq.SortingColumn(0), pq.SortingColumn(1)]) as writer,
    ):
        for shard, (url, known) in enumerate(zip(part.urls, part.known, strict=True), part.first):
            version, digest, rows, samples = _version(url), hashlib.blake2b(shard_name(url).encode(), digest_size=16), 0, 0
            unchanged = known is not None and version[1] != "" and version == (known.bytes, known.version)
            scan = scan_shard(url, shard, tuple(part.need), max_pixels=part.max_pixels)
            for batch in _copied(part.base, known, shard) if known is not None and unchanged else scan:
                writer.write_table(batch.table, row_group_size=len(batch.table))
                locators.write(batch.locators.tobytes())
                digests_file.write(_binary(batch.table["digest"].to_pylist()))
                good = batch.table.filter(pc.is_null(batch.table["reason"]))
                rows, samples = rows + len(batch.table), samples + len(good)
                bad.update(batch.table["reason"].drop_null().to_pylist())
                for row in batch.table.filter(pc.equal(batch.table["reason"], Reason.TRUNCATED.value)).to_pylist():
                    cut[url] = row["start"]
                uids.append(np.fromiter(map(_hash64, good["uid"].to_pylist()), dtype=np.uint64, count=len(good)))
                digest.update(_listing(batch.table))
            if _version(url) != version:
                raise DataError(f"shard {url} was written while it was read: wait until it is whole, and give the command again")
            digests.append(digest.hexdigest())
            exported.add(exported.INDEX_SAMPLES, samples)
            exported.add(exported.INDEX_BYTES, version[0])
            shards.append(
                {"shard": shard, "url": url, "bytes": version[0], "version": version[1], "rows": rows, "samples": samples}
                | {"file": f"part-{token}.parquet"}
            )
    for reason, count in bad.items():
        exported.add(exported.INDEX_BAD, count, reason=reason)
    bounds = _write_uids(f"{part.out}/{_PARTS}/{token}.uids", np.concatenate(uids))
    result = {"task": part.task, "token": token, "bad": dict(bad), "shards": shards, "digests": digests, "uid_bounds": bounds, "cut": cut}
    with open_file(part.note, "wt") as note:
        note.write(json.dumps(result))
    return result


def _copied(base: str, known: _Known, shard: int) -> Iterator[Batch]:
    """A shard's rows out of an earlier index, under its new number."""
    index, first = Index.open(base), known.first_row
    with open_file(f"{base}/samples/{known.file}", "rb") as file:
        table = pq.ParquetFile(file)
        for group in range(table.num_row_groups):
            statistics = table.metadata.row_group(group).column(0).statistics
            if not statistics.min <= known.shard <= statistics.max:
                continue
            rows = table.read_row_group(group)
            rows = rows.filter(pc.equal(rows["shard"], known.shard))
            locators = np.array(index.locators[first : first + len(rows)])
            locators["shard"] = shard
            yield Batch(rows.set_column(0, SAMPLE_SCHEMA.field(0), pa.array(np.full(len(rows), shard, dtype=np.uint32))), locators)
            first += len(rows)
    if first != known.first_row + known.rows:
        raise DataError(f"the index at {base} is damaged: {known.file} holds {first - known.first_row} of {known.rows} rows of a shard")


def _write_uids(url: str, uids: NDArray[np.uint64]) -> list[int]:
    """Hashes of a part's uids, sorted, and where each of 64 ranges of hashes begins: doubles are looked for range by range."""
    uids.sort()
    with open_file(url, "wb") as file:
        file.write(uids.tobytes())
    edges = np.arange(_UID_RANGES, dtype=np.uint64) << np.uint64(58)
    return [*np.searchsorted(uids, edges).tolist(), len(uids)]


def _duplicate_uids(out: str, done: list[dict[str, Any]]) -> int:
    """How many uids another sample had before. At any one time a sixty-fourth of the hashes is held, or 64 MB."""
    total = sum(result["uid_bounds"][-1] for result in done)
    step = _UID_RANGES if total <= _UIDS_AT_ONCE else 1
    repeated = 0
    for k in range(0, _UID_RANGES, step):
        slices = []
        for result in done:
            first, last = result["uid_bounds"][k], result["uid_bounds"][k + step]
            if last > first:
                fs, path = open_store(f"{out}/{_PARTS}/{result['token']}.uids")
                slices.append(fs.cat_file(path, start=8 * first, end=8 * last))
        uids = np.frombuffer(b"".join(slices), dtype=np.uint64)
        repeated += len(uids) - len(np.unique(uids))
    return repeated


def _assemble(out: str, need: tuple[str, ...], max_pixels: int, done: list[dict[str, Any]]) -> IndexSummary:
    fs, folder = open_store(out)
    shards = [shard for result in done for shard in result["shards"]]
    for stray in {posixpath.basename(path) for path in fs.glob(f"{folder}/samples/part-*.parquet")} - {shard["file"] for shard in shards}:
        fs.rm(f"{folder}/samples/{stray}")
    pq.write_table(pa.Table.from_pylist(shards, schema=SHARD_SCHEMA), f"{folder}/shards.parquet", filesystem=fs)
    rows = write_parts(f"{out}/locators.npy", [f"{out}/{_PARTS}/{result['token']}.locators" for result in done], LOCATOR)
    write_parts(f"{out}/digests.npy", [f"{out}/{_PARTS}/{result['token']}.digests" for result in done], DIGEST)
    fingerprint = hashlib.blake2b(" ".join(d for result in done for d in result["digests"]).encode(), digest_size=16)
    fingerprint.update(f"need={','.join(need)} max_pixels={max_pixels}".encode())
    bad = sum((Counter(result["bad"]) for result in done), Counter[str]())
    return IndexSummary(
        fingerprint=fingerprint.hexdigest(),
        shards=len(shards),
        samples=sum(shard["samples"] for shard in shards),
        rows=rows,
        bytes=sum(shard["bytes"] for shard in shards),
        need=need,
        max_pixels=max_pixels,
        bad=dict(bad.most_common()),
        cut=dict(islice(((url, start) for result in done for url, start in result["cut"].items()), _MAX_CUT)),
        duplicate_uids=_duplicate_uids(out, done),
    )


def _check_bad(summary: IndexSummary, max_bad_fraction: float) -> None:
    bad = sum(summary.bad.values())
    reasons = ", ".join(f"{reason} {n:,}" for reason, n in summary.bad.items())
    if not summary.samples:
        unpaired = {Reason.NO_IMAGE, Reason.NO_TEXT} & set(summary.bad)
        way_out = "; for texts or images alone give --modality text or --modality image" if unpaired else ""
        raise DataError(f"the shards hold no usable sample ({summary.rows:,} rows{': ' + reasons if reasons else ''}){way_out}")
    if bad > max_bad_fraction * summary.rows:
        raise DataError(
            f"{bad:,} of {summary.rows:,} samples ({bad / summary.rows:.0%}) cannot be used, above --max-bad-fraction {max_bad_fraction}:"
            f" {reasons}; mend the shards, or raise the bound to go on without these samples (what was read is not read again)"
        )


def _version(url: str) -> tuple[int, str]:
    try:
        size, version = shard_version(url)
    except OSError as error:
        raise DataError(f"cannot read shard {url}: {error}") from None
    if size == 0:
        raise DataError(f"shard {url} is empty (0 bytes): remove it, or copy it again")
    return size, version


def _listing(table: pa.Table) -> bytes:
    """What a fingerprint covers of each row: its place, its content, and whether it is usable."""
    columns = (table[name].to_pylist() for name in ("start", "digest", "reason"))
    return "".join(f"{start} {digest or ''} {reason or ''}\n" for start, digest, reason in zip(*columns, strict=True)).encode()


def _binary(digests: list[str | None]) -> bytes:
    """16 bytes each; zeros for a row without a sample."""
    return b"".join(bytes.fromhex(digest) if digest else bytes(DIGEST.itemsize) for digest in digests)


def _hash64(uid: str) -> int:
    return int.from_bytes(hashlib.blake2b(uid.encode(), digest_size=8).digest(), "little")
