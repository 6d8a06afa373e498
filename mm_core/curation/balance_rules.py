"""Rules that even out what captions are about. Both count over all samples that the rules before them keep, before they judge any."""

from __future__ import annotations

from abc import abstractmethod
from functools import lru_cache
from typing import Literal, Self

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from pydantic import Field, PrivateAttr, model_validator

from mm_core.config import nearest
from mm_core.curation.captions import UNICODE
from mm_core.curation.groups import Groups, groups_of
from mm_core.curation.rows import Rows
from mm_core.curation.rule import CountingRule, Judgement
from mm_core.curation.terms import Terms
from mm_core.curation.text_file import TextFile, TextFileField
from mm_core.data.permutation import mix
from mm_core.errors import ConfigError, DataError

_BALANCE = 7
"""Keeps the draws apart from those of a plan, of its readers and of a split."""


class ConceptRule(CountingRule):
    """A rule that counts what captions are about: once before it judges, and again among those that are kept in the end."""

    modality = "text"
    columns = ("captions",)
    _counts: NDArray[np.int64] | None = PrivateAttr(default=None)

    @property
    def tables(self) -> str:
        return UNICODE

    @property
    def passes(self) -> int:
        return 1 if self._counts is None else 0

    def learn(self, counts: NDArray[np.int64]) -> Self:
        learned = self.model_copy()
        learned._counts = counts
        return learned

    @property
    def counts(self) -> NDArray[np.int64]:
        """By concept, the samples before it judges."""
        assert self._counts is not None, "counts come before judgements"
        return self._counts

    @property
    @abstractmethod
    def concepts(self) -> list[str]:
        """What is counted."""

    @property
    def concept_weights(self) -> Float[np.ndarray, " concepts"] | None:
        """Of a rule that gives some: the weight that a concept's samples have; NaN where it gives them none of its own."""
        return None


class Balance(ConceptRule):
    """Keeps about `per_entry` samples of every entry of a list, as MetaCLIP does (Xu et al. 2023, algorithm 1).

    An entry of n samples accepts each with probability min(1, per_entry / n); a sample is kept if one of its entries accepts it. The value
    is the probability that it is kept. Entries are whole words, whatever their case; a sample has those that any of its captions has.
    """

    rule: Literal["balance"] = "balance"
    entries: TextFileField = Field(description="A text file, an entry a line: names of things, as WordNet's or the titles of Wikipedia.")
    per_entry: int = Field(gt=0, description="MetaCLIP's t: 20,000 of 1.6 billion pairs there.")
    unmatched: Literal["drop", "keep"] = Field(default="drop", description="Samples that have no entry.")
    seed: int = Field(default=0, ge=0, description="Of the draws, which depend on the sample and the entry beside it, and on nothing else.")

    _accepts: NDArray[np.float64] = PrivateAttr(default_factory=lambda: np.zeros(0))
    """By entry, the probability that it accepts a sample."""

    @model_validator(mode="after")
    def _has_entries(self) -> Balance:
        if not len(_terms(self.entries)):
            raise ValueError("the file of entries has none: it should have one a line")
        return self

    @property
    def concepts(self) -> list[str]:
        return _terms(self.entries).texts

    def count(self, rows: Rows, chosen: Bool[np.ndarray, " rows"]) -> NDArray[np.int64]:
        terms = _terms(self.entries)
        found = rows.find(terms)
        return np.bincount(found.terms[chosen[found.owners]], minlength=len(terms))

    def learn(self, counts: NDArray[np.int64]) -> Self:
        learned = super().learn(counts)
        learned._accepts = np.minimum(1.0, self.per_entry / np.maximum(1, counts))
        return learned

    def judge(self, rows: Rows) -> Judgement:
        terms = _terms(self.entries)
        found = rows.find(terms)
        accepts = self._accepts.take(found.terms)
        keep, kept = np.zeros(len(rows), dtype=bool), np.zeros(len(rows))
        keep[found.owners.compress(accepts == 1)] = True
        unsure = np.flatnonzero(~keep.take(found.owners))  # what one entry accepts for sure no draw of another drops: most rows need none
        row = found.owners.take(unsure)
        draws = mix(self.seed, _BALANCE, rows.checks.take(row), terms.keys.take(found.terms.take(unsure)))
        keep[row.compress(draws < (accepts.take(unsure) * 2.0**64).astype(np.uint64))] = True
        first = np.flatnonzero(np.diff(found.owners, prepend=-1))
        owners = found.owners.take(first)
        if len(owners):
            kept[owners] = 1 - np.multiply.reduceat(1 - accepts, first)
        if self.unmatched == "keep":
            unmatched = np.ones(len(rows), dtype=bool)
            unmatched[owners] = False
            keep |= unmatched
            kept[unmatched] = 1
        return Judgement(keep, kept)


