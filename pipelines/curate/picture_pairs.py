"""Pairs of samples whose pictures look the same: found by their hashes, confirmed by their thumbnails (`mm data score INDEX hash`).

Band by band, tasks deal the hashes out by the band's values, and a task for each part joins those in it. What they find, a few pairs a
thousand pictures, goes where the thumbnails of its first and then of its second picture are read. Memory: some 100 bytes a sample in the
object stores of all nodes together; of a task four million hashes and those whose values are near, more above 170 million samples, where a
part is a 256th of all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import ray
from numpy.typing import NDArray

from mm_core.curation.alignment import SAME, aligned_correlation, leaders
from mm_core.curation.bands import Bands
from mm_core.curation.components import NO_PAIRS, Pairs
from mm_core.curation.picture_hash import HASHES, LEAST_CONTRAST, THUMBNAIL
from mm_core.curation.score_rules import HASH
from mm_core.data.columns import vectors_of
from mm_core.data.permutation import mix
from mm_core.data.scores import Scores
from pipelines.causes import own_errors
from pipelines.curate.batches import opened
from pipelines.curate.comparison import Comparison, Dealt, Found, PairSink, Progress, Slab, deal, gathered, slabs, split_up
from pipelines.tasks import run_tasks

_PART_HASHES = 1 << 22
_SLAB_ROWS = 1 << 20
_RANGE_SAMPLES = 1 << 22
_MOST_RANGES = 256
_CROWD = 64
_STAGE = "pictures that look the same"
I64 = NDArray[np.int64]
U64 = NDArray[np.uint64]


@dataclass(frozen=True)
class _Job:
    comparison: Comparison
    slabs: list[Slab]
    bands: Bands
    parts: int
    """Of a band's values; a power of two."""
    ranges: int
    """Of numbers, that thumbnails are read by."""
    crowd: int
    """Of more pictures with one hash each is compared with the first of its kind, not with each."""

    def range_of(self, numbers: I64) -> I64:
        return numbers * self.ranges // sum(side.rows for side in self.comparison.sides)


@dataclass(frozen=True)
class _Band:
    """One band's hashes: for each part, from every slab numbers and hashes, of whole pictures and of crops apart."""

    whole: Dealt
    crops: Dealt

    def beside(self, part: int, radius: int) -> tuple[Dealt, list[ray.ObjectRef], list[ray.ObjectRef]]:
        """Whole pictures' hashes of the parts whose values may be `radius` bits from those of a part, its own too; and of the part alone
        those of whole pictures, and those of crops."""
        near = [whole for other, whole in enumerate(self.whole) if (other ^ part).bit_count() <= radius]
        return near, self.whole[part], self.crops[part]


