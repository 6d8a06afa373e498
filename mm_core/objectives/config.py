"""Which objective trains a two-tower model, and its settings."""

from __future__ import annotations

from enum import StrEnum

from pydantic import Field, model_validator

from mm_core.config import Config


class ObjectiveKind(StrEnum):
    CONTRASTIVE = "contrastive"
    """InfoNCE (CLIP); with label smoothing ALIGN's."""
    SIGMOID = "sigmoid"
    """SigLIP's; for models that have a logit bias."""
    TRIPLET = "triplet"
    """Semi-hard triplets (FaceNet)."""
    DISTILLATION = "distillation"
    """InfoNCE and a teacher's similarities."""


_SETTINGS = {
    "label_smoothing": (ObjectiveKind.CONTRASTIVE, ObjectiveKind.DISTILLATION),
    "margin": (ObjectiveKind.TRIPLET,),
    "teacher": (ObjectiveKind.DISTILLATION,),
    "teacher_weight": (ObjectiveKind.DISTILLATION,),
}
"""The objectives that read each of them."""


class ObjectiveConfig(Config):
    """One kind and what it reads; a setting that the kind does not read is refused."""

    kind: ObjectiveKind = ObjectiveKind.CONTRASTIVE
    label_smoothing: float = Field(default=0.0, ge=0, lt=1, description="Of contrastive: share of the target spread over all columns.")
    margin: float = Field(default=0.2, gt=0, description="Of triplet: by how much a negative shall be farther away, in squared distance.")
    teacher: str | None = Field(
        default=None, description="Of distillation: bundle folder or hub id with the same tokenizer and image size."
    )
    teacher_weight: float = Field(
        default=1.0, gt=0, description="Of distillation: weight of the teacher's term beside the contrastive one."
    )

    @model_validator(mode="after")
    def _fits_its_kind(self) -> ObjectiveConfig:
        for name, kinds in _SETTINGS.items():
            if self.kind not in kinds and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} is a setting of kind={' or kind='.join(kinds)}, not of kind={self.kind}")
        if self.kind is ObjectiveKind.DISTILLATION and self.teacher is None:
            raise ValueError("kind=distillation needs a teacher: a bundle's folder or a hub id")
        return self
