"""`mm data score INDEX similarity` and `embeddings`: every sample through a model's towers, as a Ray Data job.

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

from mm_core.bundle import Bundle
from mm_core.curation.score_rules import EMBEDDINGS
from mm_core.curation.similarity import Similarities, mean_texts, similarities
from mm_core.data.index import Index
from mm_core.data.scores import Scores, ScoresSummary
from mm_core.data.side_table import SMALL_CHUNK_ROWS, SideTable
from mm_core.errors import ConfigError
from pipelines.causes import own_errors
from pipelines.curate.folds import Fold, Folds
from pipelines.encode import Block, Measure, encode, image_features, text_features
from pipelines.session import ray_session
from pipelines.tasks import run_tasks

_BLOCK_ROWS = 256
"""Some 40 MB of decoded images."""
_JOB_CHUNKS = 256
"""Of one Ray Data job, whose driver holds its list of blocks: two million rows, beside which starting the actors again is little."""
_WRITES = 8
PROBLEM = "problem"
"""The column that says why a sample could not be scored; null where it was, and where it was not to be."""
Progress = Callable[[int], None]
"""Called with the number of rows scored since the last call."""


def score_by_models(
    index: Index,
    what: str,
    folds: Sequence[Fold],
    *,
    name: str | None = None,
    actors: int | None = None,
    on_progress: Progress = lambda rows: None,
    on_note: Callable[[str], None] = lambda note: None,
) -> ScoresSummary:
    """Image-text similarity of every sample, of `what` embeddings also both sides' features. After a stop the same call goes on.

    Raises:
        ConfigError: folds that do not go together, an index without pairs, or there are scores of this name by other settings.
        BundleError, DataError: a model or ledger that cannot be used.
    """
    if missing := {"image", "text"} - set(index.summary.need):
        raise ConfigError(f"the samples of {index.url} need not have {' and '.join(sorted(missing))}: there is no similarity to measure")
    if what == EMBEDDINGS and any(fold.ledger is not None for fold in folds):
        raise ConfigError("embeddings of several models lie in spaces of their own and cannot be compared: give one --model, not --fold")
    opened = Folds.open(index, folds)
    for note in opened.notes:
        on_note(note)
    summary = ScoresSummary(
        index_fingerprint=index.summary.fingerprint,
        kind=what,
        settings=opened.settings | {"version": 1},
        columns=Similarities._fields,
        vectors=dict.fromkeys(("image", "text"), opened.models[0].embed_dim) if what == EMBEDDINGS else {},
        chunk_rows=SMALL_CHUNK_ROWS,
    )
    scores = Scores(index, name or what)
    found = scores.begin(summary)
    if not found.complete:
        with ray_session():
            _fill(opened, scores.values, embeddings if what == EMBEDDINGS else similarity, actors, on_progress)
            found = found.model_copy(update={"unreadable": count_problems(scores.values), "complete": True})
        scores.save(found)
    return found


def similarity(bundle: Bundle, images: NDArray[np.uint8], captions: list[list[str]]) -> dict[str, NDArray[np.float32]]:
    """Measure: how well each image and its captions fit."""
    return _measured(bundle, images, captions)[0]._asdict()


def embeddings(bundle: Bundle, images: NDArray[np.uint8], captions: list[list[str]]) -> dict[str, NDArray[Any]]:
    """Measure: how well they fit; each image's features, and the mean of its captions'."""
    found, image, texts, owners = _measured(bundle, images, captions)
    text = mean_texts(texts, owners, len(images))
    return found._asdict() | {"image": image.astype("<f2"), "text": text.astype("<f2")}


def _measured(
    bundle: Bundle, images: NDArray[np.uint8], captions: list[list[str]]
) -> tuple[Similarities, NDArray[np.float32], NDArray[np.float32], NDArray[np.int64]]:
    image = image_features(bundle, images)
    texts = text_features(bundle, [text for each in captions for text in each])
    owners = np.repeat(np.arange(len(captions)), [len(each) for each in captions])
    return similarities(image, texts, owners), image, texts, owners


def count_problems(table: SideTable) -> dict[str, int]:
    """The samples that could not be scored, by reason."""
    found: Counter[str] = Counter()
    for _, counts in run_tasks(partial(_problems, table), range(len(table))):
        found.update(counts)
    return dict(sorted(found.items()))


def _problems(table: SideTable, chunk: int) -> Counter[str]:
    return Counter(table.read(chunk, [PROBLEM])[PROBLEM].drop_null().to_pylist())


def _fill(folds: Folds, table: SideTable, measure: Measure, actors: int | None, on_progress: Progress) -> None:
    """Write the chunks that are not there yet."""
    held = table.held()
    missing = [chunk for chunk in range(len(table)) if chunk not in held]
    if held:
        on_progress(sum(last - first for first, last in map(table.bounds, held)))
    for start in range(0, len(missing), _JOB_CHUNKS):
        chunks = missing[start : start + _JOB_CHUNKS]
        blocks = [block for chunk in chunks for block in _blocks(folds, *table.bounds(chunk))]
        with own_errors():
            bundles = encode(folds.index, blocks, folds.models, measure, actors=actors).iter_internal_ref_bundles()
            try:
                _write(table, chunks, bundles, on_progress)
            finally:
                del bundles  # ends the job where it was stopped


def _blocks(folds: Folds, first: int, last: int) -> Iterator[Block]:
    models = folds.models_of(first, last)
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
