"""`mm data score`: measure what an index's columns do not hold, as Ray tasks over blocks of samples; what was measured is written chunk by
chunk, in the index's order, so that a stop loses the chunk under way and no more."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any

import numpy as np
import pyarrow as pa

from mm_core.curation.picture import SIDE, PictureScores, measure_picture
from mm_core.curation.picture_hash import HASHES, THUMBNAIL, VERSION, hash_picture
from mm_core.curation.score_rules import HASH, IMAGE
from mm_core.data.among import Among
from mm_core.data.index import Index
from mm_core.data.problems import SampleProblem
from mm_core.data.reader import IndexReader
from mm_core.data.scores import Scores, ScoresSummary
from mm_core.data.side_table import SideTable
from mm_core.errors import ConfigError
from pipelines.curate.batches import ALL
from pipelines.session import ray_session
from pipelines.tasks import run_tasks

_BLOCK_ROWS = 1024
Progress = Callable[[int], None]
"""Called with the number of rows measured since the last call."""


@dataclass(frozen=True)
class _Measure:
    """What is measured of every picture."""

    name: str
    settings: dict[str, Any]
    schema: pa.Schema
    of: Callable[[bytes], tuple[Any, ...]]
    """A picture's values, one of each column.

    Raises:
        SampleProblem: the picture cannot be decoded.
    """


@dataclass(frozen=True)
class _Block:
    """Some rows of a chunk."""

    chunk: int
    first: int
    last: int


@dataclass
class _Chunk:
    """What was measured of a chunk, as its blocks come in."""

    missing: int
    """Rows that have not come yet."""
    blocks: dict[int, pa.Table] = field(default_factory=dict)
    """By first row."""
    unreadable: Counter[str] = field(default_factory=Counter)

    def table(self) -> pa.Table:
        return pa.concat_tables(self.blocks[first] for first in sorted(self.blocks))


def score_images(index: Index, *, among: Among = ALL, on_progress: Progress = lambda rows: None) -> ScoresSummary:
    """Sharpness and information of every picture `among` some. After a stop the same call goes on.

    Raises:
        ConfigError: the index need not have pictures, or there are scores of this name by other settings.
    """
    schema = pa.schema([(name, pa.float32()) for name in PictureScores._fields])
    return _measured(index, _Measure(IMAGE, {"side": SIDE, "version": 1}, schema, measure_picture), among, on_progress)


def score_hashes(index: Index, *, among: Among = ALL, on_progress: Progress = lambda rows: None) -> ScoresSummary:
    """What `mm data dedup` compares pictures by, some 310 bytes a sample. After a stop the same call goes on.

    Raises:
        ConfigError: the index need not have pictures, or there are scores of this name by other settings.
    """
    schema = pa.schema(
        [
            ("picture", pa.binary(16)),
            ("hashes", pa.binary(8 * HASHES)),
            ("thumbnail", pa.binary(THUMBNAIL * THUMBNAIL)),
            ("contrast", pa.float32()),
        ]
    )
    return _measured(index, _Measure(HASH, {"version": VERSION}, schema, _hash), among, on_progress)


def _hash(data: bytes) -> tuple[Any, ...]:
    found = hash_picture(data)
    return found.digest, found.hashes.astype("<u8").tobytes(), found.thumbnail.tobytes(), found.contrast


def _measured(index: Index, measure: _Measure, among: Among, on_progress: Progress) -> ScoresSummary:
    if "image" not in index.summary.need:
        raise ConfigError(f"the samples of {index.url} need not have images: there is nothing to measure")
    scores = Scores(index, measure.name)
    numbers = tuple(column.name for column in measure.schema if pa.types.is_floating(column.type))
    summary = ScoresSummary(
        index_fingerprint=index.summary.fingerprint, kind=measure.name, settings=measure.settings, among=str(among), columns=numbers
    )
    found = scores.begin(summary)
    if found.complete:
        return found
    unreadable = Counter(found.unreadable)
    chunks: dict[int, _Chunk] = {}
    table = scores.values
    blocks = list(_blocks(table, on_progress))
    with ray_session():
        for number, (values, reasons) in run_tasks(partial(_measure_block, index.url, measure, among), blocks):
            block = blocks[number]
            first, last = table.bounds(block.chunk)
            chunk = chunks.setdefault(block.chunk, _Chunk(last - first))
            chunk.blocks[block.first] = values
            chunk.unreadable.update(reasons)
            chunk.missing -= block.last - block.first
            if not chunk.missing:
                table.write(block.chunk, chunk.table())
                unreadable.update(chunk.unreadable)
                scores.save(summary.model_copy(update={"unreadable": dict(unreadable)}))
                del chunks[block.chunk]
            on_progress(block.last - block.first)
    done = summary.model_copy(update={"unreadable": dict(unreadable), "complete": True})
    scores.save(done)
    return done


def _blocks(table: SideTable, on_progress: Progress) -> Iterator[_Block]:
    """Of the chunks that are not there yet."""
    for chunk in range(len(table)):
        first, last = table.bounds(chunk)
        if table.holds(chunk):
            on_progress(last - first)
            continue
        for start in range(first, last, _BLOCK_ROWS):
            yield _Block(chunk, start, min(last, start + _BLOCK_ROWS))


def _measure_block(url: str, measure: _Measure, among: Among, block: _Block) -> tuple[pa.Table, Counter[str]]:
    reader = _reader(url)
    index = reader.index
    rows: list[tuple[Any, ...]] = [(None,) * len(measure.schema)] * (block.last - block.first)
    good = block.first + np.flatnonzero(among.rows(index, block.first, block.last))
    unreadable: Counter[str] = Counter()
    for ordinal, sample in zip(good, reader.read(good.astype(np.uint64)), strict=True):
        try:
            if isinstance(sample, SampleProblem):
                raise sample
            rows[ordinal - block.first] = measure.of(sample.image or b"")
        except SampleProblem as problem:
            unreadable[problem.reason.value] += 1
    columns = [pa.array(values, column.type) for values, column in zip(zip(*rows, strict=True), measure.schema, strict=True)]
    return pa.Table.from_arrays(columns, schema=measure.schema), unreadable


@lru_cache(maxsize=4)
def _reader(url: str) -> IndexReader:
    return IndexReader(Index.open(url))
