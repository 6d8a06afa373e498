"""The shards behind a run: which addresses a pattern names, and whether they still are what was indexed."""

from __future__ import annotations

import posixpath
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import braceexpand
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from mm_core.address import absolute, is_local
from mm_core.data.index import Index, changed_shard
from mm_core.data.text_rows import TEXT_SUFFIXES
from mm_core.errors import DataError
from mm_core.store import CONNECTIONS, open_store, reaching

_COMPRESSED_SUFFIXES = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
_SHARDS_PER_TASK = 500
_Checked = tuple[str, int, str]
"""Address, bytes and version of a shard, as the index has them."""


def expand_shards(patterns: Sequence[str]) -> list[str]:
    """Addresses of the shards, sorted, each once.

    Raises:
        DataError: a pattern that matches nothing.
    """
    found: dict[str, None] = {}
    for pattern in patterns:
        named = list(braceexpand.braceexpand(pattern)) if "{" in pattern else [pattern]
        matches = [_matches(absolute(one)) for one in named]
        if not any(matches):
            raise DataError(
                f"no shard at {pattern}: name .tar files (of texts alone also .jsonl or .parquet), a folder that holds some, a glob, or a"
                " range like {00000..00012}.tar"
            )
        if missing := [one for one, there in zip(named, matches, strict=True) if not there]:
            raise DataError(f"{len(missing):,} of the {len(named):,} shards that {pattern} names are not there, {missing[0]} first")
        found |= dict.fromkeys(shard for there in matches for shard in there)
    return sorted(found)


def _matches(pattern: str) -> list[str]:
    try:
        with reaching(pattern):
            fs, path = open_store(pattern)
            return [str(p) if "://" not in pattern else str(fs.unstrip_protocol(p)) for p in _listed(fs, path, pattern)]
    except (OSError, ValueError, ImportError) as error:
        raise DataError(f"cannot list {pattern}: {error}") from None


def _listed(fs: Any, path: str, pattern: str) -> list[str]:
    if any(c in path for c in "*?["):
        return [p for p in fs.glob(path) if not fs.isdir(p)]
    try:
        if fs.info(path)["type"] != "directory":  # s3fs's isdir and exists say no to whatever goes wrong
            return [path]
    except FileNotFoundError:
        return []
    inside = fs.find(path)
    # A folder of tars may have tables beside them, as img2dataset leaves them, which repeat what the tars say.
    shards = [p for p in inside if p.endswith(".tar")] or [p for p in inside if p.endswith(TEXT_SUFFIXES)]
    compressed = [p for p in inside if p.endswith(_COMPRESSED_SUFFIXES)]
    if compressed and not shards:
        raise DataError(
            f"the shards in {pattern} are compressed ({posixpath.basename(compressed[0])}); samples in them cannot be addressed:"
            " unpack them to plain .tar files"
        )
    return shards


def check_shards(indexes: Sequence[Index], *, shards_per_task: int = _SHARDS_PER_TASK) -> int:
    """Ask the store once for every shard, before a run, whether size and etag (or time of the last write) are those that were indexed.

    A task asks for 500 shards, 32 at a time, so 100,000 are 200 tasks all over the cluster. They wait for the store and not for a
    processor: they book none, so that a session whose processors are all taken does not wait for itself, and as many run as there are
    processors.

    Returns:
        How many shards were checked.

    Raises:
        DataError: shards that changed or cannot be reached, the first by name.
    """
    checked, found = 0, list[tuple[str, str]]()
    running: list[ray.ObjectRef] = []
    task = ray.remote(num_cpus=0)(_changed)
    at_a_time = max(1, int(ray.cluster_resources().get("CPU", 1)))
    for batch in _batches(indexes, shards_per_task):
        checked += len(batch)
        running.append(task.options(scheduling_strategy=_where(batch)).remote(batch))
        if len(running) >= at_a_time:
            done, running = ray.wait(running)
            found += [change for changes in ray.get(done) for change in changes]
    found += [change for changes in ray.get(running) for change in changes]
    if found:
        url, change = min(found)
        more = f" (and {len(found) - 1:,} more of {checked:,} shards)" if len(found) > 1 else ""
        raise DataError(
            f"shard {url}{more} {change}; put it back as it was, or index the shards again into a new index:"
            " mm data index SHARDS --out NEW --base INDEX reads only what changed"
        )
    return checked


def _batches(indexes: Sequence[Index], size: int) -> Iterator[list[_Checked]]:
    for index in indexes:
        table = index.shards.select(["url", "bytes", "version"])
        for start in range(0, len(table), size):
            columns = table.slice(start, size).to_pydict()
            yield list(zip(columns["url"], columns["bytes"], columns["version"], strict=True))


def _where(batch: list[_Checked]) -> str | NodeAffinitySchedulingStrategy:
    """Spread over the cluster; for files of a local disk, here: other machines may not have them, and then say so when they read."""
    if is_local(batch[0][0]):
        return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return "SPREAD"


def _changed(batch: list[_Checked]) -> list[tuple[str, str]]:
    """Of some shards those that are not what they were, and what changed."""
    with ThreadPoolExecutor(CONNECTIONS) as pool:
        changes = list(pool.map(lambda shard: changed_shard(*shard), batch))
    return [(url, change) for (url, _, _), change in zip(batch, changes, strict=True) if change]
