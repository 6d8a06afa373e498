"""`mm data score INDEX similarity` and `embeddings`: every sample through a model's towers, as a Ray Data job."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mm_core.bundle import Bundle
from mm_core.curation.score_rules import EMBEDDINGS
from mm_core.curation.similarity import Similarities, mean_texts, similarities
from mm_core.data.among import Among
from mm_core.data.index import Index
from mm_core.data.scores import Scores, ScoresSummary
from mm_core.data.side_table import SMALL_CHUNK_ROWS
from mm_core.errors import ConfigError
from pipelines.curate.batches import ALL
from pipelines.curate.folds import Fold, Folds
from pipelines.encode import image_features, text_features
from pipelines.encoded_table import count_problems, fill
from pipelines.session import ray_session

Progress = Callable[[int], None]
"""Called with the number of rows scored since the last call."""


def score_by_models(
    index: Index,
    what: str,
    folds: Sequence[Fold],
    *,
    name: str | None = None,
    among: Among = ALL,
    actors: int | None = None,
    on_progress: Progress = lambda rows: None,
    on_note: Callable[[str], None] = lambda note: None,
) -> ScoresSummary:
    """Image-text similarity of every sample `among` some, of `what` embeddings also both sides' features. After a stop the same call
    goes on.

    Raises:
        ConfigError: folds that do not go together, an index without pairs, or there are scores of this name by other settings.
        BundleError, DataError: a model or ledger that cannot be used.
    """
    if missing := {"image", "text"} - set(index.summary.need):
        raise ConfigError(f"the samples of {index.url} need not have {' and '.join(sorted(missing))}: there is no similarity to measure")
    if what == EMBEDDINGS and any(fold.ledger is not None for fold in folds):
        raise ConfigError("embeddings of several models lie in spaces of their own and cannot be compared: give one --model, not --fold")
    opened = Folds.open(index, folds, among)
    for note in opened.notes:
        on_note(note)
    summary = ScoresSummary(
        index_fingerprint=index.summary.fingerprint,
        kind=what,
        settings=opened.settings | {"version": 1},
        among=str(among),
        columns=Similarities._fields,
        vectors=dict.fromkeys(("image", "text"), opened.models[0].embed_dim) if what == EMBEDDINGS else {},
        chunk_rows=SMALL_CHUNK_ROWS,
    )
    scores = Scores(index, name or what)
    found = scores.begin(summary)
    if not found.complete:
        with ray_session():
            measure = embeddings if what == EMBEDDINGS else similarity
            fill(index, scores.values, opened.models, opened.models_of, measure, actors=actors, on_progress=on_progress)
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
