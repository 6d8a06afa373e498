"""Wall time and memory of `mm data filter`, `dedup` and `report` as the index grows, over made-up metadata and hashes: rules about columns
and a balance; exact and perceptual duplicates among what these keep; a report of both ledgers.

    python -m benchmarks.curation_scale [--rows 100000 1000000 10000000] [--cpus 1] [--dedup-up-to 1000000]

The index and its hashes are written as `mm data index` and `mm data score INDEX hash` write them, but no shard is behind them: the
report has no pictures. One sample in twenty looks like the one before (two bits of its hashes differ), one in sixty is the same byte for
byte. Each size is worked on in a process of its own, in a Ray session that is up and whose workers have started, so that the time is that
of the passes over the rows. Memory is each process' own (USS) of driver and workers, sampled every 50 ms: the driver's highest, and the
highest of any worker. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from mm_core.curation.picture_hash import HASHES, THUMBNAIL, VERSION
from mm_core.curation.ruleset import RuleSet
from mm_core.curation.score_rules import HASH
from mm_core.data.among import Among
from mm_core.data.columns import vectors_column
from mm_core.data.index import SHARD_SCHEMA, Index, IndexSummary
from mm_core.data.ledger import Ledger
from mm_core.data.locators import HAS_IMAGE, HAS_TEXT, LOCATOR
from mm_core.data.scan import BATCH_ROWS, SAMPLE_SCHEMA
from mm_core.data.scores import Scores, ScoresSummary
from pipelines.curate.dedup import DedupConfig, dedup_index
from pipelines.curate.filter import filter_index
from pipelines.curate.report.write import write_report
from pipelines.session import ray_session

_FILE_ROWS, _HASH_ROWS = 500_000, 1 << 13
_ENTRIES = 10_000
_RULES: dict[str, dict[str, Any]] = {
    "small": {"rule": "shorter_side", "min": 200},
    "long_thin": {"rule": "aspect_ratio", "max": 3},
    "few_words": {"rule": "words", "min": 4},
    "repetitive": {"rule": "repeated_words", "max": 0.6},
    "even": {"rule": "balance", "entries": "entries.txt"},
}


def words() -> list[str]:
    rng = np.random.default_rng(1)
    return ["".join(map(chr, rng.integers(97, 123, rng.integers(2, 9)))) for _ in range(2 * _ENTRIES)]


def made_up(first: int, rows: int, vocabulary: pa.Array) -> pa.Table:
    """Captions of 3 to 12 words, the frequent ones more frequent by Zipf's law."""
    rng = np.random.default_rng(first)
    lengths = rng.integers(3, 13, rows)
    ranks = np.minimum(len(vocabulary) * rng.random(int(lengths.sum())) ** 4, len(vocabulary) - 1).astype(np.int64)
    lists = pa.ListArray.from_arrays(np.append(0, np.cumsum(lengths)).astype(np.int32), vocabulary.take(pa.array(ranks)))
    captions = pa.compute.binary_join(lists, " ")
    one_each = np.arange(rows + 1, dtype=np.int32)
    members = pa.StructArray.from_arrays(
        [pa.repeat("jpg", rows), pa.array(np.full(rows, 512, np.uint64)), pa.array(np.full(rows, 20_000, np.uint64))],
        ["suffix", "offset", "size"],
    )
    known = {
        "row": np.arange(first, first + rows, dtype=np.uint32),
        "uid": pa.array([f"{i:032x}" for i in range(first, first + rows)]),
        "members": pa.ListArray.from_arrays(one_each, members),
        "image_format": pa.repeat("jpeg", rows),
        "width": rng.integers(100, 900, rows).astype(np.uint32),
        "height": rng.integers(100, 900, rows).astype(np.uint32),
        "captions": pa.ListArray.from_arrays(one_each, captions),
    }
    columns = [
        pa.array(known[field.name]).cast(field.type) if field.name in known else pa.nulls(rows, field.type) for field in SAMPLE_SCHEMA
    ]
    return pa.table(columns, schema=SAMPLE_SCHEMA)


def write_index(folder: Path, rows: int) -> Index:
    (folder / "samples").mkdir(parents=True)
    locators = np.zeros(rows, dtype=LOCATOR)
    locators["flags"] = HAS_IMAGE | HAS_TEXT
    locators["check"] = np.random.default_rng(0).integers(0, 1 << 32, rows, dtype=np.uint32)
    np.save(folder / "locators.npy", locators)
    vocabulary = pa.array(words())
    shards = []
    for number, first in enumerate(range(0, rows, _FILE_ROWS)):
        size, name = min(_FILE_ROWS, rows - first), f"part-{number:05d}.parquet"
        pq.write_table(made_up(first, size, vocabulary), folder / "samples" / name, compression="zstd", row_group_size=BATCH_ROWS)
        shards.append(
            {"shard": number, "url": f"/none/{number:05d}.tar", "bytes": 1, "version": "0", "rows": size, "samples": size, "file": name}
        )
    pq.write_table(pa.Table.from_pylist(shards, schema=SHARD_SCHEMA), folder / "shards.parquet")
    summary = IndexSummary(
        fingerprint=f"made-up-{rows}", shards=len(shards), samples=rows, rows=rows, bytes=rows, need=("image", "text"), max_pixels=1, bad={}
    )
    (folder / "index.json").write_text(summary.model_dump_json())
    digests = np.random.default_rng(2).integers(0, 256, (rows, 16), dtype=np.uint8)[_copied(rows, every=60)]
    np.save(folder / "digests.npy", digests.view("V16")[:, 0])
    return Index.open(str(folder))


