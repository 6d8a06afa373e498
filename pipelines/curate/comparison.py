"""Who is compared with whom when duplicates are looked for, whatever they are compared by.

Samples of all indexes have one numbering: those of the index that is deduplicated first, then those of the others. Pairs are of such
numbers, 16 bytes each.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import ray
from numpy.typing import NDArray

from mm_core.curation.components import NO_PAIRS, Pairs, forest, lowest_match
from mm_core.data.among import Among
from mm_core.data.side_table import SideTable
from pipelines.curate.batches import ALL, opened

_HELD_PAIRS = 1 << 20
Progress = Callable[[str], None]
"""Called with what is being done when a part of it is."""
Dealt = list[list[ray.ObjectRef]]
"""For each group the parts of it that tasks gave."""


@dataclass(frozen=True)
class Side:
    """An index, whose samples are numbered from `offset` on."""

    url: str
    offset: int
    rows: int
    among: Among = ALL
    """Those of its samples that are looked at."""


@dataclass(frozen=True)
class Comparison:
    """The samples of an index with those of others; or where there are no others, with each other."""

    index: Side
    against: tuple[Side, ...] = ()
    left_out: ray.ObjectRef | None = None
    """Numbers of samples of `index` that are not looked at either, ascending."""

    @property
    def sides(self) -> tuple[Side, ...]:
        return self.index, *self.against

    def ours(self, numbers: NDArray[np.int64]) -> NDArray[np.bool_]:
        return numbers < self.index.rows

    def looked_at(self, side: Side, first: int, last: int) -> NDArray[np.bool_]:
        """Which of the rows are compared, if they have what is compared."""
        good = side.among.rows(opened(side.url), first, last)
        if self.left_out is not None:
            numbers: NDArray[np.int64] = ray.get(self.left_out)
            low, high = np.searchsorted(numbers, [side.offset + first, side.offset + last])
            good[numbers[low:high] - side.offset - first] = False
        return good

    def fewer(self, pairs: Pairs) -> Pairs:
        """No more pairs than samples, that say the same."""
        return lowest_match(pairs) if self.against else forest(pairs)


@dataclass(frozen=True)
class Found:
    """Pairs of numbers, the lower first, and what was counted on the way."""

    pairs: Pairs
    counts: Counter[str]


class PairSink:
    """Collects pairs in bounded memory."""

    def __init__(self, comparison: Comparison) -> None:
        self._comparison = comparison
        self._parts: list[Pairs] = []
        self._held, self._bound = 0, _HELD_PAIRS

    def add(self, first: NDArray[np.int64], second: NDArray[np.int64]) -> None:
        self._parts.append(np.stack([np.minimum(first, second), np.maximum(first, second)], axis=1))
        self._held += len(first)
        if self._held > self._bound:
            self._parts = [self.pairs()]
            self._held = len(self._parts[0])
            self._bound = max(_HELD_PAIRS, 2 * self._held)

    def pairs(self) -> Pairs:
        return self._comparison.fewer(np.concatenate([NO_PAIRS, *self._parts]))


@dataclass(frozen=True)
class Slab:
    """Some chunks of a table beside one side's index: what one task reads and deals out."""

    side: Side
    table: SideTable
    chunks: range


def slabs(side: Side, table: SideTable, rows: int) -> list[Slab]:
    """Of about `rows` rows each."""
    first, last = table.bounds(0)
    each = max(1, rows // max(1, last - first))
    return [Slab(side, table, range(at, min(len(table), at + each))) for at in range(0, len(table), each)]


def deal(
    function: Callable[..., Sequence[Any]], tasks: Sequence[tuple[Any, ...]], groups: int, on_task: Callable[[], None] = lambda: None
) -> tuple[Dealt, list[Any]]:
    """Call `function` with each of `tasks`, whose results are one part for each group, which stays in the object stores (these go to disk
    when they are full), and a further small one.

    Returns:
        For each group references to the parts of all tasks, in their order; and the further results.
    """
    task = ray.remote(function).options(num_returns=groups + 1)
    results, further = [task.remote(*each) for each in tasks], []
    for result in results:  # all are waited for: a task that waited for their parts would have another worker started in its place
        further.append(ray.get(result[groups]))
        on_task()
    return [[result[group] for result in results] for group in range(groups)], further


def gathered(parts: Sequence[ray.ObjectRef]) -> tuple[NDArray[Any], ...]:
    """The arrays of a group's parts, one behind another."""
    return tuple(np.concatenate(each) for each in zip(*ray.get(list(parts)), strict=True))


def split_up(group: NDArray[np.integer[Any]], groups: int, *arrays: NDArray[Any]) -> list[tuple[NDArray[Any], ...]]:
    """For each group the rows of `arrays` that are in it, in their order."""
    order = np.argsort(group, kind="stable")
    ends = np.searchsorted(group[order], np.arange(groups + 1))
    return [tuple(array[order[low:high]] for array in arrays) for low, high in pairwise(ends)]
