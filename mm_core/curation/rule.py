"""A rule: a value for every sample, and the bounds it must lie in.

A rule says which columns it reads, measures, and keeps what lies within its bounds. Its parameters are typed fields with a
description, so that a file of rules can be checked, listed and given a schema. Rules that judge text do so per caption: a sample whose
every caption is within bounds is kept, as training may draw any of them; its value is that of the first caption out of bounds, else of
its first.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Self

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Float, Int64
from numpy.typing import NDArray
from pydantic import Field, model_validator

from mm_core.config import Config
from mm_core.curation.captions import UNICODE, Captions
from mm_core.curation.rows import Rows

Values = Float[np.ndarray, " n"]


class ScoreColumn(NamedTuple):
    """A column of the scores of some name."""

    scores: str
    column: str


@dataclass(frozen=True)
class Judgement:
    """What a rule makes of some rows."""

    keep: Bool[np.ndarray, " rows"]
    values: Float[np.ndarray, " rows"]
    """NaN where there is nothing to measure."""
    labels: pa.Array | None = None
    """For a rule that names what it found, as a language, the names."""
    weights: Float[np.ndarray, " rows"] | None = None
    """For a rule that says how often a kept sample is drawn: 1 is once an epoch."""


class Rule(Config):
    """Base of every rule."""

    version: ClassVar[int] = 1
    """Raised where the same parameters give other values than before: it is part of a rule set's hash."""
    modality: ClassVar[str | None] = None
    """`image` or `text`, where the rule makes sense only for indexes whose samples have it."""
    columns: ClassVar[tuple[str, ...]] = ()
    """Of the index, that it reads."""

    @property
    def tables(self) -> str:
        """What it looks up that other software brings, with its version, which is part of a rule set's hash: with another one a sample may
        be decided otherwise."""
        return ""

    @property
    def reads(self) -> ScoreColumn | None:
        """The scores it reads, beside the index's own columns."""
        return None

    @abstractmethod
    def judge(self, rows: Rows) -> Judgement: ...


class CountingRule(Rule):
    """A rule that decides by counts over the whole index. It is shown all rows, in as many passes as it needs, before it judges any.

    Counts of parts add up. So neither how the index is divided nor who counts what changes a decision.
    """

    of_all: ClassVar[bool] = False
    """Whether it counts every sample, or those that the rules before it keep."""

    @property
    @abstractmethod
    def passes(self) -> int:
        """Over the index, that it still needs before it can judge."""

    @abstractmethod
    def count(self, rows: Rows, chosen: Bool[np.ndarray, " rows"]) -> Int64[np.ndarray, " counts"]:
        """What the pass at hand counts of those chosen."""

    @abstractmethod
    def learn(self, counts: NDArray[np.int64]) -> Self:
        """This rule with the counts of one pass over the whole index.

        Raises:
            DataError: they leave nothing to decide by.
        """


class Bounded(Rule):
    """A rule that keeps values from `min` to `max`, both included. Without bounds it keeps everything and its values are written."""

    min: float | None = Field(default=None, allow_inf_nan=False, description="Keep what is at least this.")
    max: float | None = Field(default=None, allow_inf_nan=False, description="Keep what is at most this.")

    @model_validator(mode="after")
    def _in_order(self) -> Bounded:
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError(f"min {self.min:g} is above max {self.max:g}: nothing could be kept")
        return self

    def within(self, values: Values) -> Bool[np.ndarray, " n"]:
        """A value that is absent (NaN) is within no bounds, but where there are none it is kept."""
        keep = np.ones(len(values), dtype=bool)
        if self.min is not None:
            keep &= values >= self.min
        if self.max is not None:
            keep &= values <= self.max
        return keep


class SampleRule(Bounded):
    """One value per sample."""

    @abstractmethod
    def measure(self, rows: Rows) -> Float[np.ndarray, " rows"]: ...

    def judge(self, rows: Rows) -> Judgement:
        values = self.measure(rows)
        return Judgement(self.within(values), values)


class CaptionRule(Bounded):
    """One value per caption."""

    modality = "text"
    columns = ("captions",)

    @property
    def tables(self) -> str:
        return UNICODE

    @abstractmethod
    def measure(self, captions: Captions) -> Float[np.ndarray, " captions"]: ...

    def judge(self, rows: Rows) -> Judgement:
        values = np.asarray(self.measure(rows.captions), dtype=np.float64)
        return per_sample(rows.captions, values, self.within(values))


def per_sample(captions: Captions, values: Values, keep: Bool[np.ndarray, " n"], labels: pa.Array | None = None) -> Judgement:
    """From captions to samples: every caption must be kept, and the value is the deciding one's."""
    rows, first = np.unique(captions.owners, return_index=True)
    deciding = np.full(captions.rows, -1)
    deciding[rows] = first
    bad = np.flatnonzero(~keep)
    failing, at = np.unique(captions.owners[bad], return_index=True)
    deciding[failing] = bad[at]
    kept = np.ones(captions.rows, dtype=bool)
    kept[failing] = False
    there = deciding >= 0
    found = np.full(captions.rows, np.nan)
    found[there] = values[deciding[there]]
    return Judgement(kept, found, None if labels is None else labels.take(pa.array(deciding, mask=~there)))