def _copied(rows: int, every: int) -> NDArray[np.int64]:
    """Of each row the one that it shows: its own, or of every so manieth the one before."""
    shown = np.arange(rows)
    shown[every - 1 :: every] -= 1
    return shown


def write_hashes(index: Index) -> None:
    """What `mm data score INDEX hash` writes: of the index's rows one in twenty looks like the one before."""
    rng, scores = np.random.default_rng(3), Scores(index, HASH)
    scores.save(
        ScoresSummary(
            index_fingerprint=index.summary.fingerprint,
            kind=HASH,
            settings={"version": VERSION},
            columns=("contrast",),
            chunk_rows=_HASH_ROWS,
            complete=True,
        )
    )
    for chunk in range(len(scores.values)):
        first, last = scores.values.bounds(chunk)
        count = last - first
        shown = _copied(count, every=20)
        hashes = rng.integers(0, 1 << 63, (count, HASHES), dtype=np.uint64)[shown]
        hashes[shown != np.arange(count)] ^= np.uint64(0b1001)
        thumbnails = rng.integers(0, 256, (count, THUMBNAIL**2), dtype=np.uint8)[shown]
        everywhere = np.ones(count, dtype=bool)
        columns = {
            "picture": vectors_column(rng.integers(0, 256, (count, 16), dtype=np.uint8)[shown], everywhere),
            "hashes": vectors_column(hashes, everywhere),
            "thumbnail": vectors_column(thumbnails, everywhere),
            "contrast": pa.array(np.full(count, 50, np.float32)),
        }
        scores.values.write(chunk, pa.table(columns))


class Memory(threading.Thread):
    """The highest USS of this process and of its workers."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.driver = self.worker = 0
        self._ended = threading.Event()

    def run(self) -> None:
        own = psutil.Process()
        while not self._ended.wait(0.05):
            self.driver = max(self.driver, own.memory_full_info().uss)
            for process in own.children(recursive=True):
                try:
                    if process.name().startswith("ray::"):
                        self.worker = max(self.worker, process.memory_full_info().uss)
                except psutil.Error:
                    continue

    def end(self) -> None:
        self._ended.set()
        self.join()


def measure(folder: Path, rows: int, cpus: int, dedup: bool, found: Any) -> None:
    index = write_index(folder / "index", rows)
    (folder / "entries.txt").write_text("\n".join(words()[:_ENTRIES]))
    # As many of every entry are kept at every size, in proportion, so that sizes differ in nothing but size.
    rules = RuleSet.parse({**_RULES, "even": _RULES["even"] | {"per_entry": max(1, rows // 5_000)}}, where="benchmark", folder=folder)
    with ray_session(cpus=cpus):
        small = write_index(folder / "first", 10_000)
        filter_index(small, rules, "first")  # workers start and import before anything is timed
        result: dict[str, Any] = {"rows": rows, "filter": measured(lambda: filter_index(index, rules, "clean"), rows)}
        if dedup:
            for each in (small, index):
                write_hashes(each)
            dedup_index(small, "second", DedupConfig())
            among = Among.of(index, ["clean"])
            result["dedup"] = measured(lambda: dedup_index(index, "once", DedupConfig(), among=among), rows)
            result["dedup"]["dropped"] = Ledger(index, "once").summary().failed
            result["report"] = measured(lambda: write_report(index, ["clean", "once"], str(folder / "report.html")), rows)
    found.put(result)


def measured(work: Callable[[], Any], rows: int) -> dict[str, Any]:
    memory = Memory()
    memory.start()
    started = time.perf_counter()
    work()
    seconds = time.perf_counter() - started
    memory.end()
    mb = {"driver_mb": round(memory.driver / 1e6), "largest_worker_mb": round(memory.worker / 1e6)}
    return {"seconds": round(seconds, 2), "us_per_row": round(seconds / rows * 1e6, 2)} | mb


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[10**5, 10**6, 10**7])
    parser.add_argument("--cpus", type=int, default=1, help="With more, the smallest index is too small for all of them.")
    parser.add_argument("--dedup-up-to", type=int, default=10**6, help="Rows of the largest index whose duplicates are looked for.")
    arguments = parser.parse_args()
    spawn = multiprocessing.get_context("spawn")
    sizes = []
    for rows in arguments.rows:
        with tempfile.TemporaryDirectory() as folder:
            found: Any = spawn.Queue()
            process = spawn.Process(target=measure, args=(Path(folder), rows, arguments.cpus, rows <= arguments.dedup_up_to, found))
            process.start()
            sizes.append(found.get())
            process.join()
    print(json.dumps({"benchmark": "curation_scale", "cpus": arguments.cpus, "sizes": sizes}))


if __name__ == "__main__":
    main()
