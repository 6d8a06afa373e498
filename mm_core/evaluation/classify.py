"""How well a fine-tuned model classifies held-out samples, by both sides and by each alone, beside the commonest class."""

from __future__ import annotations

import numpy as np

from mm_core.bundle import Bundle
from mm_core.data.decoded import decode_samples
from mm_core.data.permutation import U64
from mm_core.data.problems import Reason, SampleProblem
from mm_core.data.reader import IndexReader
from mm_core.data.sample import Sample
from mm_core.evaluation.encoded import check_skipped
from mm_core.models.fused_batch import Sides

_AT_ONCE = 128
_Shown = tuple[np.ndarray | None, list[str], np.ndarray, list[str]]
"""Pictures, texts and classes of the samples that can be used, and why the others cannot."""


def sides_of(bundle: Bundle, need: tuple[str, ...]) -> list[Sides]:
    """Those that the model is trained on, of samples that have `need`.

    Raises:
        BundleError: the model was not fine-tuned to classify.
    """
    known = bundle.class_head.sides.modalities & {*need}
    return [sides for sides in Sides if sides.modalities <= known]


def class_metrics(bundle: Bundle, reader: IndexReader, ordinals: U64) -> dict[str, dict[str, float]]:
    """By what is shown, of `sides_of`, the accuracy and that of the commonest class; what is not shown is missing, as in `classify`.

    Raises:
        DataError: more than a tenth of the samples cannot be decoded.
    """
    hits = dict.fromkeys(sides_of(bundle, reader.index.summary.need), 0)
    labels: list[np.ndarray] = []
    reasons: list[str] = []
    for start in range(0, len(ordinals), _AT_ONCE):
        here = ordinals[start : start + _AT_ONCE]
        pictured = any("image" in sides.modalities for sides in hits)
        images, texts, known, lost = _pictured(reader, here, bundle.image_size) if pictured else _texts(reader, here)
        reasons += lost
        if not len(known):
            continue
        labels.append(known)
        for sides in hits:
            probabilities = bundle.classify(images if "image" in sides.modalities else None, texts if "text" in sides.modalities else None)
            hits[sides] += int((probabilities.argmax(axis=1) == labels[-1]).sum())
    truth = np.concatenate(labels) if labels else np.zeros(0, dtype=np.int64)
    check_skipped(reasons, len(truth), reader.index.url)
    constant = float(np.bincount(truth).max() / len(truth))
    return {sides.value: {"accuracy": right / len(truth), "constant_accuracy": constant} for sides, right in hits.items()}


def _pictured(reader: IndexReader, ordinals: U64, size: int) -> _Shown:
    decoded = decode_samples(reader, ordinals, size)
    texts = [captions[0] for captions, good in zip(decoded.captions, decoded.good, strict=True) if good and captions]
    return decoded.images, texts, decoded.labels[decoded.good], [reason for reason in decoded.reasons if reason is not None]


def _texts(reader: IndexReader, ordinals: U64) -> _Shown:
    """Where no picture is shown none is needed."""
    good, lost = list[Sample](), list[str]()
    for sample in reader.read(ordinals):
        if isinstance(sample, Sample) and sample.captions:
            good.append(sample)
        else:
            lost.append((sample.reason if isinstance(sample, SampleProblem) else Reason.NO_TEXT).value)
    return None, [sample.captions[0] for sample in good], np.array([sample.label for sample in good], dtype=np.int64), lost
