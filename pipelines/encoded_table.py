"""A table beside an index of what models make of its samples.

Blocks come out of the encoders in the index's order and are written, a chunk's together, by tasks; the driver sees references alone. A
stop loses the chunks under way: those that are there are not made again. What is written depends on the samples and the models, not on
how many tasks and actors there are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from numpy.typing import NDArray

from mm_core.data.index import Index
from mm_core.data.side_table import SideTable
from pipelines.causes import own_errors
from pipelines.encode import Block, Measure, Model, encode
from pipelines.tasks import run_tasks

PROBLEM = "problem"
"""The column that says why a sample could not be read; null where it was, and where it was not to be."""
_BLOCK_ROWS = 256
"""Some 40 MB of decoded images."""
_JOB_CHUNKS = 256
"""Of one Ray Data job, whose driver holds its list of blocks: two million rows, beside which starting the actors again is little."""
_WRITES = 8
Progress = Callable[[int], None]
"""Called with the number of rows made since the last call."""
ModelsOf = Callable[[int, int], NDArray[np.int8]]
"""Of rows `first` up to `last`: the number of each one's model, or LEFT_OUT."""


def fill(
    index: Index,
    table: SideTable,
    models: Sequence[Model],
    models_of: ModelsOf,
    measure: Measure,
    *,
    actors: int | None = None,
    on_progress: Progress = lambda rows: None,
) -> None:
    """Write the chunks that are not there yet."""
    held = table.held()
    missing = [chunk for chunk in range(len(table)) if chunk not in held]
    if held:
        on_progress(sum(last - first for first, last in map(table.bounds, held)))
    for start in range(0, len(missing), _JOB_CHUNKS):
        chunks = missing[start : start + _JOB_CHUNKS]
        blocks = [block for chunk in chunks for block in _blocks(models_of, *table.bounds(chunk))]
        with own_errors():
            bundles = encode(index, blocks, models, measure, actors=actors).iter_internal_ref_bundles()
            try:
                _write(table, chunks, bundles, on_progress)
            finally:
                del bundles  # ends the job where it was stopped


def count_problems(table: SideTable) -> dict[str, int]:
    """The samples that could not be read, by reason."""
    found: Counter[str] = Counter()
    for _, counts in run_tasks(partial(_problems, table), range(len(table))):
        found.update(counts)
    return dict(sorted(found.items()))


def _problems(table: SideTable, chunk: int) -> Counter[str]:
    return Counter(table.read(chunk, [PROBLEM])[PROBLEM].drop_null().to_pylist())


def _blocks(models_of: ModelsOf, first: int, last: int) -> Iterator[Block]:
    models = models_of(first, last)
    for start in range(first, last, _BLOCK_ROWS):
        end = min(last, start + _BLOCK_ROWS)
        yield Block(np.arange(start, end, dtype=np.uint64), models[start - first : end - first])


def _write(table: SideTable, chunks: Sequence[int], bundles: Iterator[Any], on_progress: Progress) -> None:
    """Hand a chunk's blocks to a task as soon as all have come. They come in order, and none has rows of two chunks."""
    task, waiting, writes = ray.remote(num_cpus=0)(_write_chunk), iter(chunks), list[ray.ObjectRef]()
    chunk, parts, rows = next(waiting), list[ray.ObjectRef](), 0
    for bundle in bundles:
        for part, metadata in zip(bundle.block_refs, bundle.metadata, strict=True):
            parts.append(part)
            rows += metadata.num_rows
            on_progress(metadata.num_rows)
            first, last = table.bounds(chunk)
            if rows == last - first:
                writes.append(task.remote(table, chunk, *parts))
                chunk, parts, rows = next(waiting, -1), [], 0
        while len(writes) > _WRITES:
            done, writes = ray.wait(writes)
            ray.get(done)
    ray.get(writes)


def _write_chunk(table: SideTable, chunk: int, *parts: pa.Table) -> None:
    rows = pa.concat_tables(parts)
    assert np.array_equal(rows["ordinal"].to_numpy(), np.arange(*table.bounds(chunk))), "blocks came out of order"
    table.write(chunk, rows.rename_columns({"reason": PROBLEM}).drop_columns(["ordinal", "captions", "label"]))
