"""Some rows of an index as columns, with what several rules measure of them worked out once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Float
from numpy.typing import NDArray

from mm_core.curation.captions import Captions
from mm_core.curation.terms import Found, Terms
from mm_core.data.sample import IMAGE_SUFFIXES


@dataclass(frozen=True)
class Rows:
    """Rows of an index, usable ones only, in its order."""

    table: pa.Table
    """Columns of the index that the rules name (`Rule.columns`)."""
    scores: Mapping[str, pa.Table]
    """By name, the columns of the scores the rules name; null where a sample could not be scored."""
    checks: NDArray[np.uint64] = field(default_factory=lambda: np.zeros(0, dtype=np.uint64))
    """Of the locators: what the random draws of a sample are made of, which stay when the same shards are indexed again."""

    def __len__(self) -> int:
        return self.table.num_rows

    def numbers(self, column: str) -> Float[np.ndarray, " rows"]:
        """NaN where null."""
        return np.asarray(pc.cast(self.table[column], pa.float64()).to_numpy(), dtype=np.float64)

    @cached_property
    def captions(self) -> Captions:
        return Captions(self.table["captions"].combine_chunks())

    def find(self, terms: Terms) -> Found:
        """Terms in the captions, looked for once, however many rules and counts ask."""
        if terms not in self._found:
            self._found[terms] = terms.find(self.captions)
        return self._found[terms]

    @cached_property
    def _found(self) -> dict[Terms, Found]:
        return {}

    @cached_property
    def image_bytes(self) -> Float[np.ndarray, " rows"]:
        """Size of the encoded picture; NaN where there is none."""
        lists = self.table["members"].combine_chunks()
        members, owners = pc.list_flatten(lists), pc.list_parent_indices(lists).to_numpy()
        pictures = np.flatnonzero(pc.is_in(pc.struct_field(members, "suffix"), pa.array(IMAGE_SUFFIXES)).to_numpy(zero_copy_only=False))
        rows, first = np.unique(owners[pictures], return_index=True)
        sizes = np.full(len(self), np.nan)
        sizes[rows] = pc.struct_field(members, "size").to_numpy()[pictures[first]]
        return sizes
