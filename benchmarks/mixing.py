"""How well the plan shuffles beside webdataset's shuffle of shards and a buffer of 5,000 samples.

    python benchmarks/mixing.py [--samples 200000] [--shard 1000] [--buffer 5000]

Distances are in parts of the epoch: of a sample between its places before and after (1/3 for a uniform shuffle), of neighbours in a
shard after it; and how many shards a batch of 256 draws on. webdataset's own `shuffle` runs over the sample numbers. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import json
import random

import numpy as np
from numpy.typing import NDArray
from webdataset.filters import shuffle

from mm_core.data.plan import Plan

_BATCH = 256


def planned(samples: int, run_length: int) -> NDArray[np.int64]:
    plan = Plan(samples, 0, 64, run_length, "benchmark")
    return plan.locate(np.arange(samples, dtype=np.uint64)).kept.astype(np.int64)


def buffered(samples: int, shard: int, buffer: int) -> NDArray[np.int64]:
    draw = random.Random(0)
    shards = list(range(-(-samples // shard)))
    draw.shuffle(shards)
    rows = (row for s in shards for row in range(s * shard, min((s + 1) * shard, samples)))
    return np.fromiter(shuffle(buffer, initial=buffer, rng=draw)(rows), dtype=np.int64)


def statistics(order: NDArray[np.int64], shard: int) -> dict[str, float]:
    samples = len(order)
    if not np.array_equal(np.sort(order), np.arange(samples)):
        raise RuntimeError("the order is no permutation of the samples")
    place = np.empty(samples, dtype=np.int64)
    place[order] = np.arange(samples)
    apart = np.abs(np.diff(place)) / samples
    batches = (order[: samples // _BATCH * _BATCH] // shard).reshape(-1, _BATCH)
    return {
        "moved_mean": round(float(np.abs(place - np.arange(samples)).mean()) / samples, 4),
        "neighbours_apart_mean": round(float(apart.mean()), 4),
        "neighbours_apart_p5": round(float(np.percentile(apart, 5)), 5),
        "shards_per_batch": round(float(np.mean([len(np.unique(batch)) for batch in batches])), 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=200_000)
    parser.add_argument("--shard", type=int, default=1000, help="Samples of a shard.")
    parser.add_argument("--buffer", type=int, default=5000)
    args = parser.parse_args()
    orders = {
        "plan_run_1": planned(args.samples, 1),
        "plan_run_16": planned(args.samples, 16),
        "webdataset": buffered(args.samples, args.shard, args.buffer),
        "uniform": np.random.default_rng(0).permutation(args.samples),
    }
    print(json.dumps({"samples": args.samples} | {name: statistics(order, args.shard) for name, order in orders.items()}))


if __name__ == "__main__":
    main()
