"""MB/s of `mm data index`, beside `cat` of the same bytes.

    python benchmarks/index.py SHARDS... [--megabytes 4000] [--runs 3]

The shards are copied under new names until there are so many bytes that starting a job does not decide. Each run times, one after
the other: `cat` of all of them and `build_index` with the pages in memory (warm), then both again after the pages were dropped
(cold). The time of an index is all of `build_index` in a Ray session that is up: planning, reading, hashing, writing, joining.
Prints one JSON line with the medians and the ratios, run by run.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import tempfile
import time

from pipelines.index import build_index
from pipelines.session import ray_session
from pipelines.shards import expand_shards


def copies(shards: list[str], folder: str, megabytes: int) -> list[str]:
    """Copies of the shards, round and round, up to a size."""
    made: list[str] = []
    size = 0
    while size < megabytes * 10**6:
        source = shards[len(made) % len(shards)]
        made.append(shutil.copy(source, f"{folder}/{len(made):05d}.tar"))
        size += os.path.getsize(source)
    os.sync()  # only clean pages can be dropped
    return made


def drop_pages(paths: list[str]) -> None:
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def cat(paths: list[str]) -> float:
    started = time.perf_counter()
    subprocess.run(["cat", *paths], stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - started


def index(paths: list[str]) -> float:
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        build_index(paths, f"{folder}/index", need=("image",))
        return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", nargs="+")
    parser.add_argument("--megabytes", type=int, default=4000)
    parser.add_argument("--runs", type=int, default=3)
    arguments = parser.parse_args()
    times: dict[str, list[float]] = {"cat_warm": [], "index_warm": [], "cat_cold": [], "index_cold": []}
    with tempfile.TemporaryDirectory() as folder, ray_session():
        paths = copies(expand_shards(arguments.shards), folder, arguments.megabytes)
        size = sum(map(os.path.getsize, paths))
        index(paths[:4])  # workers start and import before anything is timed
        for _ in range(arguments.runs):
            cat(paths)  # into memory
            times["cat_warm"].append(cat(paths))
            times["index_warm"].append(index(paths))
            for name, read in (("cat_cold", cat), ("index_cold", index)):
                drop_pages(paths)
                times[name].append(read(paths))
    rate = {name: [round(size / 1e6 / seconds, 1) for seconds in values] for name, values in times.items()}
    ratio = {
        state: [round(i / c, 3) for i, c in zip(rate[f"index_{state}"], rate[f"cat_{state}"], strict=True)] for state in ("warm", "cold")
    }
    result = {"megabytes": round(size / 1e6), "shards": len(paths), "cpus": os.cpu_count()}
    medians = {f"{name}_mb_per_s": statistics.median(values) for name, values in rate.items()}
    ratios = {f"ratio_{state}": statistics.median(values) for state, values in ratio.items()}
    print(json.dumps(result | medians | ratios | {"runs": rate, "ratios": ratio}))


if __name__ == "__main__":
    main()
