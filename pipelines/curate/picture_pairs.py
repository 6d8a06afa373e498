"""Pairs of samples whose pictures look the same: found by their hashes, confirmed by their thumbnails (`mm data score INDEX hash`).

A task for each band and range of its values joins the hashes there and looks at the thumbnails of what it finds. Memory: 310 bytes a
sample in each node's object store, which goes to its disk when it is full; of a task, four million hashes, those whose values are near
(at a billion samples 55 million), and a million pairs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import NamedTuple

import numpy as np
import ray
from numpy.typing import NDArray

from mm_core.curation.alignment import SAME, aligned_correlation, leaders
from mm_core.curation.bands import Bands
from mm_core.curation.components import Pairs
from mm_core.curation.picture_hash import HASHES, LEAST_CONTRAST, THUMBNAIL
from mm_core.curation.score_rules import HASH
from mm_core.data.columns import vectors_of
from mm_core.data.scores import Scores
from mm_core.data.side_table import SideTable
from pipelines.causes import own_errors
from pipelines.curate.batches import opened
from pipelines.curate.comparison import Comparison, Found, PairSink, Progress, Side, gathered, load
from pipelines.tasks import run_tasks

_PART_HASHES = 1 << 22
_CROWD = 64
_STAGE = "pictures that look the same"
I64 = NDArray[np.int64]


@dataclass(frozen=True)
class _Job:
    comparison: Comparison
    bands: Bands
    parts: int
    """Ranges of a band's values; a power of two."""
    hashes: list[tuple[ray.ObjectRef, ...]]
    """Blocks of numbers, ascending, and their hashes, [n, 6]."""
    thumbnails: list[ray.ObjectRef]
    """[n, 16, 16] of each block."""
    crowd: int
    """Of more pictures with one hash each is compared with the first of its kind, not with each."""


class _Hashes(NamedTuple):
    """Some of the hashes, with the number of each one's sample and which of its six it is."""

    values: NDArray[np.uint64]
    numbers: I64
    kinds: I64


def picture_pairs(comparison: Comparison, distance: int, *, on_progress: Progress = lambda what: None) -> Found:
    """Of pictures of which a hash of the whole of one differs in at most `distance` bits from one of the other's, and whose
    thumbnails then agree. Counted, of ours: `plain` and `unreadable`, which have no hash; of all: `cut` and `uncompared`, of what is so
    frequent that not all of it was compared."""
    tables = [(side, Scores(opened(side.url), HASH).values) for side in comparison.sides]
    items = [(comparison, side, table, chunk) for side, table in tables for chunk in range(len(table))]
    samples = sum(side.rows for side in comparison.sides)
    bands = Bands.fitted(distance, HASHES * samples)
    with own_errors():
        blocks = load(_read, items, 4)
        counts: Counter[str] = Counter()
        for block in blocks:
            counts.update(ray.get(block[3]))
        parts = bands.parts(HASHES * samples, of=_PART_HASHES)
        job = _Job(comparison, bands, parts, [b[:2] for b in blocks], [b[2] for b in blocks], _CROWD)
        sink = PairSink(comparison)
        job, crowded = _without_crowds(job, sink, counts, on_progress)
        places = [(band, part) for band in range(bands.count) for part in range(job.parts)]
        for _, (pairs, cut) in run_tasks(partial(_join, job), places):
            sink.add(pairs[:, 0], pairs[:, 1])
            counts["cut"] += cut
            on_progress(_STAGE)
    return Found(_with_crowds(sink.pairs(), crowded, comparison), counts)


