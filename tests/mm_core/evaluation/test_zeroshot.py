"""Zero-shot metrics against the definition, prompts averaged as the CLIP paper does, folders in CLIP_benchmark's layout."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mm_core.errors import DataError
from mm_core.evaluation.zeroshot import DEFAULT_TEMPLATES, class_embeddings, read_classnames, read_templates, zeroshot_metrics


def brute_force(images: np.ndarray, labels: np.ndarray, classes: np.ndarray) -> dict[str, float]:
    """Rank the classes of each image, the right one last among equals."""
    orders = [
        sorted(range(len(classes)), key=lambda c, label=label, row=image @ classes.T: (-row[c], c == label))
        for image, label in zip(images, labels, strict=True)
    ]
    top1 = [order[0] == label for order, label in zip(orders, labels, strict=True)]
    top5 = [label in order[:5] for order, label in zip(orders, labels, strict=True)]
    by_class = [np.mean([hit for hit, own in zip(top1, labels, strict=True) if own == label]) for label in set(labels.tolist())]
    return {"top1": float(np.mean(top1)), "top5": float(np.mean(top5)), "mean_per_class": float(np.mean(by_class))}


@given(images=st.integers(1, 30), classes=st.integers(1, 12), seed=st.integers(0, 10**6))
@settings(deadline=None, max_examples=80)
def test_accuracy_is_as_defined(images: int, classes: int, seed: int) -> None:
    """Few whole numbers make many exact ties; with five classes or fewer top-5 is 1."""
    draw = np.random.default_rng(seed)
    features = draw.integers(-1, 2, (images, 3)).astype(np.float32)
    embeddings = draw.integers(-1, 2, (classes, 3)).astype(np.float32)
    labels = draw.integers(0, classes, images)
    found = zeroshot_metrics(features, labels, embeddings)
    assert found == pytest.approx(brute_force(features, labels, embeddings))
    assert classes > 5 or found["top5"] == 1


def test_classes_weigh_the_same_in_the_mean_per_class() -> None:
    features = np.eye(2, dtype=np.float32)[[0, 0, 0, 0]]
    found = zeroshot_metrics(features, np.asarray([0, 0, 0, 1]), np.eye(2, dtype=np.float32))
    assert (found["top1"], found["mean_per_class"]) == (0.75, 0.5)


@pytest.mark.parametrize("value", [0.5, float("nan")], ids=["constant", "nan"])
def test_a_model_that_says_nothing_is_never_right(value: float) -> None:
    found = zeroshot_metrics(np.full((9, 4), value, np.float32), np.arange(9), np.ones((9, 4), np.float32))
    assert found == {"top1": 0.0, "top5": 0.0, "mean_per_class": 0.0}


def test_prompts_are_averaged_and_normalised_again() -> None:
    class Texts:
        """Unit vectors by the first letter."""

        def text_features(self, texts: Sequence[str]) -> Any:
            return np.asarray([[1.0, 0.0] if text.startswith("a") else [0.0, 1.0] for text in texts], dtype=np.float32)

    embeddings = class_embeddings(Texts(), ["cat", "dog"], ["a {c}", "the {c}", "one {c}"])
    np.testing.assert_allclose(embeddings, np.asarray([[1, 2], [1, 2]]) / np.sqrt(5), rtol=1e-6)


def test_a_folder_in_clip_benchmarks_layout(tmp_path: Path) -> None:
    (tmp_path / "classnames.txt").write_text("red circle\nblue square\n\n")
    assert read_classnames(tmp_path) == ["red circle", "blue square"]
    assert read_templates(tmp_path) == list(DEFAULT_TEMPLATES)
    templates = tmp_path / "zeroshot_classification_templates.txt"
    templates.write_text("a {c}.\nthe {c}.\n")
    assert read_templates(tmp_path) == ["a {c}.", "the {c}."]
    templates.write_text("a photo\n")
    with pytest.raises(DataError, match=r"'a photo' has no \{c\} where the class goes"):
        read_templates(tmp_path)


def test_a_folder_without_class_names_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"classnames\.txt is not there"):
        read_classnames(tmp_path)
    (tmp_path / "classnames.txt").write_text("\n")
    with pytest.raises(DataError, match="is empty"):
        read_classnames(tmp_path)
    (tmp_path / "classnames.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="no text"):
        read_classnames(tmp_path)
