"""What is measured of a model while it trains, on all ranks or in one process: the figures of `mm eval`, the objective on held-out
samples and the geometry of the space. Everything is computed on rank 0, from the features of all ranks.

Memory: features of `max_samples` samples with their captions on rank 0; a hundred pictures on each.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from mm_core.data.index import Index
from mm_core.data.ledger import Source, compile_kept
from mm_core.data.permutation import U64
from mm_core.data.reader import IndexReader
from mm_core.data.text import CaptionTokenizer
from mm_core.evaluation.embedding import embedding_statistics
from mm_core.evaluation.encoded import Encoded, LockstepEncoder, Model, check_skipped
from mm_core.evaluation.heldout_loss import heldout_loss
from mm_core.evaluation.retrieval import retrieval_metrics
from mm_core.evaluation.zeroshot import mean_per_class, prompts, zeroshot_metrics
from mm_core.objectives.config import ObjectiveConfig
from mm_core.ranks import Ranks


@dataclass(frozen=True)
class ZeroShot:
    """Labelled pictures and the classes they are of."""

    source: Source
    classnames: tuple[str, ...]
    templates: tuple[str, ...]


@dataclass(frozen=True)
class EvaluationSpec:
    """Small enough to send to every rank."""

    retrieval: Source | None
    """Pairs: retrieval, held-out loss and embedding statistics."""
    zeroshot: ZeroShot | None
    max_samples: int
    """Of each; of more, samples at equal distances are taken, always the same."""
    tokenizer: CaptionTokenizer
    image_size: int
    objective: ObjectiveConfig
    batch_size: int
    """Samples whose loss is computed together."""


class Held:
    """The samples of a source that are measured, opened once."""

    def __init__(self, source: Source, max_samples: int) -> None:
        self._source, self._max_samples = source, max_samples

    @cached_property
    def reader(self) -> IndexReader:
        return IndexReader(Index.open(self._source.index))

    @cached_property
    def ordinals(self) -> U64:
        kept = compile_kept(self.reader.index, self._source.ledgers).ordinals
        chosen = np.linspace(0, len(kept) - 1, min(self._max_samples, len(kept))).round().astype(np.int64)
        return np.asarray(kept[chosen])


class Evaluator:
    """One per process, for all evaluations of a run."""

    def __init__(self, spec: EvaluationSpec, ranks: Ranks) -> None:
        self._spec, self._ranks = spec, ranks
        self._pairs = None if spec.retrieval is None else Held(spec.retrieval, spec.max_samples)
        self._labelled = None if spec.zeroshot is None else Held(spec.zeroshot.source, spec.max_samples)

    def __call__(self, model: Model) -> dict[str, float]:
        """`eval/…` metrics, the same on every rank. A collective.

        Raises:
            DataError: more than a tenth of the samples cannot be decoded.
            TrainingError: another rank failed.
        """
        spec, encoder = self._spec, LockstepEncoder(model, self._ranks, self._spec.tokenizer, self._spec.image_size)
        metrics: dict[str, float] = {}
        if self._pairs is not None:
            metrics |= self._of(encoder, self._pairs, self._of_pairs)
        if self._labelled is not None:
            assert spec.zeroshot is not None
            classes = self._classes(encoder, spec.zeroshot)
            metrics |= self._of(encoder, self._labelled, lambda found: _zeroshot(found, classes))
        return metrics

    def _of(self, encoder: LockstepEncoder, held: Held, measure: Callable[[Encoded], dict[str, float]]) -> dict[str, float]:
        """What `measure` says on rank 0 of the samples of all ranks, on every rank."""
        error: Exception | None = None
        try:
            reader, ordinals = held.reader, held.ordinals
        except Exception as raised:  # whatever it is, the other ranks must hear of it
            error = raised
        self._ranks.agree(error)
        encoded = encoder.samples(reader, ordinals)
        metrics: dict[str, float] = {}
        try:
            if encoded is not None:
                check_skipped(encoded.reasons, len(encoded.images), reader.index.url)
                metrics = measure(encoded)
        except Exception as raised:
            error = raised
        self._ranks.agree(error)
        shared: dict[str, float] = self._ranks.from_first(metrics)
        return shared

    def _of_pairs(self, found: Encoded) -> dict[str, float]:
        recalls = retrieval_metrics(found.images, found.texts, found.owners)
        recalls |= {"images": len(found.images), "texts": len(found.texts), "skipped": len(found.reasons)}
        loss = heldout_loss(
            self._spec.objective,
            found.images,
            found.first_texts,
            logit_scale=found.logit_scale,
            logit_bias=found.logit_bias,
            batch_size=self._spec.batch_size,
            device=self._ranks.device,
        )
        space = embedding_statistics(found.images, found.first_texts)
        named = {f"retrieval/{name}": value for name, value in recalls.items()} | {"loss": loss}
        return {
            f"eval/{name}": float(value) for name, value in (named | {f"embedding/{key}": value for key, value in space.items()}).items()
        }

    def _classes(self, encoder: LockstepEncoder, zeroshot: ZeroShot) -> np.ndarray:
        """[c, d] on rank 0, elsewhere of no use: each rank embeds its share of the classes."""
        mine = zeroshot.classnames[self._ranks.share(len(zeroshot.classnames))]
        features = encoder.texts([prompt for name in mine for prompt in prompts(name, zeroshot.templates)])
        means = mean_per_class(features.reshape(len(mine), len(zeroshot.templates), features.shape[1]))
        return np.concatenate(self._ranks.gather(means) or [means])


def _zeroshot(found: Encoded, classes: np.ndarray) -> dict[str, float]:
    metrics = zeroshot_metrics(found.images, found.labels, classes)
    metrics |= {"samples": len(found.labels), "classes": len(classes), "skipped": len(found.reasons)}
    return {f"eval/zeroshot/{name}": float(value) for name, value in metrics.items()}
