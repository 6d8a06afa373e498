"""What it costs to know what to read next: 256 positions of a plan to byte ranges, over real locator and kept files.

    python benchmarks/plan.py [--samples 10000000 100000000] [--folder FOLDER] [--index INDEX]

Writes the files (24 bytes a sample and 8 a kept one), 0.3 of the samples kept at random, and resolves blocks all over several epochs.
With --index: the bytes of that index and its ledgers beside those of its images. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
from numpy.lib.format import open_memmap

from mm_core.data.index import Index
from mm_core.data.locators import LOCATOR, open_mapped
from mm_core.data.plan import Plan
from mm_core.data.ranged import Span

_BLOCK, _BLOCKS, _KEPT, _SHARD = 256, 200, 0.3, 10_000
_SPAN, _PART = 40_960, 1 << 20


def write_files(folder: Path, samples: int) -> int:
    """Locators of `samples` samples and the ordinals of those kept, a part at a time. Returns how many are kept."""
    draw, kept = np.random.default_rng(0), 0
    locators = open_memmap(folder / "locators.npy", mode="w+", dtype=LOCATOR, shape=(samples,))
    with (folder / "kept.raw").open("wb") as out:
        for first in range(0, samples, _PART):
            rows = np.arange(first, min(first + _PART, samples), dtype=np.uint64)
            part = np.zeros(len(rows), dtype=LOCATOR)
            part["shard"], part["start"], part["span"] = rows // _SHARD, rows % _SHARD * _SPAN, _SPAN
            locators[first : first + len(rows)] = part
            chosen = rows[draw.random(len(rows)) < _KEPT]
            chosen.tofile(out)
            kept += len(chosen)
    locators.flush()
    return kept


def resolve_ms(folder: Path, kept_count: int) -> tuple[list[float], list[float]]:
    """Milliseconds of each block, the files mapped as training maps them: touched for the first time, and again."""
    locators = open_mapped(str(folder / "locators.npy"), "benchmark")
    kept = np.memmap(folder / "kept.raw", dtype=np.uint64, mode="r")
    urls = [f"shards/{shard:06d}.tar" for shard in range(-(-len(locators) // _SHARD))]
    plan = Plan(kept_count, 0, 16, 1, "benchmark")
    first_touch: list[float] = []
    again: list[float] = []
    for block in np.random.default_rng(1).integers(0, 3 * kept_count // _BLOCK, _BLOCKS):
        positions = np.arange(block * _BLOCK, (block + 1) * _BLOCK, dtype=np.uint64)
        for times in (first_touch, again):
            started = time.perf_counter()
            rows = locators[kept[plan.locate(positions).kept.astype(np.int64)].astype(np.int64)]
            spans = [Span(urls[int(row["shard"])], int(row["start"]), int(row["span"])) for row in rows]
            times.append(1000 * (time.perf_counter() - started))
        if len(spans) != _BLOCK or any(span.size != _SPAN for span in spans):
            raise RuntimeError("a block was resolved to something else than its samples")
    return first_touch, again


def anonymous_mb() -> float:
    """Memory of this process that no file backs."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["RssAnon"].split()[0]) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, nargs="+", default=[10_000_000, 100_000_000])
    parser.add_argument("--folder", default=None, help="Where the files are written, and removed again.")
    parser.add_argument("--index", default=None, help="A real index in a local folder.")
    args = parser.parse_args()
    result: dict[str, object] = {}
    for samples in args.samples:
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            kept = write_files(Path(folder), samples)
            first_touch, again = resolve_ms(Path(folder), kept)
            result[str(samples)] = {
                "kept": kept,
                "block_ms_median": round(statistics.median(again), 3),
                "block_ms_p95": round(float(np.percentile(again, 95)), 3),
                "first_touch_ms_median": round(statistics.median(first_touch), 3),
                "rss_anonymous_mb": round(anonymous_mb(), 1),
                "file_mb": round(sum(f.stat().st_size for f in Path(folder).iterdir()) / 1e6),
            }
    if args.index:
        index = Index.open(args.index)
        size = sum(file.stat().st_size for file in Path(args.index).rglob("*") if file.is_file())
        result["index_bytes_per_data_byte"] = round(size / int(index.locators["span"].sum()), 5)
        result["locator_bytes_per_data_byte"] = round(index.locators.nbytes / int(index.locators["span"].sum()), 5)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
