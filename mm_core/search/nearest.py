"""The nearest of many vectors by inner product: faiss, its files mapped from disk.

Exact below 100,000 vectors; above, cells (IVF) of which a query looks at as many as the wanted recall takes, or a graph (HNSW). Codes that
lose precision (int8, product quantisation) are made up for by comparing more candidates again by their vectors.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import faiss
import numpy as np
from jaxtyping import Float32, Int64
from numpy.typing import NDArray

from mm_core.errors import ConfigError, DataError
from mm_core.search.embeddings import Recall, Searchable

EXACT_BELOW = 100_000
_RERANKED = {"fp16": 0, "int8": 4, "pq": 16}
_TRAIN_PER_CELL = 40
_HNSW_LINKS = 32
_HNSW_BUILD = 100
_BLOCK_ROWS = 1 << 16
_BRUTE_ROWS = 50_000
"""That a filter leaves, below which all of them are compared."""

Kind = Literal["auto", "exact", "ivf", "hnsw"]
Codes = Literal["fp16", "int8", "pq"]
Vectors = NDArray[np.float16]
"""[n, d], L2-normalised, mapped."""


@dataclass(frozen=True)
class Queries:
    """What recall is measured with."""

    kind: Literal["texts", "images"]
    vectors: Float32[np.ndarray, "q d"]
    skip_first: bool
    """Whether each is among the vectors itself."""


def build(
    vectors: Vectors, path: Path, queries: list[Queries], *, kind: Kind = "auto", codes: Codes = "fp16", recall: float = 0.95
) -> Searchable:
    """Write the index of `vectors` at `path`, with the smallest number of probes that reaches `recall` at 10 with all `queries`.

    Raises:
        ConfigError: codes that this kind does not have.
    """
    started = time.monotonic()
    chosen = kind if kind != "auto" else ("exact" if len(vectors) < EXACT_BELOW else "ivf")
    if chosen == "exact" and codes != "fp16":
        raise ConfigError(f"an exact index holds vectors as they are: --codes {codes} goes with --kind ivf or hnsw")
    index = faiss.index_factory(vectors.shape[1], _factory(chosen, codes, vectors), faiss.METRIC_INNER_PRODUCT)
    if chosen == "hnsw":
        index.hnsw.efConstruction = _HNSW_BUILD
    index.train(_training(vectors, index))
    for start in range(0, len(vectors), _BLOCK_ROWS):
        index.add(vectors[start : start + _BLOCK_ROWS].astype(np.float32))
    faiss.write_index(index, str(path))
    found = Searchable(
        vectors=len(vectors),
        kind=chosen,
        codes=codes,
        reranked=0 if chosen == "exact" else _RERANKED[codes],
        bytes=path.stat().st_size,
        build_s=round(time.monotonic() - started, 2),
    )
    return found if chosen == "exact" else _tuned(Nearest(index, vectors, found), queries, recall)


class Nearest:
    """An index that is open."""

    def __init__(self, index: Any, vectors: Vectors, about: Searchable) -> None:
        self._index, self._vectors, self.about = index, vectors, about

    @classmethod
    def open(cls, path: Path, vectors: Vectors, about: Searchable) -> Nearest:
        """
        Raises:
            DataError: it is not there, damaged, or of other vectors.
        """
        try:
            index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC)
        except RuntimeError as error:
            raise DataError(f"cannot read {path}: {' '.join(str(error).split())[:200]}; make it again with mm search-index") from None
        if index.ntotal != len(vectors) or index.d != vectors.shape[1]:
            raise DataError(f"{path} does not belong to its vectors: make it again with mm search-index")
        return cls(index, vectors, about)

    def search(
        self, queries: Float32[np.ndarray, "q d"], count: int, *, among: NDArray[np.bool_] | None = None, probes: int | None = None
    ) -> tuple[Float32[np.ndarray, "q k"], Int64[np.ndarray, "q k"]]:
        """Cosines and rows of the nearest, best first; row -1 where there are no more.

        Args:
            among: [n]: which rows count; all by default.
        """
        count = max(1, min(count, len(self._vectors)))
        if among is not None:
            rows = np.flatnonzero(among)
            if len(rows) <= max(_BRUTE_ROWS, 10 * count):
                return self._compared(queries, np.broadcast_to(rows, (len(queries), len(rows))), count)
        asked = min(len(self._vectors), count * max(1, self.about.reranked))
        scores, rows = self._index.search(queries, asked, params=self._parameters(among, probes, asked))
        return (scores, rows) if asked == count and not self.about.reranked else self._compared(queries, rows, count)

    def exact(self, queries: Float32[np.ndarray, "q d"], count: int) -> Int64[np.ndarray, "q k"]:
        """Rows of the nearest, every vector compared."""
        heap = faiss.ResultHeap(len(queries), count, keep_max=True)
        for start in range(0, len(self._vectors), _BLOCK_ROWS):
            block = self._vectors[start : start + _BLOCK_ROWS].astype(np.float32)
            scores, rows = faiss.knn(queries, block, min(count, len(block)), metric=faiss.METRIC_INNER_PRODUCT)
            heap.add_result(scores, rows + start)
        heap.finalize()
        found: Int64[np.ndarray, "q k"] = heap.I
        return found

    def _compared(
        self, queries: Float32[np.ndarray, "q d"], rows: Int64[np.ndarray, "q c"], count: int
    ) -> tuple[Float32[np.ndarray, "q k"], Int64[np.ndarray, "q k"]]:
        """The best of some rows for each query, by their vectors."""
        scores = np.full((len(queries), count), -np.inf, dtype=np.float32)
        found = np.full((len(queries), count), -1, dtype=np.int64)
        for i, query in enumerate(queries):
            candidates = np.sort(rows[i][rows[i] >= 0])  # in the file's order
            cosines = self._vectors[candidates].astype(np.float32) @ query
            best = np.argsort(-cosines, kind="stable")[:count]
            scores[i, : len(best)], found[i, : len(best)] = cosines[best], candidates[best]
        return scores, found

    def _parameters(self, among: NDArray[np.bool_] | None, probes: int | None, count: int) -> Any:
        """Where a filter leaves a part, proportionally more is looked at."""
        probes = probes or self.about.probes
        given: dict[str, Any] = {}
        if among is not None:
            given["sel"] = faiss.IDSelectorBitmap(np.packbits(among, bitorder="little"))
            probes = math.ceil(probes / max(float(among.mean()), 1e-3))
        match self.about.kind:
            case "ivf":
                return faiss.SearchParametersIVF(nprobe=min(probes, self._index.nlist), **given)
            case "hnsw":
                return faiss.SearchParametersHNSW(efSearch=max(probes, count), **given)
            case _:
                return faiss.SearchParameters(**given)


def _factory(kind: str, codes: Codes, vectors: Vectors) -> str:
    rows, width = vectors.shape
    code = {"fp16": "SQfp16", "int8": "SQ8", "pq": f"PQ{_pieces(width)}"}[codes]
    match kind:
        case "exact":
            return "SQfp16"
        case "hnsw":
            return f"HNSW{_HNSW_LINKS}_{code}"
        case _:
            return f"IVF{_cells(rows)},{code}"


def _cells(rows: int) -> int:
    """Four times the root of the rows, faiss' own rule, in powers of two, and few enough to be trained."""
    return int(2 ** round(math.log2(max(1, min(4 * math.sqrt(rows), rows / 39)))))


