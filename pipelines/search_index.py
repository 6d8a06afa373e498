"""`mm search-index`: what `mm embed` wrote, made searchable: vectors in one mapped file, what finds the nearest of them, and what is known
of each. It is written beside and put in its place whole."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from jaxtyping import Float32
from numpy.lib import format as npy
from numpy.typing import NDArray

from mm_core.data.columns import vectors_of
from mm_core.data.index import Index
from mm_core.errors import DataError
from mm_core.search.embeddings import (
    EmbeddingsSummary,
    Searchable,
    SearchSummary,
    read_embeddings_summary,
    search_folder,
    values_of,
    write_search_summary,
)
from mm_core.search.nearest import Codes, Kind, Queries, build
from pipelines.curate.report.maps import positions

ITEMS = pa.schema(
    [
        ("ordinal", pa.uint64()),
        ("uid", pa.string()),
        ("caption", pa.string()),
        ("key", pa.string()),
        ("shard", pa.string()),
        ("width", pa.uint32()),
        ("height", pa.uint32()),
        ("format", pa.string()),
        ("label", pa.int32()),
        ("captions", pa.uint32()),
    ]
)
CAPTIONS = pa.schema([("item", pa.uint64()), ("caption", pa.string())])
_MAP = pa.schema([("item", pa.uint64()), ("x", pa.float32()), ("y", pa.float32())])
_COLUMNS = ["uid", "key", "shard", "width", "height", "image_format", "label", "captions"]
_QUERIES, _MAPPED, _MIN_MAPPED = 256, 1500, 12
Progress = Callable[[int], None]


@dataclass(frozen=True)
class SearchOptions:
    kind: Kind = "auto"
    codes: Codes = "fp16"
    recall: float = 0.95
    """At 10, that the number of probes is chosen for."""


def make_searchable(
    folder: Path,
    options: SearchOptions,
    *,
    on_progress: Progress = lambda rows: None,
    on_rows: Progress = lambda rows: None,
    on_note: Callable[[str], None] = lambda note: None,
) -> SearchSummary:
    """
    Raises:
        DataError: nothing is embedded there, or not all.
        ConfigError: options that do not go together.
    """
    embedded = read_embeddings_summary(folder)
    if embedded is None or not embedded.complete:
        what = f"the vectors in {folder} are not finished" if embedded else f"there are no vectors in {folder}"
        raise DataError(f"{what}: run mm embed MODEL SHARDS --out {folder}" + (" again" if embedded else ""))
    on_rows(embedded.rows)
    work = folder / f".search-{os.getpid()}"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    try:
        counts = _write_rows(folder, work, embedded, on_progress)
        images, texts = (_mapped(work / f"{name}.npy") if count else None for name, count in counts.items())
        assert images is not None, "what is embedded has pictures"
        on_note("what finds the nearest")
        found = _searchables(work, images, texts, options)
        on_note("the map")
        _write_map(work, images)
        summary = SearchSummary(
            model=embedded.model,
            model_digest=embedded.model_digest,
            embed_dim=embedded.embed_dim,
            index_url=embedded.index_url,
            index_fingerprint=embedded.index_fingerprint,
            **found,
        )
        write_search_summary(work, summary)
        _put(work, search_folder(folder))
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return summary


def _write_rows(folder: Path, work: Path, embedded: EmbeddingsSummary, on_progress: Progress) -> dict[str, int]:
    """Vectors and metadata, chunk by chunk; returns how many images and texts there are."""
    table, index = values_of(folder, embedded), Index.open(embedded.index_url)
    if index.summary.fingerprint != embedded.index_fingerprint:
        raise DataError(f"the index at {index.url} is another than the one that was embedded: embed it again")
    counts = {"images": 0, "texts": 0}
    with (
        _VectorFile(work / "images.npy", embedded.embed_dim) as images,
        _VectorFile(work / "texts.npy", embedded.embed_dim) as texts,
        pa.ipc.new_file(str(work / "items.arrow"), ITEMS) as items,
        pa.ipc.new_file(str(work / "captions.arrow"), CAPTIONS) as captions,
    ):
        for chunk in range(len(table)):
            first, last = table.bounds(chunk)
            values = table.read(chunk, ["image", "texts"])
            there = np.asarray(values["image"].is_valid())
            rows = index.rows(first, last, _COLUMNS).filter(pa.array(there))
            images.write(np.ascontiguousarray(vectors_of(values["image"], np.float16)[there]))
            of_each = values["texts"].filter(pa.array(there)).to_pylist()
            texts.write(np.frombuffer(b"".join(of_each), dtype="<f2").reshape(-1, embedded.embed_dim))
            items.write_table(_items(rows, first + np.flatnonzero(there), index.shard_names))
            captions.write_table(_captions(rows, of_each, counts["images"], embedded.embed_dim))
            counts = {"images": images.rows, "texts": texts.rows}
            on_progress(last - first)
    return counts


def _items(rows: pa.Table, ordinals: NDArray[np.int64], shards: list[str]) -> pa.Table:
    every = rows["captions"].to_pylist()
    columns = {
        "ordinal": ordinals.astype(np.uint64),
        "uid": rows["uid"],
        "caption": [each[0] if each else None for each in every],
        "key": rows["key"],
        "shard": [shards[shard] for shard in rows["shard"].to_pylist()],
        "width": rows["width"],
        "height": rows["height"],
        "format": rows["image_format"],
        "label": rows["label"],
        "captions": [len(each or ()) for each in every],
    }
    return pa.table(columns, schema=ITEMS)


def _captions(rows: pa.Table, of_each: list[bytes], before: int, width: int) -> pa.Table:
    """The captions that have vectors, with the item of each."""
    counts = [len(data) // (2 * width) for data in of_each]
    texts = [text for every, count in zip(rows["captions"].to_pylist(), counts, strict=True) for text in (every or ())[:count]]
    return pa.table(
        {"item": np.repeat(np.arange(before, before + len(counts)), counts).astype(np.uint64), "caption": texts}, schema=CAPTIONS
    )


class _VectorFile:
    """A `.npy` of float16 whose number of rows is known only at its end."""

    def __init__(self, path: Path, width: int) -> None:
        self._path, self._width, self.rows = path, width, 0

    def __enter__(self) -> _VectorFile:
        self._file = self._path.open("wb")
        self._header()
        return self

    def __exit__(self, *_: object) -> None:
        self._file.seek(0)
        self._header()
        self._file.close()

    def write(self, vectors: NDArray[np.float16]) -> None:
        self._file.write(vectors.astype("<f2").tobytes())
        self.rows += len(vectors)

    def _header(self) -> None:
        """Padded by NumPy so that the number of rows may grow."""
        npy.write_array_header_1_0(self._file, {"descr": "<f2", "fortran_order": False, "shape": (self.rows, self._width)})


def _searchables(
    work: Path, images: NDArray[np.float16], texts: NDArray[np.float16] | None, options: SearchOptions
) -> dict[str, Searchable]:
    """Recall is measured with queries of the kinds that will come: those of the other modality lie elsewhere than what they look for."""
    drawn = {"images": _drawn(images), **({"texts": _drawn(texts)} if texts is not None else {})}
    found = {}
    for name, vectors in (("images", images), ("texts", texts)):
        if vectors is None:
            continue
        queries = [Queries(kind, chosen, skip_first=kind == name) for kind, chosen in drawn.items()]  # type: ignore[arg-type]
        path = work / f"{name}.faiss"
        found[name] = build(vectors, path, queries, kind=options.kind, codes=options.codes, recall=options.recall)
    return found


def _drawn(vectors: NDArray[np.float16]) -> Float32[np.ndarray, "q d"]:
    rows = np.sort(np.random.default_rng(0).choice(len(vectors), min(_QUERIES, len(vectors)), replace=False))
    chosen: Float32[np.ndarray, "q d"] = vectors[rows].astype(np.float32)
    return chosen


def _write_map(work: Path, images: NDArray[np.float16]) -> None:
    """Of some of the pictures, drawn."""
    count = min(_MAPPED, len(images))
    items = np.sort(np.random.default_rng(0).choice(len(images), count, replace=False)) if count >= _MIN_MAPPED else np.zeros(0, np.int64)
    places = positions(images[items].astype(np.float32), 0) if len(items) else np.zeros((0, 2))
    table = pa.table({"item": items.astype(np.uint64), "x": places[:, 0].astype("<f4"), "y": places[:, 1].astype("<f4")}, schema=_MAP)
    with pa.ipc.new_file(str(work / "map.arrow"), _MAP) as file:
        file.write_table(table)


def _mapped(path: Path) -> NDArray[np.float16]:
    vectors: NDArray[np.float16] = np.load(path, mmap_mode="r", allow_pickle=False)
    return vectors


def _put(work: Path, target: Path) -> None:
    """In the place of what was there. Who has that mapped keeps it."""
    old = work.with_name(f"{work.name}-old")
    if target.exists():
        target.rename(old)
    work.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def table_rows(summary: SearchSummary) -> Iterator[tuple[str, ...]]:
    """For people: what is searched, and how well."""
    for name in ("images", "texts"):
        about: Searchable | None = getattr(summary, name)
        if about is not None:
            recall = ", ".join(f"{one.at_10:.3f} by {one.kind}" for one in about.recall) or "1 (exact)"
            yield name, f"{about.vectors:,}", f"{about.kind} {about.codes}", str(about.probes or ""), recall, f"{about.bytes / 1e6:,.1f} MB"
