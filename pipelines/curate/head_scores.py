"""`mm data score INDEX head`: a classifier head over what `mm data score INDEX embeddings` wrote, chunk by chunk as Ray tasks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa

from mm_core.curation.head import Between, Head, Output, read_head
from mm_core.curation.score_rules import HEAD, embedded_by
from mm_core.data.among import Among
from mm_core.data.columns import vectors_of
from mm_core.data.index import Index
from mm_core.data.scores import Scores, ScoresSummary
from mm_core.errors import ConfigError, DataError
from mm_core.store import open_file, reaching
from pipelines.curate.batches import ALL, opened
from pipelines.session import ray_session
from pipelines.tasks import run_tasks

_FILE = "model.safetensors"
_VECTORS = "image"
Progress = Callable[[int], None]
"""Called with the number of rows scored since the last call."""


@dataclass(frozen=True)
class HeadScore:
    """A head, and how it is laid over which embeddings."""

    weights: str
    """A safetensors file, its URL, or `OWNER/REPOSITORY[:FILE]` on the hub."""
    sha256: str
    embeddings: str
    between: Between = Between.RELU
    output: Output = Output.IDENTITY


def score_by_head(
    index: Index, head: HeadScore, *, name: str | None = None, among: Among = ALL, on_progress: Progress = lambda rows: None
) -> ScoresSummary:
    """The head's outputs for every sample `among` some that has an embedding. After a stop the same call goes on.

    Raises:
        DataError: weights or embeddings that are not there, or weights of another digest or form.
        ConfigError: a head for embeddings of another dimension, or there are scores of this name by other settings.
    """
    loaded = read_head(read_weights(head.weights), head.sha256, head.weights)
    source = _embeddings(index, head.embeddings)
    if loaded.inputs != source.vectors[_VECTORS]:
        raise ConfigError(
            f"{head.weights} takes embeddings of {loaded.inputs} numbers, those of {head.embeddings!r} have {source.vectors[_VECTORS]}:"
            " a head is for the embeddings of the model it was trained with"
        )
    summary = ScoresSummary(
        index_fingerprint=index.summary.fingerprint,
        kind=HEAD,
        settings={
            "weights": head.sha256.lower(),
            "embeddings": source.fingerprint,
            "between": head.between.value,
            "output": head.output.value,
            "version": 1,
        },
        among=str(among),
        columns=loaded.columns,
        chunk_rows=source.chunk_rows,
    )
    scores = Scores(index, name or HEAD)
    found = scores.begin(summary)
    if not found.complete:
        table, held = scores.values, scores.values.held()
        if held:
            on_progress(sum(last - first for first, last in map(table.bounds, held)))
        missing = [chunk for chunk in range(len(table)) if chunk not in held]
        with ray_session():
            for number, _ in run_tasks(partial(_score_chunk, index.url, head, loaded, scores.name, among), missing):
                first, last = table.bounds(missing[number])
                on_progress(last - first)
        found = found.model_copy(update={"complete": True, "unreadable": source.unreadable})
        scores.save(found)
    return found


def read_weights(source: str) -> bytes:
    """The bytes of a file, here, in a store or on the hub.

    Raises:
        DataError: there is none.
    """
    path = Path(source)
    try:
        if "://" not in source and not path.is_file():
            path = _download(source)
        with reaching(source), open_file(source if "://" in source else str(path), "rb") as file:
            return bytes(file.read())
    except (OSError, ValueError) as error:
        reason = next(iter(str(error).splitlines()), repr(error))
        raise DataError(f"no weights at {source}: give a safetensors file, or OWNER/REPOSITORY:FILE on the hub ({reason})") from None


def _download(source: str) -> Path:
    from huggingface_hub import hf_hub_download

    repository, _, file = source.partition(":")
    if source.startswith((".", "/", "~")) or repository.count("/") != 1:
        raise FileNotFoundError("no such file")
    return Path(hf_hub_download(repository, file or _FILE))


def _embeddings(index: Index, name: str) -> ScoresSummary:
    try:
        summary = Scores(index, name).complete(embedded_by(name))
    except DataError as error:
        raise DataError(f"a head works on embeddings, and {error}") from None
    if _VECTORS not in summary.vectors:
        raise ConfigError(
            f"the scores {name!r} of {index.url} are no embeddings ({summary.kind}); make some: mm data score {index.url}"
            f" {embedded_by('NAME')}, and name them with --embeddings"
        )
    return summary


def _score_chunk(url: str, head: HeadScore, loaded: Head, name: str, among: Among, chunk: int) -> None:
    index = opened(url)
    column = Scores(index, head.embeddings).values.read(chunk, [_VECTORS])[_VECTORS]
    values = Scores(index, name).values
    present = column.combine_chunks().is_valid().to_numpy(zero_copy_only=False) & among.rows(index, *values.bounds(chunk))
    vectors = vectors_of(column, np.float16).astype(np.float32)
    vectors[~present] = 0
    found = loaded(vectors, head.between, head.output)
    values.write(chunk, pa.table({key: pa.array(found[:, i], mask=~present) for i, key in enumerate(loaded.columns)}))
