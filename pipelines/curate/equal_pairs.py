"""Pairs of samples that are the same byte for byte: by the index's digest of everything in them, or by that of the picture alone.

Tasks deal the digests out by their first bits; a task for each part finds the equal ones in it by sorting. Memory: 24 bytes a sample in the
object stores of all nodes together; of a task four million samples, more above a billion, where a part is a 256th of all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import ray
from numpy.typing import NDArray

from mm_core.curation.components import NO_PAIRS, Pairs
from mm_core.curation.score_rules import HASH
from mm_core.data.columns import vectors_of
from mm_core.data.scores import Scores
from mm_core.data.side_table import SideTable
from pipelines.causes import own_errors
from pipelines.curate.batches import opened
from pipelines.curate.comparison import Comparison, Found, Progress, Side, Slab, deal, gathered, slabs, split_up
from pipelines.tasks import run_tasks

_PART_SAMPLES = 1 << 22
_MOST_BITS = 8
_SLAB_ROWS = 1 << 20


def equal_pairs(comparison: Comparison, *, pictures: bool, on_progress: Progress = lambda what: None) -> Found:
    """`pictures`: of equal pictures, whatever text goes with them, as the scores `hash` have them."""
    bits = min(_MOST_BITS, max(0, sum(side.rows for side in comparison.sides) // _PART_SAMPLES).bit_length())
    each = [slab for side in comparison.sides for slab in slabs(side, _table(side, pictures), _SLAB_ROWS)]
    with own_errors():
        groups, _ = deal(_deal, [(comparison, slab, pictures, bits) for slab in each], 1 << bits)
        parts = []
        for _, pairs in run_tasks(partial(_find, comparison), groups):
            parts.append(pairs)
            on_progress("equal pictures" if pictures else "equal samples")
    return Found(np.concatenate([NO_PAIRS, *parts]), Counter())


def _table(side: Side, pictures: bool) -> SideTable:
    return Scores(opened(side.url), HASH).values if pictures else SideTable("", side.rows)


def _deal(comparison: Comparison, slab: Slab, pictures: bool, bits: int) -> tuple[Any, ...]:
    """For each part numbers and digests, [n, 2]; at last nothing."""
    numbers, digests = zip(*(_read(comparison, slab, chunk, pictures) for chunk in slab.chunks), strict=True)
    number, digest = np.concatenate(numbers), np.concatenate(digests)
    part = (digest[:, 0] >> np.uint64(64 - bits)).astype(np.int64) if bits else np.zeros(len(digest), np.int64)
    return (*split_up(part, 1 << bits, number, digest), None)


def _read(comparison: Comparison, slab: Slab, chunk: int, pictures: bool) -> tuple[NDArray[np.int64], NDArray[np.uint64]]:
    first, last = slab.table.bounds(chunk)
    good = comparison.looked_at(slab.side, first, last)
    if pictures:
        column = slab.table.read(chunk, ["picture"])["picture"]
        good &= column.is_valid().to_numpy()
        digests = vectors_of(column, np.uint64)
    else:
        digests = np.ascontiguousarray(opened(slab.side.url).digests[first:last]).view(np.uint64).reshape(-1, 2)
    places = np.flatnonzero(good)
    return slab.side.offset + first + places, digests[places]


def _find(comparison: Comparison, parts: Sequence[ray.ObjectRef]) -> Pairs:
    numbers, digests = gathered(parts)
    return same(numbers, digests, comparison)


def same(numbers: NDArray[np.int64], digests: NDArray[np.uint64], comparison: Comparison) -> Pairs:
    """Of each set of equal ones the lowest number with each other; against others, each of ours with the lowest of theirs."""
    order = np.lexsort((numbers, digests[:, 1], digests[:, 0]))
    numbers, digests = numbers[order], digests[order]
    ours = comparison.ours(numbers)
    heads = np.flatnonzero(np.r_[True, (digests[1:] != digests[:-1]).any(axis=1)][: len(numbers)])
    run = np.repeat(np.arange(len(heads)), np.diff(np.r_[heads, len(numbers)]))
    if not comparison.against:
        others = np.flatnonzero(numbers != numbers[heads][run])
        return np.stack([numbers[heads][run[others]], numbers[others]], axis=1)
    theirs = np.full(len(heads), np.iinfo(np.int64).max)
    np.minimum.at(theirs, run[~ours], numbers[~ours])
    matched = np.flatnonzero(ours & (theirs[run] < np.iinfo(np.int64).max))
    return np.stack([numbers[matched], theirs[run[matched]]], axis=1)
