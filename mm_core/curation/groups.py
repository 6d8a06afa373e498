"""Groups of samples by the terms in their captions, as a file names them:

    groups:
      gender:     {women: [woman, women, girl, she, her], men: [man, men, boy, he, his]}
      occupation: {doctor: [doctor, physician], nurse: [nurse]}
    crosses: [[occupation, gender]]

Terms are whole words, whatever their case. A sample is in every group that one of its captions has a term of; in none of a category's
it is in that category's group `none`.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import product

import numpy as np
import yaml
from jaxtyping import Bool
from pydantic import Field, model_validator

from mm_core.config import Config, nearest, validate
from mm_core.curation.rows import Rows
from mm_core.curation.terms import Terms
from mm_core.curation.text_file import TextFile
from mm_core.errors import ConfigError

NONE = "none"
MAX_CELLS = 4096
"""Groups and crossings of one file: what is counted of each is held for a batch of rows at a time."""


class GroupTerms(Config):
    """The file."""

    groups: dict[str, dict[str, tuple[str, ...]]] = Field(min_length=1, description="By category and group, its terms.")
    crosses: tuple[tuple[str, ...], ...] = Field(default=(), description="Categories whose groups are counted together.")

    @classmethod
    def parse(cls, file: TextFile) -> GroupTerms:
        """
        Raises:
            ConfigError: not YAML, or no such file.
        """
        try:
            values = yaml.safe_load(file.text)
        except yaml.YAMLError as error:
            raise ConfigError(f"the file of terms is not valid YAML: {error}") from None
        if not isinstance(values, dict):
            raise ConfigError("the file of terms has a key `groups`, for example `groups: {gender: {women: [woman, she]}}`")
        return validate(cls, values)

    @model_validator(mode="after")
    def _consistent(self) -> GroupTerms:
        for category, groups in self.groups.items():
            for group, terms in groups.items():
                if group == NONE:
                    raise ValueError(f"{category} has a group {NONE!r}, which is the name of those in no group: call it otherwise")
                if not terms or (Terms(terms).of_texts < 0).any():
                    raise ValueError(f"group {group!r} of {category} has {'a term without a letter' if terms else 'no terms'}")
        for cross in self.crosses:
            for category in cross:
                if category not in self.groups:
                    raise ValueError(f"crosses name {category!r}, which is no category{nearest(category, list(self.groups))}")
            if len(set(cross)) != len(cross) or len(cross) < 2:
                raise ValueError(f"a crossing is of two categories or more, each once, not of {list(cross)}")
        if (cells := sum(map(len, self.cells.values()))) > MAX_CELLS:
            raise ValueError(f"{cells:,} groups and crossings, above {MAX_CELLS:,}: make several files")
        return self

    def names(self, category: str) -> list[str]:
        """Groups of a category, `none` the last."""
        return [*self.groups[category], NONE]

    @property
    def cells(self) -> dict[tuple[str, ...], list[tuple[str, ...]]]:
        """What is counted: by category alone, then by crossing, the groups and combinations of them, in order."""
        kinds = [*((category,) for category in self.groups), *self.crosses]
        return {kind: list(product(*map(self.names, kind))) for kind in kinds}


class Groups:
    """Groups that can be looked for."""

    def __init__(self, given: GroupTerms) -> None:
        self.given = given
        every = [(category, group, term) for category, groups in given.groups.items() for group, terms in groups.items() for term in terms]
        self._terms = Terms([term for _, _, term in every])
        self._has: dict[str, Bool[np.ndarray, "groups terms"]] = {
            category: np.zeros((len(groups), len(self._terms)), dtype=bool) for category, groups in given.groups.items()
        }
        for (category, group, _), term in zip(every, self._terms.of_texts, strict=True):
            self._has[category][list(given.groups[category]).index(group), term] = True

    def members(self, rows: Rows, category: str) -> Bool[np.ndarray, "groups rows"]:
        """Who is in which group of a category, `none` the last."""
        found, has = rows.find(self._terms), self._has[category]
        members = np.zeros((len(has) + 1, len(rows)), dtype=bool)
        for group, terms in enumerate(has):
            members[group, found.owners.compress(terms.take(found.terms))] = True
        members[-1] = ~members.any(axis=0)
        return members

    def cells(self, rows: Rows) -> Bool[np.ndarray, "cells rows"]:
        """Who is in which of `GroupTerms.cells`, one kind after the other."""
        of = {category: self.members(rows, category) for category in self.given.groups}
        columns = []
        for kind in self.given.cells:
            both = of[kind[0]]
            for category in kind[1:]:
                both = (both[:, None] & of[category]).reshape(-1, len(rows))
            columns.append(both)
        return np.concatenate(columns)


@lru_cache(maxsize=4)
def groups_of(file: TextFile) -> Groups:
    """
    Raises:
        ConfigError: as `GroupTerms.parse`.
    """
    return Groups(GroupTerms.parse(file))