def picture_pairs(comparison: Comparison, distance: int, *, on_progress: Progress = lambda what: None) -> Found:
    """Of pictures of which a hash of the whole of one differs in at most `distance` bits from one of the other's, and whose
    thumbnails then agree. Counted, of ours: `plain` and `unreadable`, which have no hash; of all: `cut` and `uncompared`, of what is so
    frequent that not all of it was compared."""
    samples = sum(side.rows for side in comparison.sides)
    bands = Bands.fitted(distance, HASHES * samples)
    each = [slab for side in comparison.sides for slab in slabs(side, Scores(opened(side.url), HASH).values, _SLAB_ROWS)]
    ranges = max(1, min(_MOST_RANGES, -(-samples // _RANGE_SAMPLES)))
    job = _Job(comparison, each, bands, bands.parts(HASHES * samples, of=_PART_HASHES), ranges, _CROWD)
    sink, counts = PairSink(comparison), Counter(cut=0, uncompared=0)
    with own_errors():
        band, absent = _dealt(job, 0)
        for of_slab in absent:
            counts.update(of_slab)
        without, crowded = _without_crowds(job, band, sink, counts, on_progress)
        candidates: Dealt = [[] for _ in range(ranges)]
        for number in range(bands.count):
            if number or without is not job:
                band, _ = _dealt(without, number)
            parts = [(without, number, *band.beside(part, bands.radius)) for part in range(job.parts)]
            found, cuts = deal(_join, parts, ranges, lambda: on_progress(_STAGE))
            counts["cut"] += sum(cuts)
            candidates = [[*refs, *more] for refs, more in zip(candidates, found, strict=True)]
        looked_up, _ = deal(_with_thumbnails, [(job, refs) for refs in candidates], ranges)
        for _, pairs in run_tasks(partial(_confirmed, job), looked_up):
            sink.add(pairs[:, 0], pairs[:, 1])
    return Found(_with_crowds(sink.pairs(), crowded, comparison), counts)


def _dealt(job: _Job, band: int) -> tuple[_Band, list[Counter[str]]]:
    """A band's hashes by part; and by slab what has none."""
    dealt, absent = deal(_deal, [(job, slab, band) for slab in job.slabs], 2 * job.parts)
    return _Band(dealt[: job.parts], dealt[job.parts :]), absent


def _deal(job: _Job, slab: Slab, band: int) -> tuple[Any, ...]:
    """For each part the whole pictures' numbers and hashes, then the same of crops; at last what was counted."""
    counts, numbers, hashes = Counter[str](), [], []
    for chunk in slab.chunks:
        number, values, absent = _read(job.comparison, slab, chunk)
        numbers.append(number)
        hashes.append(values)
        counts.update(absent)
    number, values = np.concatenate(numbers), np.concatenate(hashes)
    found = []
    for kinds in (values[:, :1], values[:, 1:]):
        flat = np.ascontiguousarray(kinds).reshape(-1)
        part = job.bands.part_of(flat, band, job.parts).astype(np.int64)
        found += split_up(part, job.parts, np.repeat(number, kinds.shape[1]), flat)
    return (*found, counts)


def _read(comparison: Comparison, slab: Slab, chunk: int) -> tuple[I64, U64, Counter[str]]:
    """Numbers and the six hashes of each, and of ours how many have none."""
    first, last = slab.table.bounds(chunk)
    rows = slab.table.read(chunk, ["hashes", "contrast"])
    asked = comparison.looked_at(slab.side, first, last)
    there = rows["hashes"].combine_chunks().is_valid().to_numpy(zero_copy_only=False)
    plain = there & (rows["contrast"].combine_chunks().fill_null(0).to_numpy(zero_copy_only=False) < LEAST_CONTRAST)
    places = np.flatnonzero(asked & there & ~plain)
    counts = Counter[str]()
    if slab.side == comparison.index:
        counts.update({"plain": int((asked & plain).sum()), "unreadable": int((asked & ~there).sum())})
    return slab.side.offset + first + places, vectors_of(rows["hashes"], np.uint64)[places], counts


def _join(job: _Job, band: int, near: Dealt, whole: list[ray.ObjectRef], crops: list[ray.ObjectRef]) -> tuple[Any, ...]:
    """For each range the pairs that one part of a band finds whose first number is in it; at last how many look-ups were cut."""
    found, cuts = [NO_PAIRS], 0
    for first, second, cut in _candidates(job, band, near, whole, crops):
        cuts += cut
        found.append(np.stack([np.minimum(first, second), np.maximum(first, second)], axis=1))
    pairs = np.unique(np.concatenate(found), axis=0)
    return (*split_up(job.range_of(pairs[:, 0]), job.ranges, pairs), cuts)


def _candidates(
    job: _Job, band: int, near: Dealt, whole: list[ray.ObjectRef], crops: list[ray.ObjectRef]
) -> Iterator[tuple[I64, I64, int]]:
    """Numbers of samples with hashes near each other. One hash of a pair is of a whole picture: two crops alike say nothing more."""
    rounds = [(True, True, True)] if not job.comparison.against else [(True, False, True), (False, True, False)]
    for queries_ours, entries_ours, with_whole in rounds:
        query_numbers, queries = _of_side(job, near, ours=queries_ours)
        numbers, entries = _of_side(job, [whole, crops] if with_whole else [crops], ours=entries_ours)
        is_whole = np.arange(len(numbers)) < (len(_of_side(job, [whole], ours=entries_ours)[0]) if with_whole else 0)
        keys = job.bands.keys(entries, band)
        order = np.lexsort((numbers, keys))
        for query, entry, cut in job.bands.pairs(job.bands.keys(queries, band), keys[order], band):
            first, second, from_whole = query_numbers[query], numbers[order[entry]], is_whole[order[entry]]
            once = (first != second) & (~from_whole | (first < second) | (queries_ours != entries_ours))
            yield first[once], second[once], cut


def _of_side(job: _Job, dealt: Dealt, *, ours: bool) -> tuple[NDArray[Any], ...]:
    """Numbers and hashes, in some parts, of our index, or of the others."""
    mine = [slab.side == job.comparison.index for slab in job.slabs]
    refs = [ref for part in dealt for ref, is_ours in zip(part, mine, strict=True) if is_ours == ours]
    return gathered(refs) if refs else (np.zeros(0, np.int64), np.zeros(0, np.uint64))


def _with_thumbnails(job: _Job, candidates: Sequence[ray.ObjectRef]) -> tuple[Any, ...]:
    """Pairs whose first numbers are in one range, with the first's thumbnails, for each range of the second number; at last nothing."""
    (pairs,) = gathered(candidates)
    return (*split_up(job.range_of(pairs[:, 1]), job.ranges, pairs, _thumbnails(job, pairs[:, 0])), None)


def _confirmed(job: _Job, candidates: Sequence[ray.ObjectRef]) -> Pairs:
    """Of pairs whose second numbers are in one range those whose thumbnails agree."""
    pairs, thumbnails = gathered(candidates)
    same = aligned_correlation(thumbnails, _thumbnails(job, pairs[:, 1])) >= np.float32(SAME)
    sink = PairSink(job.comparison)
    sink.add(pairs[same, 0], pairs[same, 1])
    return sink.pairs()


def _thumbnails(job: _Job, numbers: I64) -> NDArray[np.uint8]:
    """Thumbnails by number: of each file that holds one, one file at a time."""
    found = np.empty((len(numbers), THUMBNAIL, THUMBNAIL), dtype=np.uint8)
    order = np.argsort(numbers)
    for slab in job.slabs:
        for chunk in slab.chunks:
            low, high = np.searchsorted(numbers[order], [slab.side.offset + row for row in slab.table.bounds(chunk)])
            if low < high:
                here = order[low:high]
                column = slab.table.read(chunk, ["thumbnail"])["thumbnail"]
                places = numbers[here] - slab.side.offset - slab.table.bounds(chunk)[0]
                found[here] = vectors_of(column, np.uint8)[places].reshape(-1, THUMBNAIL, THUMBNAIL)
    return found


def _without_crowds(job: _Job, band: _Band, sink: PairSink, counts: Counter[str], on_progress: Progress) -> tuple[_Job, Pairs]:
    """The job without pictures of which a hash has more than some, but for the first of each kind; and those with what they are like."""
    values: tuple[list[U64], list[U64]] = ([], [])
    for _, found in run_tasks(partial(_crowds, job), band.whole):
        for known, more in zip(values, found, strict=True):
            known.append(more)
        on_progress(_STAGE)
    crowds = tuple(np.sort(np.concatenate(each)) for each in values)
    if not any(map(len, crowds)):
        return job, NO_PAIRS
    members, _ = deal(_members, [(job, slab, crowds) for slab in job.slabs], job.parts)
    links, alone = [NO_PAIRS], [np.zeros(0, np.int64)]
    for _, (led, left) in run_tasks(partial(_led, job), members):
        links.append(led)
        alone.append(left)
    crowded, uncompared = np.concatenate(links), np.concatenate(alone)
    counts["uncompared"] += len(uncompared)
    if not job.comparison.against:
        sink.add(crowded[:, 0], crowded[:, 1])
    before = [] if job.comparison.left_out is None else [ray.get(job.comparison.left_out)]
    gone = np.sort(np.concatenate([crowded[:, 1], uncompared, *before]))
    return replace(job, comparison=replace(job.comparison, left_out=ray.put(gone))), crowded


def _crowds(job: _Job, whole: list[ray.ObjectRef]) -> tuple[U64, U64]:
    """Of a part, hashes that more whole pictures have than a crowd has: of ours, and of the others."""
    found = []
    for ours in (True, False):
        values, sizes = np.unique(_of_side(job, [whole], ours=ours)[1], return_counts=True)
        found.append(values[sizes > job.crowd])
    return found[0], found[1]


def _members(job: _Job, slab: Slab, crowds: tuple[U64, U64]) -> tuple[Any, ...]:
    """For each group of hashes the pictures of this slab that have one of a crowd: hashes, numbers and thumbnails; at last nothing."""
    wanted = crowds[0 if slab.side == job.comparison.index else 1]
    read = [_read(job.comparison, slab, chunk)[:2] for chunk in slab.chunks]
    number, value = np.concatenate([numbers for numbers, _ in read]), np.concatenate([hashes[:, 0] for _, hashes in read])
    number, value = number[(here := np.isin(value, wanted))], value[here]
    group = (mix(value) % np.uint64(job.parts)).astype(np.int64)
    return (*split_up(group, job.parts, value, number, _thumbnails(job, number)), None)


def _led(job: _Job, members: Sequence[ray.ObjectRef]) -> tuple[Pairs, I64]:
    """Of the crowds in a group: each picture with its leader, and those that have none."""
    links, alone = [NO_PAIRS], [np.zeros(0, np.int64)]
    values, numbers, thumbnails = gathered(members)
    theirs = ~job.comparison.ours(numbers)
    order = np.lexsort((numbers, values, theirs))
    begins = np.flatnonzero((np.diff(values[order], prepend=0) != 0) | (np.diff(theirs[order], prepend=False)))
    for some in np.split(order, begins):
        if len(some) > job.crowd:
            leader = leaders(thumbnails[some], job.crowd)
            led = np.flatnonzero((leader >= 0) & (leader != np.arange(len(some))))
            links.append(np.stack([numbers[some[leader[led]]], numbers[some[led]]], axis=1))
            alone.append(numbers[some[leader < 0]])
    return np.concatenate(links), np.concatenate(alone)


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
