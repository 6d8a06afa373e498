"""Pairs of samples whose pictures mean the same to a model: embeddings, k-means cells, then all pairs inside each.

Tasks hand every vector to the groups of cells it is in; a task for each group compares inside its cells. Memory: twice the embeddings in
the object stores of all nodes, which go to disk when they are full; of a task, its group: 262,144 vectors, more above 33 million samples,
where a group is a 256th of all. Above 500 million samples cells are so large that they are cut, which is counted.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import ray
from jaxtyping import Float16, Float32
from numpy.typing import NDArray

from mm_core.curation.cells import NEAREST, cells_for, centres, is_cut, nearest, sampled, similar_pairs
from mm_core.curation.components import Pairs
from mm_core.data.columns import vectors_of
from mm_core.data.scores import Scores
from pipelines.causes import own_errors
from pipelines.curate.batches import opened
from pipelines.curate.comparison import Comparison, Dealt, Found, PairSink, Progress, Slab, deal, gathered, slabs, split_up
from pipelines.tasks import run_tasks

_GROUP_VECTORS = 1 << 18
_MOST_GROUPS = 256
_STAGE = "vectors that are alike"


@dataclass(frozen=True)
class _Job:
    comparison: Comparison
    similarity: float
    groups: Dealt
    """Of cells: numbers, cells and vectors."""


def vector_pairs(comparison: Comparison, embeddings: str, similarity: float, *, on_progress: Progress = lambda what: None) -> Found:
    """Of samples whose vectors have a cosine of at least `similarity` and share a cell. Counted, of ours: `unembedded`, which have no
    vector; of all: `cut`, in cells so large that not all was compared."""
    each = [slab for side in comparison.sides for slab in slabs(side, Scores(opened(side.url), embeddings).values, _GROUP_VECTORS)]
    samples = sum(side.rows for side in comparison.sides)
    groups = max(1, min(_MOST_GROUPS, cells_for(samples), -(-NEAREST * samples // _GROUP_VECTORS)))
    counts: Counter[str] = Counter()
    sink = PairSink(comparison)
    with own_errors():
        parts = dict(run_tasks(partial(_sample, comparison, samples), each))
        sample = np.concatenate([parts[number] for number in range(len(each))]).astype(np.float32)
        if not len(sample):
            return Found(sink.pairs(), counts)
        cells = ray.put(centres(sample, min(len(sample), cells_for(samples))))
        dealt, absent = deal(_deal, [(comparison, slab, cells, groups) for slab in each], groups)
        counts["unembedded"] += sum(absent)
        job = _Job(comparison, similarity, dealt)
        for _, (pairs, cut) in run_tasks(partial(_compare, job), range(groups)):
            sink.add(pairs[:, 0], pairs[:, 1])
            counts["cut"] += cut
            on_progress(_STAGE)
    return Found(sink.pairs(), counts)


def _vectors(comparison: Comparison, slab: Slab, chunk: int) -> tuple[NDArray[np.int64], Float16[np.ndarray, "n d"], int]:
    """Numbers and vectors of those looked at, and how many have none."""
    first, last = slab.table.bounds(chunk)
    column = slab.table.read(chunk, ["image"])["image"]
    there = column.combine_chunks().is_valid().to_numpy(zero_copy_only=False)
    asked = comparison.looked_at(slab.side, first, last)
    places = np.flatnonzero(asked & there)
    return slab.side.offset + first + places, vectors_of(column, np.float16)[places], int((asked & ~there).sum())


def _sample(comparison: Comparison, samples: int, slab: Slab) -> Float16[np.ndarray, "n d"]:
    found = []
    for chunk in slab.chunks:
        numbers, vectors, _ = _vectors(comparison, slab, chunk)
        found.append(vectors[sampled(numbers, samples)])
    return np.concatenate(found)


def _deal(comparison: Comparison, slab: Slab, cells: Float32[np.ndarray, "k d"], groups: int) -> tuple[Any, ...]:
    """For each group the numbers, cells and vectors of this slab that are in it; at last how many of ours have no vector."""
    numbers, vectors, absent = (list(each) for each in zip(*(_vectors(comparison, slab, chunk) for chunk in slab.chunks), strict=True))
    number, vector = np.concatenate(numbers), np.concatenate(vectors)
    own = nearest(vector.astype(np.float32), cells)
    row, cell = np.repeat(np.arange(len(own)), own.shape[1]), own.reshape(-1)
    dealt = split_up(cell % groups, groups, row, cell)
    return (*((number[some], its_cell, vector[some]) for some, its_cell in dealt), sum(absent) if slab.side == comparison.index else 0)


def _compare(job: _Job, group: int) -> tuple[Pairs, int]:
    """The pairs in the cells of a group, and how many vectors are in cells that were cut."""
    numbers, cells, vectors = gathered(job.groups[group])
    order = np.lexsort((numbers, cells))
    ends = np.flatnonzero(np.r_[cells[order][1:] != cells[order][:-1], True][: len(order)]) + 1
    sink, cut = PairSink(job.comparison), 0
    for first, last in zip([0, *ends[:-1]], ends, strict=True):
        members = order[first:last]
        ours = job.comparison.ours(numbers[members])
        cut += len(members) if is_cut(len(members)) else 0
        for one, other in similar_pairs(vectors[members], ours, ~ours if job.comparison.against else ours, job.similarity):
            a, b = numbers[members[one]], numbers[members[other]]
            once = a < b
            sink.add(a[once], b[once])
    return sink.pairs(), cut
