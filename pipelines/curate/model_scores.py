"""`mm data score INDEX similarity` and `embeddings`: every sample through a model's towers, as a Ray Data job."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
import torch
from numpy.typing import NDArray

from mm_core.bundle import Bundle, load_bundle
from mm_core.curation.score_rules import EMBEDDINGS
from mm_core.curation.similarity import References, Similarities, mean_texts, similarities
from mm_core.data.among import Among
from mm_core.data.decoded import decode_samples
from mm_core.data.index import Index
from mm_core.data.permutation import U64
from mm_core.data.scores import Scores, ScoresSummary
from mm_core.data.side_table import SMALL_CHUNK_ROWS
from mm_core.errors import ConfigError, DataError
from pipelines.causes import own_errors
from pipelines.curate.batches import ALL
from pipelines.curate.folds import Fold, Folds
from pipelines.encode import Batch, Model, image_features, index_reader, text_features
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
        settings=opened.settings | {"version": 2},
        among=str(among),
        columns=Similarities._fields,
        vectors=dict.fromkeys(("image", "text"), opened.models[0].embed_dim) if what == EMBEDDINGS else {},
        chunk_rows=SMALL_CHUNK_ROWS,
    )
    scores = Scores(index, name or what)
    found = scores.begin(summary)
    if not found.complete:
        with ray_session():
            measures = [Fit(references, with_vectors=what == EMBEDDINGS) for references in _references(opened)]
            fill(index, scores.values, opened.models, opened.models_of, measures, actors=actors, on_progress=on_progress)
            found = found.model_copy(update={"unreadable": count_problems(scores.values), "complete": True})
        scores.save(found)
    return found


@dataclass(frozen=True)
class Fit:
    """Measure: how well each image and its captions fit; with vectors also each image's features, and the mean of its captions'."""

    references: References
    with_vectors: bool

    def __call__(self, bundle: Bundle, batch: Batch) -> dict[str, NDArray[Any]]:
        image = image_features(bundle, batch.images)
        texts = text_features(bundle, [text for each in batch.captions for text in each])
        owners = np.repeat(np.arange(len(image)), [len(each) for each in batch.captions])
        found = similarities(image, texts, owners, self.references.beside(batch.ordinals, bundle.logit_scale))._asdict()
        if self.with_vectors:
            found |= {"image": image.astype("<f2"), "text": mean_texts(texts, owners, len(image)).astype("<f2")}
        return found


def _references(folds: Folds) -> list[References]:
    """By model, each made by a task of its own."""
    gpus = int(ray.cluster_resources().get("GPU", 0))
    task = ray.remote(num_gpus=1 if gpus else 0)(references_of)
    asked = zip(folds.models, folds.references, strict=True)
    with own_errors():
        return list(ray.get([task.remote(folds.index.url, model, ordinals, gpus > 0) for model, ordinals in asked]))


def references_of(url: str, model: Model, ordinals: U64, cuda: bool) -> References:
    """
    Raises:
        DataError: not one of the samples can be read.
    """
    torch.set_num_threads(1)  # features do not depend on how many there are
    found = decode_samples(index_reader(url), ordinals, model.image_size)
    if not len(found.images):
        raise DataError(f"not one of {len(ordinals):,} samples that were drawn from {url} can be read: {Counter(found.reasons)}")
    bundle = load_bundle(model.source, device="cuda" if cuda else "cpu")
    captions = [captions[0] for captions, good in zip(found.captions, found.good, strict=True) if good]
    return References(ordinals[found.good], image_features(bundle, found.images), text_features(bundle, captions))
