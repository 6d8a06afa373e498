"""`mm data score`: measure what an index's columns do not hold, as Ray tasks that each write a chunk of the samples, in the index's order:
a stop loses the chunks under way and no more."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
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
from mm_core.errors import ConfigError
from pipelines.curate.batches import ALL
from pipelines.encoded_table import PROBLEM, count_problems
from pipelines.session import ray_session
from pipelines.tasks import run_tasks

_LEAST_ROWS, _MOST_ROWS, _CHUNKS = 1 << 10, 1 << 16, 256
"""Of a chunk: of a few thousand pictures there are several, for as many processors; of a billion some 15,000."""
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
        index_fingerprint=index.summary.fingerprint,
        kind=measure.name,
        settings=measure.settings,
        among=str(among),
        columns=numbers,
        chunk_rows=max(_LEAST_ROWS, min(_MOST_ROWS, 1 << (index.summary.rows // _CHUNKS).bit_length())),
    )
    found = scores.begin(summary)
    if found.complete:
        return found
    table, held = scores.values, scores.values.held()
    if held:
        on_progress(sum(last - first for first, last in map(table.bounds, held)))
    missing = [chunk for chunk in range(len(table)) if chunk not in held]
    with ray_session():
        for number, _ in run_tasks(partial(_measure_chunk, index.url, scores.name, measure, among), missing):
            first, last = table.bounds(missing[number])
            on_progress(last - first)
        found = found.model_copy(update={"unreadable": count_problems(table), "complete": True})
    scores.save(found)
    return found


def _measure_chunk(url: str, name: str, measure: _Measure, among: Among, chunk: int) -> None:
    reader = _reader(url)
    table = Scores(reader.index, name).values
    first, last = table.bounds(chunk)
    rows: list[tuple[Any, ...]] = [(None,) * (len(measure.schema) + 1)] * (last - first)
    good = first + np.flatnonzero(among.rows(reader.index, first, last))
    for ordinal, sample in zip(good, reader.read(good.astype(np.uint64)), strict=True):
        try:
            if isinstance(sample, SampleProblem):
                raise sample
            rows[ordinal - first] = (*measure.of(sample.image or b""), None)
        except SampleProblem as problem:
            rows[ordinal - first] = (*(None,) * len(measure.schema), problem.reason.value)
    schema = measure.schema.append(pa.field(PROBLEM, pa.string()))
    columns = [pa.array(values, column.type) for values, column in zip(zip(*rows, strict=True), schema, strict=True)]
    table.write(chunk, pa.Table.from_arrays(columns, schema=schema))


@lru_cache(maxsize=4)
def _reader(url: str) -> IndexReader:
    return IndexReader(Index.open(url))
