"""Samples/s of `mm data score INDEX embeddings` against the bundle called in one plain process.

    python benchmarks/similarity.py BUNDLE SHARDS...

Both read, decode and encode the same samples in the same batches; the job's start, Ray's included, is not counted: its rate is that from
the first block on. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np

from mm_core.bundle import load_bundle
from mm_core.data.image import decode_centre
from mm_core.data.index import Index
from mm_core.data.reader import IndexReader
from mm_core.data.sample import Sample
from pipelines import encoded_table
from pipelines.curate.folds import Fold
from pipelines.curate.model_scores import embeddings, score_by_models
from pipelines.index import build_index
from pipelines.session import ray_session


def plain(index: Index, model: str, samples: int) -> float:
    """Samples/s of one process, one thread for decoding and as many for the towers as torch takes."""
    bundle, reader, rows = load_bundle(model), IndexReader(index), encoded_table._BLOCK_ROWS
    started = time.perf_counter()
    for at in range(0, samples, rows):
        found = reader.read(np.arange(at, min(samples, at + rows), dtype=np.uint64))
        good = [sample for sample in found if isinstance(sample, Sample)]
        images = np.stack([decode_centre(sample.image or b"", bundle.image_size) for sample in good])
        embeddings(bundle, images, [sample.captions for sample in good])
    return samples / (time.perf_counter() - started)


def job(index: Index, model: str) -> tuple[float, float]:
    """Samples/s after the first block, and seconds until it came."""
    times: list[tuple[float, int]] = []
    started = time.perf_counter()
    score_by_models(index, "embeddings", [Fold(None, model)], on_progress=lambda rows: times.append((time.perf_counter(), rows)))
    times = [each for each in times if each[1]]
    return sum(rows for _, rows in times[1:]) / (times[-1][0] - times[0][0]), times[0][0] - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle")
    parser.add_argument("shards", nargs="+")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, ray_session():
        index = build_index(arguments.shards, f"{folder}/index")
        rate, start_s = job(index, arguments.bundle)
        alone = plain(index, arguments.bundle, min(2000, index.summary.rows))
    result = {"benchmark": "similarity", "bundle": Path(arguments.bundle).name, "samples": index.summary.samples}
    print(json.dumps(result | {"samples_per_s": round(rate), "plain_samples_per_s": round(alone), "start_s": round(start_s, 1)}))


if __name__ == "__main__":
    main()
