"""Cross-entropy of the classes of labelled samples, over the global batch: what a pretrained model is fine-tuned by."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from torch.nn import functional

from mm_core.config import Config
from mm_core.models.fused_batch import ClassOutput, LabelledBatch, Sides
from mm_core.objectives.output import LossOutput


class ClassifyConfig(Config):
    """How many classes, and what of a sample is shown."""

    kind: Literal["classify"] = "classify"
    num_classes: int = Field(default=2, ge=2, description="A sample's `.cls` is a number below it.")
    sides: Sides = Field(default=Sides.BOTH, description="What of a sample is shown: image, text or both.")
    label_smoothing: float = Field(default=0.0, ge=0, lt=1, description="Share of the target that all classes divide among them.")


class ClassifyObjective:
    """The mean over the global batch, and its accuracy."""

    def __init__(self, config: ClassifyConfig) -> None:
        self._label_smoothing = config.label_smoothing

    def __call__(self, output: ClassOutput, batch: LabelledBatch, counts: Sequence[int]) -> LossOutput:
        logits = output.logits.to(torch.promote_types(output.logits.dtype, torch.float32))
        loss = functional.cross_entropy(logits, batch.labels, reduction="sum", label_smoothing=self._label_smoothing)
        hits = (logits.detach().argmax(dim=1) == batch.labels).sum()
        return LossOutput.of({"classify": loss / sum(counts)}, len(counts), {"accuracy/classify": hits / sum(counts)})
