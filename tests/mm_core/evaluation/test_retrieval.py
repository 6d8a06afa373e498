"""Recall at k against the definition, one query at a time, ties and several captions included."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mm_core.errors import DataError
from mm_core.evaluation import retrieval
from mm_core.evaluation.retrieval import RECALL_AT, retrieval_metrics


def brute_force(images: np.ndarray, texts: np.ndarray, image_of_text: np.ndarray) -> dict[str, float]:
    """Sort the targets of each query, the wrong ones first among equals, and look for a right one among the first k."""

    def recall(right_of: list[set[int]], scores: np.ndarray, k: int) -> float:
        hits = []
        for right, row in zip(right_of, scores, strict=True):
            if right:
                order = sorted(range(len(row)), key=lambda target: (-row[target], target in right))
                hits.append(bool(right & set(order[:k])))
        return sum(hits) / len(hits)

    images_of_texts = [{int(image)} for image in image_of_text]
    texts_of_images = [set(np.flatnonzero(image_of_text == image).tolist()) for image in range(len(images))]
    return {f"t2i_r{k}": recall(images_of_texts, texts @ images.T, k) for k in RECALL_AT} | {
        f"i2t_r{k}": recall(texts_of_images, images @ texts.T, k) for k in RECALL_AT
    }


@given(data=st.data(), images=st.integers(1, 14), texts=st.integers(1, 30), seed=st.integers(0, 10**6), block=st.integers(1, 60))
@settings(deadline=None, max_examples=80)
def test_recall_is_as_defined(data: st.DataObject, images: int, texts: int, seed: int, block: int) -> None:
    """Few whole numbers make many exact ties; `block` cuts the scores anywhere."""
    draw = np.random.default_rng(seed)
    image_features = draw.integers(-1, 2, (images, 3)).astype(np.float32)
    text_features = draw.integers(-1, 2, (texts, 3)).astype(np.float32)
    image_of_text = draw.integers(0, images, texts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(retrieval, "_BLOCK_SCORES", block)
        found = retrieval_metrics(image_features, text_features, image_of_text)
    assert found == pytest.approx(brute_force(image_features, text_features, image_of_text))


def test_any_of_the_captions_counts() -> None:
    images = np.eye(2, dtype=np.float32)
    texts = np.asarray([[0, 1], [1, 0], [0, 1]], dtype=np.float32)
    found = retrieval_metrics(images, texts, np.asarray([0, 0, 1]))
    assert found["i2t_r1"] == pytest.approx(0.5)  # the second image's only text ties with a wrong one
    assert found["t2i_r1"] == pytest.approx(2 / 3)


@pytest.mark.parametrize("value", [0.5, float("nan")], ids=["constant", "nan"])
def test_a_model_that_says_nothing_finds_nothing(value: float) -> None:
    features = np.full((30, 4), value, dtype=np.float32)
    assert set(retrieval_metrics(features, features, np.arange(30)).values()) == {0.0}


def test_no_captions_is_an_error() -> None:
    with pytest.raises(DataError, match="there are none: give shards with"):
        retrieval_metrics(np.eye(2, dtype=np.float32), np.zeros((0, 2), dtype=np.float32), np.zeros(0, dtype=np.int64))