def _pieces(width: int) -> int:
    """Of product quantisation: eight dimensions each, or the next number that divides."""
    return next(pieces for pieces in range(max(1, width // 8), 0, -1) if width % pieces == 0)


def _training(vectors: Vectors, index: Any) -> Float32[np.ndarray, "m d"]:
    wanted = min(len(vectors), max(20_000, _TRAIN_PER_CELL * getattr(index, "nlist", 1)))
    rows = np.sort(np.random.default_rng(0).choice(len(vectors), wanted, replace=False))
    drawn: Float32[np.ndarray, "m d"] = vectors[rows].astype(np.float32)
    return drawn


def _tuned(nearest: Nearest, queries: list[Queries], wanted: float) -> Searchable:
    """With the fewest probes that reach the recall, doubled until they do or everything is looked at."""
    truth = [nearest.exact(one.vectors, 11 if one.skip_first else 10) for one in queries]
    most = nearest._index.nlist if nearest.about.kind == "ivf" else 4096
    probes = 1 if nearest.about.kind == "ivf" else 16
    while True:
        found = [_recall(nearest, one, exact, probes) for one, exact in zip(queries, truth, strict=True)]
        if probes >= most or all(recall.at_10 >= wanted for recall in found):
            return nearest.about.model_copy(update={"probes": probes, "recall": tuple(found)})
        probes = min(most, 2 * probes)


def _recall(nearest: Nearest, queries: Queries, truth: Int64[np.ndarray, "q k"], probes: int) -> Recall:
    _, rows = nearest.search(queries.vectors, truth.shape[1], probes=probes)
    first = 1 if queries.skip_first else 0
    hits = [len(set(mine[first:]) & set(theirs[first:])) / (truth.shape[1] - first) for mine, theirs in zip(rows, truth, strict=True)]
    return Recall(queries=len(hits), kind=queries.kind, at_10=round(float(np.mean(hits)), 4))
