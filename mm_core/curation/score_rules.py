"""Rules about scores that `mm data score` wrote beside the index: what needs a picture's bytes, or a model.

`top`, which keeps a share of all, counts all scores first; its bound is exact (`quantile`).
"""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar, Literal, Self

import numpy as np
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from pydantic import Field, PrivateAttr, model_validator

from mm_core.curation.picture import PictureScores
from mm_core.curation.quantile import count, locate, value_at
from mm_core.curation.rows import Rows
from mm_core.curation.rule import CountingRule, SampleRule, ScoreColumn
from mm_core.curation.similarity import Similarities
from mm_core.errors import DataError

IMAGE, HASH, SIMILARITY, EMBEDDINGS, HEAD = "image", "hash", "similarity", "embeddings", "head"
"""What `mm data score` measures, and the names its scores have unless they are given others."""
_KINDS = dict.fromkeys(PictureScores._fields, IMAGE) | {"contrast": HASH} | dict.fromkeys(Similarities._fields, SIMILARITY)
"""What measures which column; all others are a head's."""
_NEEDS = {SIMILARITY: " --model MODEL", EMBEDDINGS: " --model MODEL", HEAD: " --weights FILE --sha256 DIGEST"}


def made_by(scores: str, column: str) -> str:
    """The arguments of `mm data score INDEX` that measure a column of the scores of some name."""
    kind = scores if scores in (HASH, EMBEDDINGS) and column not in PictureScores._fields else _KINDS.get(column, HEAD)
    if kind in (IMAGE, HASH):
        return kind if scores == kind else f"{kind} (these have no other name: say `scores: {kind}`)"
    return embedded_by(scores) if kind == EMBEDDINGS else kind + _NEEDS[kind] + ("" if scores == kind else f" --name {scores}")


def embedded_by(scores: str) -> str:
    """The arguments of `mm data score INDEX` that make embeddings of some name."""
    return EMBEDDINGS + _NEEDS[EMBEDDINGS] + ("" if scores == EMBEDDINGS else f" --name {scores}")


class ScoreRule(SampleRule, CountingRule):
    """One column of some scores. A sample that could not be scored is within no bounds."""

    of_all = True
    top: float | None = Field(
        default=None, gt=0, le=1, description="Instead of bounds: keep this share, those with the highest values, of all that have one."
    )

    _cell: int | None = PrivateAttr(default=None)
    """Where the first pass found the bound to be."""
    _rest: int = PrivateAttr(default=0)
    """Which of the values there it is, from above."""

    @property
    @abstractmethod
    def reads(self) -> ScoreColumn: ...

    @model_validator(mode="after")
    def _one_kind_of_bound(self) -> ScoreRule:
        if self.top is not None and (self.min is not None or self.max is not None):
            raise ValueError("give either top, or min and max")
        return self

    def measure(self, rows: Rows) -> Float[np.ndarray, " rows"]:
        scores, column = self.reads
        return np.asarray(rows.scores[scores][column].to_numpy(), dtype=np.float64)

    @property
    def passes(self) -> int:
        if self.top is None or self.min is not None:
            return 0
        return 2 if self._cell is None else 1

    def count(self, rows: Rows, chosen: Bool[np.ndarray, " rows"]) -> NDArray[np.int64]:
        return count(self.measure(rows)[chosen].astype(np.float32), self._cell)

    def learn(self, counts: NDArray[np.int64]) -> Self:
        if self._cell is not None:
            place, _ = locate(counts, self._rest)
            return self.model_copy(update={"min": value_at(self._cell, place)})
        if not counts.sum():
            raise DataError(f"not one sample has a score {self.reads.scores!r}")
        learned = self.model_copy()
        learned._cell, learned._rest = locate(counts, max(1, round((self.top or 1) * int(counts.sum()))))
        return learned


class PictureRule(ScoreRule):
    """What `measure_picture` measures."""

    modality = "image"
    column: ClassVar[str]

    @property
    def reads(self) -> ScoreColumn:
        return ScoreColumn(IMAGE, self.column)


class Sharpness(PictureRule):
    """How sharp the picture is: the variance of the Laplacian of its luma, the shorter side 256 pixels at most. Below 100 looks blurred."""

    rule: Literal["sharpness"] = "sharpness"
    column = "sharpness"


class Information(PictureRule):
    """Entropy of the picture's luma, bits: 0 of one plain colour, up to 8. Little is a plain surface, a logo, a placeholder."""

    rule: Literal["information"] = "information"
    column = "information"


class Similarity(ScoreRule):
    """How well picture and captions fit by a model: the cosine of their features, -1 to 1. What is low depends on the model: use `top`."""

    rule: Literal["similarity"] = "similarity"
    modality = "text"
    scores: str = Field(default=SIMILARITY, description="The name that the scores were given.")
    of: Literal["mean", "lowest"] = Field(default="mean", description="Of a sample's captions the mean, or the one that fits worst.")

    @property
    def reads(self) -> ScoreColumn:
        return ScoreColumn(self.scores, "similarity" if self.of == "mean" else "similarity_lowest")


class Score(ScoreRule):
    """Any column of any scores, as those of a classifier head on embeddings: watermarks, aesthetics."""

    rule: Literal["score"] = "score"
    scores: str = Field(description="The name that the scores were given.")
    column: str = Field(default="score", description="The column: `score`, or of a head with several outputs `score_0` and so on.")

    @property
    def reads(self) -> ScoreColumn:
        return ScoreColumn(self.scores, self.column)
