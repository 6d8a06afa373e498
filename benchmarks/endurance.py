"""The stream over many epochs and on more ranks than cores: memory by epoch, and one digest of the order for every number of ranks.

Memory is what the processes of the job hold for themselves, by what they are, and Ray's object store, sampled every second: what lies in
it, and which of its pages were ever touched, as it never gives one back. It is measured first, in a session that has done nothing else.

    python -m benchmarks.endurance SHARDS [--epochs 20] [--ranks 2 4 8]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import ray.train
import torch.distributed
from ray._private.internal_api import node_stats
from ray.train.torch import TorchTrainer

from benchmarks.loader import BATCH, CHUNK, make_spec
from mm_core.data.reader import ReadSpec
from pipelines.batches import Share
from pipelines.index import build_index
from pipelines.session import ray_session
from pipelines.shards import expand_shards
from pipelines.stream import StreamConfig, stream


def worker(settings: dict[str, ReadSpec | int]) -> tuple[str, list[float]]:
    """Rank 0: the digest of all uids in the order of the global batches, and when each epoch ended."""
    spec, steps = settings["spec"], settings["steps"]
    assert isinstance(spec, ReadSpec)
    assert isinstance(steps, int)
    context = ray.train.get_context()
    ranks, cpus = context.get_world_size(), (os.cpu_count() or 1) / context.get_world_size()
    share = Share(context.get_world_rank(), ranks, BATCH // CHUNK)
    order, ends = hashlib.blake2b(digest_size=16), []
    per_epoch = spec.plan.plans[0].samples / BATCH
    for batch in stream(spec, share, first_step=0, last_step=steps, config=StreamConfig(ahead_blocks=2), cpus=cpus):
        uids: list[list[str]] = [[]] * ranks
        torch.distributed.all_gather_object(uids, batch.rows["uid"].to_pylist())
        order.update("".join(uid for of_rank in uids for uid in of_rank).encode())
        if (batch.step + 1) // per_epoch > batch.step // per_epoch:
            ends.append(time.time())
    return order.hexdigest(), ends


def run(spec: ReadSpec, ranks: int, steps: int) -> tuple[str, list[float]]:
    with tempfile.TemporaryDirectory() as storage:
        result: tuple[str, list[float]] = (
            TorchTrainer(
                worker,
                train_loop_config={"spec": spec, "steps": steps},
                scaling_config=ray.train.ScalingConfig(num_workers=ranks, resources_per_worker={"CPU": 0, "memory": 1 << 20}),
                run_config=ray.train.RunConfig(storage_path=storage, name="endurance"),
            )
            .fit()
            .return_value
        )
    return result


def stored_bytes() -> int:
    """What lies in the object store of this node."""
    node = ray.nodes()[0]
    return int(node_stats(node["NodeManagerAddress"], node["NodeManagerPort"]).store_stats.object_store_bytes_used)


@dataclass
class Memory:
    """Samples of (time, bytes by part) until stopped."""

    samples: list[tuple[float, dict[str, int]]] = field(default_factory=list)
    stop: threading.Event = field(default_factory=threading.Event)

    def watch(self) -> None:
        while not self.stop.wait(1):
            parts = {"ranks": 0, "readers": 0, "ray": 0, "store": stored_bytes(), "touched": shutil.disk_usage("/dev/shm").used}
            for process in psutil.Process().children(recursive=True):
                try:
                    name = process.cmdline()[0]
                    kind = "ranks" if "RayTrainWorker" in name else "readers" if "ReadPlan" in name or "IDLE" in name else "ray"
                    parts[kind] += process.memory_full_info().uss
                except (psutil.Error, IndexError):
                    continue
            self.samples.append((time.time(), parts))

    def during(self, start: float, end: float) -> dict[str, int]:
        """MB by part, the mean; of the nearest sample where there is none."""
        inside = [parts for at, parts in self.samples if start <= at <= end]
        inside = inside or [min(self.samples, key=lambda sample: abs(sample[0] - end))[1]]
        return {part: round(sum(parts[part] for parts in inside) / len(inside) / 1e6) for part in inside[0]}


def total(parts: dict[str, int], *, without: str) -> int:
    return sum(size for part, size in parts.items() if part != without)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shards", nargs="+")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--size", type=int, default=224)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, ray_session():
        spec = make_spec(build_index(expand_shards(arguments.shards), str(Path(folder) / "index")), arguments.size)
        samples = spec.plan.plans[0].samples
        one_epoch = -(-samples // BATCH) + 1
        memory = Memory()
        threading.Thread(target=memory.watch, daemon=True).start()
        _, ends = run(spec, arguments.ranks[0], arguments.epochs * samples // BATCH + 1)
        memory.stop.set()
        digests = {ranks: run(spec, ranks, one_epoch)[0] for ranks in arguments.ranks}
    by_epoch = [memory.during(start, end) for start, end in zip([ends[0] - (ends[1] - ends[0]) / 2, *ends], ends, strict=False)]
    result = {
        "benchmark": "endurance",
        "samples": samples,
        "cpus": os.cpu_count(),
        "same_order": len(set(digests.values())) == 1,
        "ranks": arguments.ranks,
        "memory_mb_by_epoch": by_epoch,
        "last_over_first": round(total(by_epoch[-1], without="touched") / total(by_epoch[0], without="touched"), 3),
        "last_over_first_with_touched_pages": round(total(by_epoch[-1], without="store") / total(by_epoch[0], without="store"), 3),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
