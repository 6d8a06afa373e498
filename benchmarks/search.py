"""Searching a million vectors: queries/s and recall@10 of each kind beside comparing all.

    python benchmarks/search.py --rows 1000000 --width 512

The vectors are drawn: points around centres that are themselves points around fewer centres, which is how embeddings of photographs lie
more than uniform noise does. Queries of one kind are drawn like them; of the other they are shifted by one constant vector, as texts' are
from images' (the modality gap).
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import faiss
import numpy as np
from jaxtyping import Float32

from mm_core.search.nearest import Codes, Kind, Nearest, Queries, build

_QUERIES, _GAP = 512, 0.6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--kinds", default="exact:fp16,ivf:fp16,ivf:int8,ivf:pq,hnsw:fp16")
    options = parser.parse_args()
    faiss.omp_set_num_threads(options.threads)
    vectors = drawn(options.rows, options.width, seed=0)
    queries = [
        Queries("images", drawn(_QUERIES, options.width, seed=1).astype(np.float32), skip_first=False),
        Queries("texts", shifted(drawn(_QUERIES, options.width, seed=2).astype(np.float32)), skip_first=False),
    ]
    with tempfile.TemporaryDirectory() as folder:
        for entry in options.kinds.split(","):
            kind, codes = entry.split(":")
            print(json.dumps(measured(vectors, queries, Path(folder), kind, codes)), flush=True)


def measured(vectors: np.ndarray, queries: list[Queries], folder: Path, kind: Kind, codes: Codes) -> dict[str, object]:
    path = folder / f"{kind}-{codes}.faiss"
    index = Nearest.open(path, vectors, build(vectors, path, queries, kind=kind, codes=codes))
    about = index.about
    rates = {}
    for one in queries:
        asked = one.vectors[:64] if kind == "exact" else one.vectors
        index.search(asked[:8], 10)
        started = time.perf_counter()
        for query in asked:
            index.search(query[None], 10)
        rates[f"queries_per_s_{one.kind}"] = round(len(asked) / (time.perf_counter() - started), 1)
    recalls = {f"recall_at_10_{one.kind}": one.at_10 for one in about.recall}
    facts = {"kind": kind, "codes": codes, "rows": len(vectors), "width": vectors.shape[1], "probes": about.probes}
    return facts | rates | recalls | {"mb": round(about.bytes / 1e6), "build_s": about.build_s}


def drawn(rows: int, width: int, seed: int) -> np.ndarray:
    """[rows, width] float16, L2-normalised; the centres do not depend on the seed."""
    centres = np.random.default_rng(99)
    coarse = centres.normal(size=(200, width)).astype(np.float32)
    fine = coarse[centres.integers(0, 200, 20_000)] + 0.7 * centres.normal(size=(20_000, width)).astype(np.float32)
    random = np.random.default_rng(seed)
    found = np.empty((rows, width), dtype=np.float16)
    for start in range(0, rows, 1 << 16):
        count = min(1 << 16, rows - start)
        part = fine[random.integers(0, len(fine), count)] + 0.7 * random.standard_normal((count, width), dtype=np.float32)
        found[start : start + count] = part / np.linalg.norm(part, axis=1, keepdims=True)
    return found


def shifted(vectors: Float32[np.ndarray, "q d"]) -> Float32[np.ndarray, "q d"]:
    gap = np.random.default_rng(98).normal(size=(1, vectors.shape[1])).astype(np.float32)
    moved = vectors + _GAP * gap / np.linalg.norm(gap)
    result: Float32[np.ndarray, "q d"] = moved / np.linalg.norm(moved, axis=1, keepdims=True)
    return result


if __name__ == "__main__":
    main()
