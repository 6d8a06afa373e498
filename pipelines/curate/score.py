"""`mm data score`: measure what an index's columns do not hold, as Ray tasks over blocks of samples; the numbers are written chunk by
chunk, in the index's order, so that a stop loses the chunk under way and no more."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache, partial

import numpy as np
import pyarrow as pa
from jaxtyping import Float32

from mm_core.curation.picture import SIDE, PictureScores, measure_picture
from mm_core.curation.score_rules import Sharpness
from mm_core.data.index import Index
from mm_core.data.problems import SampleProblem
from mm_core.data.reader import IndexReader
from mm_core.data.scan import usable
from mm_core.data.scores import Scores, ScoresSummary
from mm_core.errors import ConfigError
from pipelines.session import ray_session
from pipelines.tasks import run_tasks

_BLOCK_ROWS = 1024
Progress = Callable[[int], None]
"""Called with the number of rows measured since the last call."""


@dataclass(frozen=True)
class _Block:
    """Some rows of a chunk."""

    chunk: int
    first: int
    last: int


@dataclass
class _Chunk:
    """A chunk's numbers, as its blocks come in."""

    values: Float32[np.ndarray, "rows columns"]
    missing: int
    """Rows that have not come yet."""
    unreadable: Counter[str] = field(default_factory=Counter)


def score_images(index: Index, *, on_progress: Progress = lambda rows: None) -> ScoresSummary:
    """Sharpness and information of every picture. After a stop the same call goes on.

    Raises:
        ConfigError: the index need not have pictures, or there are scores of this name by other settings.
    """
    if "image" not in index.summary.need:
        raise ConfigError(f"the samples of {index.url} need not have images: there is nothing to measure")
    scores = Scores(index, Sharpness.scores_name)
    summary = ScoresSummary(
        index_fingerprint=index.summary.fingerprint, kind="image", settings={"side": SIDE, "version": 1}, columns=PictureScores._fields
    )
    scores.begin(summary)
    found = scores.summary() or summary
    if found.complete:
        return found
    unreadable = Counter(found.unreadable)
    chunks: dict[int, _Chunk] = {}
    blocks = list(_blocks(scores, on_progress))
    with ray_session():
        for number, (values, reasons) in run_tasks(partial(_measure_block, index.url), blocks):
            block = blocks[number]
            first, last = scores.values.bounds(block.chunk)
            chunk = chunks.setdefault(block.chunk, _Chunk(np.full((last - first, len(summary.columns)), np.nan, np.float32), last - first))
            chunk.values[block.first - first : block.last - first] = values
            chunk.unreadable.update(reasons)
            chunk.missing -= block.last - block.first
            if not chunk.missing:
                columns = {name: pa.array(chunk.values[:, i], from_pandas=True) for i, name in enumerate(summary.columns)}
                scores.values.write(block.chunk, pa.table(columns))
                unreadable.update(chunk.unreadable)
                scores.save(summary.model_copy(update={"unreadable": dict(unreadable)}))
                del chunks[block.chunk]
            on_progress(block.last - block.first)
    done = summary.model_copy(update={"unreadable": dict(unreadable), "complete": True})
    scores.save(done)
    return done


def _blocks(scores: Scores, on_progress: Progress) -> Iterator[_Block]:
    """Of the chunks that are not there yet."""
    for chunk in range(len(scores.values)):
        first, last = scores.values.bounds(chunk)
        if scores.values.holds(chunk):
            on_progress(last - first)
            continue
        for start in range(first, last, _BLOCK_ROWS):
            yield _Block(chunk, start, min(last, start + _BLOCK_ROWS))


def _measure_block(url: str, block: _Block) -> tuple[Float32[np.ndarray, "rows columns"], Counter[str]]:
    reader = _reader(url)
    index = reader.index
    values = np.full((block.last - block.first, len(PictureScores._fields)), np.nan, dtype=np.float32)
    good = block.first + np.flatnonzero(usable(index.locators["flags"][block.first : block.last], index.summary.need))
    unreadable: Counter[str] = Counter()
    for ordinal, sample in zip(good, reader.read(good.astype(np.uint64)), strict=True):
        try:
            if isinstance(sample, SampleProblem):
                raise sample
            values[ordinal - block.first] = measure_picture(sample.image or b"")
        except SampleProblem as problem:
            unreadable[problem.reason.value] += 1
    return values, unreadable


@lru_cache(maxsize=4)
def _reader(url: str) -> IndexReader:
    return IndexReader(Index.open(url))
