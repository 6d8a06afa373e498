"""`mm data index`: read every shard once, as a Ray Data job, and write an index.

Tasks write their part of the tables themselves and send back a summary, so nothing a sample needs passes through the driver.
`index.json` is written last: a folder without it is no index, and what a failed run wrote is removed.
"""

from __future__ import annotations

import hashlib
import math
import posixpath
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import braceexpand
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray.data

from mm_core.address import absolute
from mm_core.data.image import MAX_PIXELS
from mm_core.data.index import SHARD_SCHEMA, Index, IndexSummary, shard_version
from mm_core.data.locators import LOCATOR, write_parts
from mm_core.data.scan import scan_shard, shard_name, to_table
from mm_core.errors import ConfigError, DataError

_MAX_SHARDS_PER_PART = 32
_PARTS = "_parts"
Progress = Callable[[int, str], None]
"""Called with the number of shards done since the last call, and a note."""


@dataclass(frozen=True)
class _Part:
    """One task: the shards it reads and where it writes. `first` is the ordinal of its first shard."""

    number: int
    first: int
    urls: list[str]
    out: str
    need: tuple[str, ...]
    max_pixels: int


def build_index(
    patterns: Sequence[str],
    out: str,
    *,
    need: tuple[str, ...] = ("image", "text"),
    max_bad_fraction: float = 0.1,
    max_pixels: int = MAX_PIXELS,
    on_progress: Progress = lambda shards, note: None,
    on_shards: Callable[[int], None] = lambda total: None,
) -> Index:
    """Index the shards that `patterns` name (files, folders, globs, `{00..12}` ranges; any fsspec URL).

    Raises:
        ConfigError: `out` holds something already.
        DataError: no shard, one that cannot be read, or more unusable samples than `max_bad_fraction`.
    """
    out = absolute(out.rstrip("/"))
    urls = expand_shards(patterns)
    on_shards(len(urls))
    _claim(out)
    try:
        summary = _run(urls, out, need, max_pixels, on_progress)
        _check_bad(summary, max_bad_fraction)
        with fsspec.open(f"{out}/index.json", "wt") as file:
            file.write(summary.model_dump_json(indent=1))
    except BaseException:
        fs, folder = fsspec.core.url_to_fs(out)
        fs.rm(folder, recursive=True)
        raise
    return Index.open(out)


def expand_shards(patterns: Sequence[str]) -> list[str]:
    """Addresses of the shards, sorted, each once.

    Raises:
        DataError: a pattern that matches nothing.
    """
    found: dict[str, None] = {}
    for pattern in patterns:
        matches: list[str] = []
        for one in braceexpand.braceexpand(pattern) if "{" in pattern else [pattern]:
            matches += _matches(absolute(one))
        if not matches:
            raise DataError(
                f"no shard at {pattern}: name .tar files, a folder that holds some, a glob, or a range like {{00000..00012}}.tar"
            )
        found |= dict.fromkeys(matches)
    return sorted(found)


def _matches(pattern: str) -> list[str]:
    try:
        fs, path = fsspec.core.url_to_fs(pattern)
        if fs.isdir(path):
            paths = [p for p in fs.find(path) if p.endswith(".tar")]
        elif any(c in path for c in "*?["):
            paths = [p for p in fs.glob(path) if not fs.isdir(p)]
        else:
            paths = [path] if fs.exists(path) else []
    except (OSError, ValueError, ImportError) as error:
        raise DataError(f"cannot list {pattern}: {error}") from None
    return [str(p) if "://" not in pattern else str(fs.unstrip_protocol(p)) for p in paths]


def _claim(out: str) -> None:
    """Take the folder: new, empty, or left by a run that was killed."""
    fs, folder = fsspec.core.url_to_fs(out)
    if fs.exists(f"{folder}/index.json"):
        raise ConfigError(f"{out} is an index already; an index is never changed: give another --out, or remove it first")
    if fs.exists(folder):
        entries = {posixpath.basename(path.rstrip("/")) for path in fs.ls(folder, detail=False)}
        if entries - {_PARTS, "samples", "shards.parquet", "locators.npy"}:
            raise ConfigError(f"{out} exists and holds other things ({', '.join(sorted(entries)[:3])}); give another --out")
        fs.rm(folder, recursive=True)
    fs.makedirs(f"{folder}/samples")
    fs.makedirs(f"{folder}/{_PARTS}")


def _run(urls: list[str], out: str, need: tuple[str, ...], max_pixels: int, on_progress: Progress) -> IndexSummary:
    cpus = max(1, int(ray.cluster_resources().get("CPU", 1)))
    per_part = max(1, min(_MAX_SHARDS_PER_PART, math.ceil(len(urls) / (4 * cpus))))
    parts = [
        _Part(number, first, urls[first : first + per_part], out, need, max_pixels)
        for number, first in enumerate(range(0, len(urls), per_part))
    ]
    tasks = ray.data.from_items([asdict(part) for part in parts], override_num_blocks=len(parts)).map(_read_part)
    done: list[dict[str, Any]] = []
    samples, bad = 0, Counter[str]()
    for result in tasks.iter_rows():
        if result["error"]:
            raise DataError(result["error"])
        done.append(result)
        samples += result["usable"]
        bad.update({reason: n for reason, n in result["bad"].items() if n})
        on_progress(len(result["shards"]), f"{samples:,} samples" + (f", {bad.total():,} unusable" if bad else ""))
    done.sort(key=lambda result: result["number"])
    return _assemble(out, need, done, samples, dict(bad.most_common()))


