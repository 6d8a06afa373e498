"""What reading from an object store costs, against moto's server on this machine.

    python -m benchmarks.s3 [SHARDS] [--samples 2048] [--run-length 64]

For kept fractions 1.0, 0.5 and 0.3 and gap tolerances of 0, 256 KB and 1 MB: requests per sample, and bytes read per byte of the samples,
as the store counts them. Then with faults, where 5 % of the requests fail and each waits 100 ms, beside the same without: samples lost,
samples/s of one reading process. Shards are a folder; without one, rendered scenes of 256 pixels are made. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

import numpy as np

from mm_core.data.augment import AugmentConfig
from mm_core.data.index import Index
from mm_core.data.ledger import Source, compile_kept
from mm_core.data.plan import Plan
from mm_core.data.reader import IndexReader, PlanReader, ReadSpec
from mm_core.data.split import split
from mm_core.data.synth.corpus import SynthConfig, write_corpus
from mm_core.models.tokenizer import caption_tokenizer, train_bpe
from mm_core.store import open_store
from pipelines.index import build_index
from pipelines.session import ray_session
from tests.object_store import ObjectStore, reserve

FRACTIONS, GAPS, CHUNK, BLOCK = (1.0, 0.5, 0.3), (0, 256 << 10, 1 << 20), 64, 256


def upload(folder: Path) -> str:
    fs, _ = open_store("s3://shards")
    fs.mkdir("shards")
    for shard in sorted(folder.glob("*.tar")):
        fs.put_file(str(shard), f"shards/{shard.name}")
    return "s3://shards"


def spec_of(index: Index, ledgers: tuple[str, ...], gap_bytes: int, run_length: int) -> ReadSpec:
    kept = compile_kept(index, ledgers)
    tokenizer = caption_tokenizer(train_bpe(["a photo of a dog"] * 3, vocab_size=300, context_length=16), 16)
    plan = Plan(len(kept), 0, CHUNK, run_length, kept.fingerprint)
    return ReadSpec((Source(index=index.url, ledgers=ledgers),), plan, 224, AugmentConfig(), tokenizer, gap_bytes=gap_bytes)


def amplification(store: ObjectStore, index: Index, spec: ReadSpec, samples: int) -> dict[str, float]:
    """Of `samples` read a block at a time, without decoding them."""
    kept = compile_kept(index, spec.sources[0].ledgers)
    reader = IndexReader(index, gap_bytes=spec.gap_bytes)
    store.faults()
    needed = 0
    for first in range(0, samples, BLOCK):
        places = spec.plan.locate(np.arange(first, first + BLOCK, dtype=np.uint64))
        ordinals = kept.at(places.kept, places.epochs, 0)
        needed += sum(span.size for span in reader.spans(ordinals))
        reader.read(ordinals)
    counts = store.counts()
    return {"requests_per_sample": round(counts["requests"] / samples, 4), "read_per_needed": round(counts["bytes"] / needed, 3)}


def throughput(store: ObjectStore, spec: ReadSpec, samples: int, *, fail: float, latency_s: float) -> dict[str, float]:
    """Read, checked, decoded and tokenised by one process, a block after another."""
    reader = PlanReader(spec, reuse_memory=True)
    reader.read(np.arange(BLOCK, dtype=np.uint64))
    store.faults(fail=fail, latency_s=latency_s)
    started, lost = time.perf_counter(), 0
    for first in range(0, samples, BLOCK):
        lost += BLOCK - reader.read(np.arange(first, first + BLOCK, dtype=np.uint64))["replaced"].null_count
    seconds, counts = time.perf_counter() - started, store.counts()
    store.faults()
    return {"samples_per_s": round(samples / seconds, 1), "lost": lost, "requests": counts["requests"], "failed": counts["failed"]}


def measure(store: ObjectStore, shards: Path, samples: int, run_length: int) -> dict[str, object]:
    index = build_index([upload(shards)], "s3://shards/index")
    table: dict[str, object] = {"samples_in_index": index.summary.samples}
    for fraction in FRACTIONS:
        ledgers: tuple[str, ...] = ()
        if fraction < 1:
            ledgers = (f"kept-{fraction}",)
            split(index, heldout=1 - fraction, seed=0, names=(ledgers[0], f"dropped-{fraction}"))
        for gap in GAPS:
            spec = spec_of(index, ledgers, gap, run_length)
            table[f"kept {fraction}, gap {gap >> 10} KB"] = amplification(store, index, spec, samples)
    for name, length, gap in (("run length 64, gap 256 KB", 64, 256 << 10), ("run length 1, gap 0", 1, 0)):
        spec = spec_of(index, (), gap, length)
        table[f"calm, {name}"] = throughput(store, spec, samples, fail=0, latency_s=0)
        table[f"5 % fail, 100 ms, {name}"] = throughput(store, spec, samples, fail=0.05, latency_s=0.1)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shards", nargs="?", type=Path)
    parser.add_argument("--samples", type=int, default=2048, help="rounded down to whole blocks of 256")
    parser.add_argument("--run-length", type=int, default=64)
    arguments = parser.parse_args()
    samples = arguments.samples // BLOCK * BLOCK
    with tempfile.TemporaryDirectory() as folder, reserve(os.environ) as bound, ObjectStore(bound) as store:
        os.environ["MM_CACHE"] = f"{folder}/cache"
        shards = arguments.shards
        if shards is None:
            write_corpus(Path(folder), SynthConfig(samples=samples, image_size=256, heldout_samples=0, zeroshot_samples=0))
            shards = Path(folder) / "train"
        with ray_session():
            print(json.dumps(measure(store, shards, samples, arguments.run_length)))


if __name__ == "__main__":
    main()
