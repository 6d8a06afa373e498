"""Pairs of samples that are the same byte for byte: by the index's digest of everything in them, or by that of the picture alone.

A task for each range of digests finds the equal ones by sorting. Memory: 24 bytes a sample in each node's object store; of a task, four
million samples.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import partial

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
from pipelines.curate.comparison import Comparison, Found, Progress, Side, gathered, load
from pipelines.tasks import run_tasks

_PART_SAMPLES = 1 << 22


@dataclass(frozen=True)
class _Job:
    comparison: Comparison
    blocks: list[tuple[ray.ObjectRef, ...]]
    bits: int
    """Of a digest, that say which task looks at it."""


def equal_pairs(comparison: Comparison, *, pictures: bool, on_progress: Progress = lambda what: None) -> Found:
    """`pictures`: of equal pictures, whatever text goes with them, as the scores `hash` have them."""
    items = [(comparison, side, chunk, pictures) for side in comparison.sides for chunk in range(len(SideTable("", side.rows)))]
    bits = min(16, max(0, sum(side.rows for side in comparison.sides) // _PART_SAMPLES).bit_length())
    with own_errors():
        job = _Job(comparison, load(_read, items, 2), bits)
        parts = []
        for _, pairs in run_tasks(partial(_find, job), range(1 << bits)):
            parts.append(pairs)
            on_progress("equal pictures" if pictures else "equal samples")
    return Found(np.concatenate([NO_PAIRS, *parts]), Counter())


def _read(comparison: Comparison, side: Side, chunk: int, pictures: bool) -> tuple[NDArray[np.int64], NDArray[np.uint64]]:
    """Numbers and digests, [n, 2]."""
    index = opened(side.url)
    first, last = SideTable("", side.rows).bounds(chunk)
    good = comparison.looked_at(side, first, last)
    if pictures:
        column = Scores(index, HASH).values.read(chunk, ["picture"])["picture"]
        good &= column.is_valid().to_numpy()
        digests = vectors_of(column, np.uint64)
    else:
        digests = np.ascontiguousarray(index.digests[first:last]).view(np.uint64).reshape(-1, 2)
    places = np.flatnonzero(good)
    return side.offset + first + places, digests[places]


def _find(job: _Job, part: int) -> Pairs:
    numbers, digests = [], []
    for block, found in gathered(job.blocks):
        here = np.flatnonzero(found[:, 0] >> np.uint64(64 - job.bits) == part) if job.bits else np.arange(len(block))
        numbers.append(block[here])
        digests.append(found[here])
    return same(np.concatenate(numbers), np.concatenate(digests), job.comparison)


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