class Reweight(ConceptRule):
    """Weighs samples so that an epoch has groups of a category in given shares; it drops none. The value is the weight.

    The weight is the target's share divided by the share found, of samples in exactly one group of the category, one that the target names;
    that keeps their total, and so the length of an epoch. All others weigh 1. Where `max_weight` cuts a weight, the target is missed by
    as much, which `mm data filter` shows.
    """

    rule: Literal["reweight"] = "reweight"
    terms: TextFileField = Field(description="A YAML file of groups, as for mm data groups.")
    category: str = Field(description="Of that file.")
    target: dict[str, float] = Field(min_length=2, description="Shares of its groups, which add to 1; `none` is those in no group.")
    max_weight: float = Field(default=4, ge=1, description="No sample is drawn more often in an epoch.")

    @model_validator(mode="after")
    def _fits(self) -> Reweight:
        try:
            given = groups_of(self.terms).given
        except ConfigError as error:
            raise ValueError(str(error)) from None
        if self.category not in given.groups:
            raise ValueError(f"the terms have no category {self.category!r}{nearest(self.category, list(given.groups))}")
        for group, share in self.target.items():
            if group not in given.names(self.category):
                raise ValueError(f"{self.category} has no group {group!r}{nearest(group, given.names(self.category))}")
            if share <= 0:
                raise ValueError(f"the share of {group!r} is {share:g}: shares are above 0")
        if abs(sum(self.target.values()) - 1) > 1e-6:
            raise ValueError(f"the shares of the target add to {sum(self.target.values()):g}, not to 1")
        return self

    @property
    def _groups(self) -> Groups:
        return groups_of(self.terms)

    @property
    def concepts(self) -> list[str]:
        return self._groups.given.names(self.category)

    @property
    def _targets(self) -> Float[np.ndarray, " groups"]:
        """0 of a group that the target does not name."""
        return np.array([self.target.get(group, 0.0) for group in self.concepts])

    @property
    def concept_weights(self) -> Float[np.ndarray, " groups"]:
        targets = self._targets
        named = targets > 0
        found = self.counts / max(1, int(self.counts[named].sum()))
        weights = np.full(len(targets), np.nan)
        weights[named] = np.minimum(self.max_weight, targets[named] / found[named])
        return weights

    def count(self, rows: Rows, chosen: Bool[np.ndarray, " rows"]) -> NDArray[np.int64]:
        group = self._only_group(rows)
        return np.bincount(group[chosen & (group >= 0)], minlength=len(self.concepts))

    def learn(self, counts: NDArray[np.int64]) -> Self:
        for group, target, found in zip(self.concepts, self._targets, counts, strict=True):
            if target and not found:
                raise DataError(
                    f"no sample that gets this far is in {group!r} and in no other group of {self.category}: it cannot be weighed"
                )
        return super().learn(counts)

    def judge(self, rows: Rows) -> Judgement:
        group = self._only_group(rows)
        weights = np.where(group >= 0, np.nan_to_num(self.concept_weights, nan=1.0)[group], 1.0)
        labels = pa.array([*self.concepts, "several"]).take(pa.array(np.where(group >= 0, group, len(self.concepts))))
        return Judgement(np.ones(len(rows), dtype=bool), weights, labels, weights)

    def _only_group(self, rows: Rows) -> Int[np.ndarray, " rows"]:
        """-1 of a sample in several."""
        members = self._groups.members(rows, self.category)
        return np.where(members.sum(axis=0, dtype=np.int16) == 1, members.argmax(axis=0), -1)


@lru_cache(maxsize=4)
def _terms(entries: TextFile) -> Terms:
    return Terms([line.strip() for line in entries.text.splitlines()])