def _read_part(task: dict[str, Any]) -> dict[str, Any]:
    """Read some shards and write their rows. An error goes back as a value: Ray's wrapping would bury it."""
    part = _Part(**task)
    try:
        return _write_part(part) | {"error": ""}
    except DataError as error:
        return {"number": part.number, "error": str(error), "usable": 0, "bad": {}, "shards": [], "uids": b"", "digests": []}


def _write_part(part: _Part) -> dict[str, Any]:
    bad: Counter[str] = Counter()
    uids: list[int] = []
    shards, digests, usable = [], [], 0
    with (
        fsspec.open(f"{part.out}/samples/part-{part.number:05d}.parquet", "wb") as samples,
        fsspec.open(f"{part.out}/{_PARTS}/{part.number:05d}.locators", "wb") as locators,
    ):
        writer: pq.ParquetWriter | None = None
        for shard, url in enumerate(part.urls, part.first):
            size, version = _version(url)
            read = scan_shard(url, shard, tuple(part.need), max_pixels=part.max_pixels)
            table = to_table(read.rows)
            writer = writer or pq.ParquetWriter(samples, table.schema, compression="zstd")
            writer.write_table(table)
            locators.write(read.locators.tobytes())
            reasons = Counter(row["reason"] for row in read.rows if row.get("reason"))
            bad.update(reasons)
            usable += len(read.rows) - reasons.total()
            uids += [_hash64(row["uid"]) for row in read.rows if row.get("uid") and not row.get("reason")]
            digests.append(_content_digest(url, read.rows))
            shards.append({"shard": shard, "url": url, "bytes": size, "version": version, "rows": len(read.rows)})
        if writer is not None:
            writer.close()
    packed = np.asarray(uids, dtype=np.uint64).tobytes()
    return {"number": part.number, "usable": usable, "bad": dict(bad), "shards": shards, "uids": packed, "digests": digests}


def _assemble(out: str, need: tuple[str, ...], done: list[dict[str, Any]], samples: int, bad: dict[str, int]) -> IndexSummary:
    fs, folder = fsspec.core.url_to_fs(out)
    shards = [shard for result in done for shard in result["shards"]]
    pq.write_table(pa.Table.from_pylist(shards, schema=SHARD_SCHEMA), f"{folder}/shards.parquet", filesystem=fs)
    parts = [f"{out}/{_PARTS}/{result['number']:05d}.locators" for result in done]
    rows = write_parts(f"{out}/locators.npy", parts, LOCATOR)
    fs.rm(f"{folder}/{_PARTS}", recursive=True)
    uids = np.frombuffer(b"".join(result["uids"] for result in done), dtype=np.uint64)
    fingerprint = hashlib.blake2b(" ".join(d for result in done for d in result["digests"]).encode(), digest_size=16)
    fingerprint.update(f"need={','.join(need)}".encode())
    return IndexSummary(
        fingerprint=fingerprint.hexdigest(),
        shards=len(shards),
        samples=samples,
        rows=rows,
        bytes=sum(shard["bytes"] for shard in shards),
        need=need,
        bad=bad,
        duplicate_uids=len(uids) - len(np.unique(uids)),
    )


def _check_bad(summary: IndexSummary, max_bad_fraction: float) -> None:
    bad = sum(summary.bad.values())
    reasons = ", ".join(f"{reason} {n:,}" for reason, n in summary.bad.items())
    if not summary.samples:
        raise DataError(f"the shards hold no usable sample ({summary.rows:,} rows{': ' + reasons if reasons else ''})")
    if bad > max_bad_fraction * summary.rows:
        raise DataError(
            f"{bad:,} of {summary.rows:,} samples ({bad / summary.rows:.0%}) cannot be used, above --max-bad-fraction {max_bad_fraction}:"
            f" {reasons}; mend the shards, or raise the bound to go on without these samples"
        )


def _version(url: str) -> tuple[int, str]:
    try:
        size, version = shard_version(url)
    except OSError as error:
        raise DataError(f"cannot read shard {url}: {error}") from None
    if size == 0:
        raise DataError(f"shard {url} is empty (0 bytes): remove it, or copy it again")
    return size, version


def _content_digest(url: str, rows: list[dict[str, Any]]) -> str:
    digest = hashlib.blake2b(shard_name(url).encode(), digest_size=16)
    for row in rows:
        digest.update(f"{row['start']} {row.get('digest', '')}\n".encode())
    return digest.hexdigest()


def _hash64(uid: str) -> int:
    return int.from_bytes(hashlib.blake2b(uid.encode("utf-8", "surrogateescape"), digest_size=8).digest(), "little")