def _read(
    comparison: Comparison, side: Side, table: SideTable, chunk: int
) -> tuple[I64, NDArray[np.uint64], NDArray[np.uint8], Counter[str]]:
    first, last = table.bounds(chunk)
    rows = table.read(chunk, ["hashes", "thumbnail", "contrast"])
    asked = comparison.looked_at(side, first, last)
    there = rows["hashes"].combine_chunks().is_valid().to_numpy(zero_copy_only=False)
    plain = there & (rows["contrast"].combine_chunks().fill_null(0).to_numpy(zero_copy_only=False) < LEAST_CONTRAST)
    places = np.flatnonzero(asked & there & ~plain)
    counts = Counter[str]()
    if side == comparison.index:
        counts.update({"plain": int((asked & plain).sum()), "unreadable": int((asked & ~there).sum())})
    thumbnails = vectors_of(rows["thumbnail"], np.uint8)[places].reshape(-1, THUMBNAIL, THUMBNAIL)
    return side.offset + first + places, vectors_of(rows["hashes"], np.uint64)[places], thumbnails, counts


def _join(job: _Job, place: tuple[int, int]) -> tuple[Pairs, int]:
    """The pairs that one range of a band's values finds, and how many of its look-ups were cut."""
    sink, thumbnails, cuts = PairSink(job.comparison), _Thumbnails(job), 0
    for first, second, cut in _candidates(job, *place):
        cuts += cut
        if len(first):
            pairs = np.unique(np.stack([np.minimum(first, second), np.maximum(first, second)], axis=1), axis=0)
            same = aligned_correlation(thumbnails.of(pairs[:, 0]), thumbnails.of(pairs[:, 1])) >= np.float32(SAME)
            sink.add(pairs[same, 0], pairs[same, 1])
    return sink.pairs(), cuts


def _candidates(job: _Job, band: int, part: int) -> Iterator[tuple[I64, I64, int]]:
    """Numbers of samples with hashes near each other. One hash of a pair is of a whole picture: two crops alike say nothing more."""
    rounds = [(True, True, 0)] if not job.comparison.against else [(True, False, 0), (False, True, 1)]
    for queries_ours, entries_ours, from_kind in rounds:
        queries = _hashes(job, band, part, ours=queries_ours, kinds=range(1), radius=job.bands.radius)
        entries = _hashes(job, band, part, ours=entries_ours, kinds=range(from_kind, HASHES), radius=0)
        keys = job.bands.keys(entries.values, band)
        order = np.lexsort((entries.numbers, keys))
        for query, entry, cut in job.bands.pairs(job.bands.keys(queries.values, band), keys[order], band):
            first, second, kind = queries.numbers[query], entries.numbers[order[entry]], entries.kinds[order[entry]]
            once = (first != second) & ((kind > 0) | (first < second) | (queries_ours != entries_ours))
            yield first[once], second[once], cut


