"""What a linear layer reads off frozen features (linear probe: Alain and Bengio 2016, arXiv 1610.01644), of one modality or both."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, UInt8

from mm_core.bundle import Bundle
from mm_core.models.fused_batch import Sides

_AT_ONCE = 128


def linear_probe(
    features: Float[np.ndarray, "n d"], labels: Sequence[str], held: Float[np.ndarray, "m d"], held_labels: Sequence[str]
) -> dict[str, float]:
    """Accuracy of a logistic regression that `features` and `labels` train, on the others; and that of the commonest label."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler().fit(features)
    probe = LogisticRegression(max_iter=2000).fit(scaler.transform(features), np.asarray(labels))
    names, counts = np.unique(np.asarray(labels), return_counts=True)
    commonest = names[counts.argmax()]
    truth = np.asarray(held_labels)
    return {
        "accuracy": float((probe.predict(scaler.transform(held)) == truth).mean()),
        "constant_accuracy": float((truth == commonest).mean()),
    }


def fused_features(bundle: Bundle, images: UInt8[np.ndarray, "n h w 3"], texts: Sequence[str], sides: Sides) -> Float[np.ndarray, "n d"]:
    """The fusion's class token of each pair, or of one side of it.

    Raises:
        BundleError: the model has no fusion.
    """
    parts = []
    for start in range(0, len(texts), _AT_ONCE):
        shown = slice(start, start + _AT_ONCE)
        image, text = images[shown] if sides is not Sides.TEXT else None, texts[shown] if sides is not Sides.IMAGE else None
        parts.append(bundle.multimodal_features(image, text))
    return np.concatenate(parts)
