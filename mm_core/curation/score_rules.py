"""Rules about scores that `mm data score` wrote beside the index: what needs a picture's bytes, or a model."""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np
from jaxtyping import Float
from pydantic import Field, model_validator

from mm_core.curation.rows import Rows
from mm_core.curation.rule import SampleRule


class ScoreRule(SampleRule):
    """One column of some scores. A sample that could not be scored is within no bounds."""

    scores_name: ClassVar[str]
    column: ClassVar[str]
    top: float | None = Field(
        default=None, gt=0, le=1, description="Instead of bounds: keep this share, those with the highest values, of all that have one."
    )

    @property
    def scores(self) -> str:
        return self.scores_name

    @model_validator(mode="after")
    def _one_kind_of_bound(self) -> ScoreRule:
        if self.top is not None and (self.min is not None or self.max is not None):
            raise ValueError("give either top, or min and max")
        return self

    def measure(self, rows: Rows) -> Float[np.ndarray, " rows"]:
        return np.asarray(rows.scores[self.scores][self.column].to_numpy(), dtype=np.float64)


class Sharpness(ScoreRule):
    """How sharp the picture is: the variance of the Laplacian of its luma, the shorter side 256 pixels at most. Below 100 looks blurred."""

    rule: Literal["sharpness"] = "sharpness"
    modality = "image"
    scores_name = "image"
    column = "sharpness"


class Information(ScoreRule):
    """Entropy of the picture's luma, bits: 0 of one plain colour, up to 8. Little is a plain surface, a logo, a placeholder."""

    rule: Literal["information"] = "information"
    modality = "image"
    scores_name = "image"
    column = "information"
