"""Classes told of held-out samples, by both sides and by each alone, beside the commonest class."""

from __future__ import annotations

import numpy as np

from mm_core.bundle import Bundle
from mm_core.data.decoded import decode_samples
from mm_core.data.permutation import U64
from mm_core.data.reader import IndexReader
from mm_core.errors import DataError
from mm_core.evaluation.encoded import check_skipped
from mm_core.models.fused_batch import Sides

_AT_ONCE = 128


def class_metrics(bundle: Bundle, reader: IndexReader, ordinals: U64) -> dict[str, dict[str, float]]:
    """Accuracy and that of the commonest class, by what is shown; a side that is not shown is missing, as in `bundle.classify`.

    Raises:
        BundleError: the model tells no classes.
        DataError: a sample has no class, or one that the model does not know; more than a tenth of them cannot be decoded.
    """
    hits = dict.fromkeys(Sides, 0)
    labels: list[np.ndarray] = []
    reasons: list[str] = []
    for start in range(0, len(ordinals), _AT_ONCE):
        decoded = decode_samples(reader, ordinals[start : start + _AT_ONCE], bundle.image_size)
        truth, texts = decoded.labels[decoded.good], [c[0] for c, good in zip(decoded.captions, decoded.good, strict=True) if good]
        reasons += [reason for reason in decoded.reasons if reason is not None]
        if not len(truth):
            continue
        if truth.min() < 0 or truth.max() >= bundle.classes:
            raise DataError(
                f"{reader.index.url} has a sample without a class, or of class {truth.max()}: {bundle.name} tells {bundle.classes}"
            )
        labels.append(truth)
        for sides in Sides:
            images = decoded.images if "image" in sides.modalities else None
            told = bundle.classify(images, texts if "text" in sides.modalities else None)
            hits[sides] += int((told.argmax(axis=1) == truth).sum())
    whole = np.concatenate(labels) if labels else np.zeros(0, dtype=np.int64)
    check_skipped(reasons, len(whole), reader.index.url)
    constant = float(np.bincount(whole).max() / len(whole))
    return {sides.value: {"accuracy": hits[sides] / len(whole), "constant_accuracy": constant} for sides in Sides}