def _hashes(job: _Job, band: int, part: int, *, ours: bool, kinds: range, radius: int) -> _Hashes:
    """Those whose value of the band lies in ranges whose numbers differ in at most `radius` bits from `part`."""
    found: list[_Hashes] = [_Hashes(np.zeros(0, np.uint64), np.zeros(0, np.int64), np.zeros(0, np.int64))]
    for numbers, hashes in gathered(job.hashes):
        if len(numbers) and job.comparison.ours(numbers[:1])[0] == ours:
            values = np.ascontiguousarray(hashes[:, kinds.start : kinds.stop]).reshape(-1)
            near = np.bitwise_count(job.bands.part_of(values, band, job.parts) ^ np.uint64(part)) <= radius
            places = np.flatnonzero(near)
            found.append(_Hashes(values[places], numbers[places // len(kinds)], kinds.start + places % len(kinds)))
    return _Hashes(*(np.concatenate(each) for each in zip(*found, strict=True)))


@dataclass(frozen=True)
class _Thumbnails:
    """Thumbnails by number, of blocks that are fetched when they are asked for."""

    job: _Job

    def of(self, numbers: I64) -> NDArray[np.uint8]:
        found = np.empty((len(numbers), THUMBNAIL, THUMBNAIL), dtype=np.uint8)
        blocks = np.searchsorted(self._starts, numbers, side="right") - 1
        for block in np.unique(blocks):
            here = np.flatnonzero(blocks == block)
            known, thumbnails = ray.get([self._filled[block][0], self._filled[block][1]])
            found[here] = thumbnails[np.searchsorted(known, numbers[here])]
        return found

    @cached_property
    def _filled(self) -> list[tuple[ray.ObjectRef, ray.ObjectRef]]:
        both = zip(self.job.hashes, self.job.thumbnails, strict=True)
        return [(block[0], thumbnails) for block, thumbnails in both if len(ray.get(block[0]))]

    @cached_property
    def _starts(self) -> I64:
        return np.array([int(ray.get(numbers)[0]) for numbers, _ in self._filled])


def _without_crowds(job: _Job, sink: PairSink, counts: Counter[str], on_progress: Progress) -> tuple[_Job, Pairs]:
    """The job without pictures of which a hash has more than some, but for the first of each kind; and those with what they are like."""
    links, alone = [np.zeros((0, 2), np.int64)], [np.zeros(0, np.int64)]
    for _, (found, left) in run_tasks(partial(_crowds, job), range(job.parts)):
        links.append(found)
        alone.append(left)
        on_progress(_STAGE)
    crowded, uncompared = np.concatenate(links), np.concatenate(alone)
    counts["uncompared"] += len(uncompared)
    if not len(crowded) and not len(uncompared):
        return job, crowded
    if not job.comparison.against:
        sink.add(crowded[:, 0], crowded[:, 1])
    gone = ray.put(np.sort(np.concatenate([crowded[:, 1], uncompared])))
    blocks = load(_reduced, [(gone, *block, thumbnails) for block, thumbnails in zip(job.hashes, job.thumbnails, strict=True)], 3)
    return replace(job, hashes=[block[:2] for block in blocks], thumbnails=[block[2] for block in blocks]), crowded


def _crowds(job: _Job, part: int) -> tuple[Pairs, I64]:
    """Of the crowds in a range of the first band: each picture with its leader, and those that have none."""
    links, alone = [np.zeros((0, 2), np.int64)], [np.zeros(0, np.int64)]
    thumbnails = _Thumbnails(job)
    for ours in (True, False) if job.comparison.against else (True,):
        whole = _hashes(job, 0, part, ours=ours, kinds=range(1), radius=0)
        order = np.lexsort((whole.numbers, whole.values))
        _, starts, sizes = np.unique(whole.values[order], return_index=True, return_counts=True)
        for start, size in zip(starts[sizes > job.crowd], sizes[sizes > job.crowd], strict=True):
            numbers = whole.numbers[order[start : start + size]]
            leader = leaders(thumbnails.of(numbers), job.crowd)
            led = np.flatnonzero((leader >= 0) & (leader != np.arange(size)))
            links.append(np.stack([numbers[leader[led]], numbers[led]], axis=1))
            alone.append(numbers[leader < 0])
    return np.concatenate(links), np.concatenate(alone)


def _reduced(
    gone: I64, numbers: I64, hashes: NDArray[np.uint64], thumbnails: NDArray[np.uint8]
) -> tuple[I64, NDArray[np.uint64], NDArray[np.uint8]]:
    stays = ~np.isin(numbers, gone, assume_unique=True)
    return numbers[stays], hashes[stays], thumbnails[stays]


def _with_crowds(pairs: Pairs, crowded: Pairs, comparison: Comparison) -> Pairs:
    """Against others: what a leader of ours matches, those match that it leads."""
    if not comparison.against or not len(crowded):
        return pairs
    ours = crowded[comparison.ours(crowded[:, 0])]
    place = np.searchsorted(pairs[:, 0], ours[:, 0])
    matched = (
        (place < len(pairs)) & (pairs[np.minimum(place, max(0, len(pairs) - 1)), 0] == ours[:, 0]) if len(pairs) else np.zeros(0, bool)
    )
    more = np.stack([ours[matched, 1], pairs[place[matched], 1]], axis=1) if len(pairs) else pairs
    return comparison.fewer(np.concatenate([pairs, more]))
