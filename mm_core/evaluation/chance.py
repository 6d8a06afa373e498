"""What a model that guesses gets: no figure means anything without it."""

from __future__ import annotations

import math
from collections.abc import Mapping

from mm_core.evaluation.retrieval import RECALL_AT


def chance(metrics: Mapping[str, float]) -> dict[str, float]:
    """By the keys of zero-shot metrics with their `classes`, or of recalls with their `images` and `texts`."""
    if "top1" in metrics:
        classes = metrics["classes"]
        return {"top1": 1 / classes, "top5": min(1.0, 5 / classes), "mean_per_class": 1 / classes}
    images, texts = metrics["images"], metrics["texts"]
    wrong = texts - texts / images
    miss = {k: math.prod(max(0.0, wrong - i) / max(1.0, texts - i) for i in range(k)) for k in RECALL_AT}
    return {f"t2i_r{k}": min(1.0, k / images) for k in RECALL_AT} | {f"i2t_r{k}": 1 - m for k, m in miss.items()}
