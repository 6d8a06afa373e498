"""Zero-shot classification (CLIP, section 3.1): an image's class is the one whose prompts, averaged, it is closest to."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Int

from mm_core.errors import DataError

DEFAULT_TEMPLATES = ("a photo of a {c}.",)


@runtime_checkable
class TextEncoder(Protocol):
    """What a bundle is to this module."""

    def text_features(self, texts: Sequence[str]) -> Float[np.ndarray, "b d"]:
        """L2-normalised."""


def read_classnames(folder: Path) -> list[str]:
    """`classnames.txt` of a folder in CLIP_benchmark's layout: one name a line, in the order of the labels.

    Raises:
        DataError: it is not there, no text, or empty.
    """
    path = folder / "classnames.txt"
    try:
        names = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError):
        raise DataError(
            f"{path} is not there, or no text: a zero-shot folder has classnames.txt, one name a line, beside its shards"
        ) from None
    if not names:
        raise DataError(f"{path} is empty: it must name the classes, one a line")
    return names


def read_templates(folder: Path) -> list[str]:
    """`zeroshot_classification_templates.txt`, prompts with `{c}` for the class; a default where there is none.

    Raises:
        DataError: a line without `{c}`.
    """
    path = folder / "zeroshot_classification_templates.txt"
    if not path.is_file():
        return list(DEFAULT_TEMPLATES)
    templates = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    for template in templates:
        if "{c}" not in template:
            raise DataError(f"{path}: {template!r} has no {{c}} where the class goes")
    return templates or list(DEFAULT_TEMPLATES)


def class_embeddings(encoder: TextEncoder, classnames: Sequence[str], templates: Sequence[str]) -> Float[np.ndarray, "c d"]:
    """Per class: the mean over templates of the prompts' features, normalised again."""
    features = [encoder.text_features(prompts(name, templates)) for name in classnames]
    return mean_per_class(np.stack(features))


def prompts(name: str, templates: Sequence[str]) -> list[str]:
    """A class in every template."""
    return [template.replace("{c}", name) for template in templates]


def mean_per_class(features: Float[np.ndarray, "c t d"]) -> Float[np.ndarray, "c d"]:
    """The mean over a class's prompts, normalised again."""
    means = features.mean(axis=1)
    return means / np.linalg.norm(means, axis=1, keepdims=True)


def zeroshot_metrics(
    image_features: Float[np.ndarray, "n d"], labels: Int[np.ndarray, " n"], classes: Float[np.ndarray, "c d"]
) -> dict[str, float]:
    """top1, top5 (1 where there are no more than five classes) and the mean of top1 over the classes that occur.

    A tie with another class counts against the right one, as does a score that is not a number.

    Args:
        labels: rows of `classes`.

    Raises:
        DataError: a label that is none.
    """
    if labels.max() >= len(classes):
        raise DataError(f"a sample has class {labels.max()}, and classnames.txt has {len(classes)} lines")
    scores = image_features @ classes.T
    own = scores[np.arange(len(labels)), labels][:, None]
    ahead = (~(scores < own)).sum(axis=1) - 1
    hits = ahead < 1
    per_class = [hits[labels == label].mean() for label in np.unique(labels)]
    return {"top1": float(hits.mean()), "top5": float((ahead < 5).mean()), "mean_per_class": float(np.mean(per_class))}
