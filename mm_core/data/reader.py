"""Positions of a plan to decoded, tokenised samples: what a read task of the stream runs.

Guarantees: as many samples as positions, in their order; a sample that cannot be used is replaced by the next usable one of its
chunk (of a chunk with none, by one of the chunks of its source that follow) and the replacement is recorded, so every rank takes the
same number of steps; the result depends on (plan, position) alone.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from mm_core.data.augment import AugmentConfig, random_views
from mm_core.data.columns import column_of
from mm_core.data.image import MAX_PIXELS
from mm_core.data.index import Index
from mm_core.data.ledger import Kept, Source, compile_kept
from mm_core.data.masking import MaskedWords, Masking
from mm_core.data.mix import MixedPlan
from mm_core.data.permutation import U64, mix
from mm_core.data.personal import PersonalKind, mask_personal
from mm_core.data.plan import Places, Plan
from mm_core.data.problems import Reason, SampleProblem
from mm_core.data.ranged import GAP_BYTES, RangedReader, Span
from mm_core.data.sample import Group, Sample, group_of_span, read_group
from mm_core.data.text import CaptionTokenizer, choose_captions
from mm_core.data.text_rows import TABLE, TableReader, is_texts, row_of_span
from mm_core.errors import DataError

_AUGMENT, _CAPTION, _MASK = 3, 4, 6
"""Keep the keys of the draws apart from each other and from the plan's."""
_BACKOFF_S = (0.05, 0.2)
"""Before a sample that disagrees with the index is read again."""
_QUARANTINE = 100_000
_STAND_IN_CHUNKS = 8
"""How many chunks further on a replacement is looked for where a whole chunk cannot be used."""


@dataclass(frozen=True)
class ReadSpec:
    """Everything a read task needs, small enough to send to every node once."""

    sources: tuple[Source, ...]
    plan: Plan | MixedPlan
    image_size: int
    augment: AugmentConfig
    tokenizer: CaptionTokenizer | None
    """None where texts are not read, whatever the sources have."""
    captions: int = 1
    """Texts of each image."""
    masking: Masking | None = None
    """What is hidden of each sample, if something is: of one view and one text."""
    labels: bool = False
    """Whether the samples' classes are read."""
    modalities: frozenset[str] = frozenset({"image", "text"})
    """What is read of a sample, where its source has it."""
    prompt_templates: tuple[str, ...] = ()
    max_pixels: int = MAX_PIXELS
    gap_bytes: int = GAP_BYTES
    """Bytes between two samples of a remote shard that are read along rather than asked for apart."""
    verify: bool = False
    """Compare every sample's bytes with the digest that the index has of it."""

    def need(self, index: Index) -> tuple[str, ...]:
        """The modalities that are read of a source."""
        shown = self.modalities - ({"text"} if self.tokenizer is None else set())
        return tuple(modality for modality in index.summary.need if modality in shown)

    @property
    def text_shape(self) -> tuple[int, int]:
        """Texts of a sample, and tokens of each."""
        return (0, 0) if self.tokenizer is None else (self.captions, self.tokenizer.context_length)


class IndexReader:
    """Samples of an index by ordinal, each checked against it: the members' names and sizes, and on request the digest of their bytes."""

    def __init__(self, index: Index, *, gap_bytes: int = GAP_BYTES, verify: bool = False) -> None:
        """
        Raises:
            DataError: `verify`, and the index has no digests.
        """
        self.index = index
        self._ranged, self._tables = RangedReader(gap_bytes=gap_bytes), TableReader()
        self._digests = index.digests if verify else None
        self._quarantine: dict[int, SampleProblem] = {}
        """Samples that are not what was indexed, by ordinal: they are not asked for again by this process."""

    def read(self, ordinals: U64) -> list[Sample | SampleProblem]:
        """The samples at `ordinals`, in that order; in the place of one that cannot be read, why."""
        return [self._interpreted(int(n), group) for n, group in zip(ordinals, self.groups(ordinals), strict=True)]

    def groups(self, ordinals: U64) -> list[Group | SampleProblem]:
        """The members, as they lie in the shards, of the samples at `ordinals`, in that order.

        Those that disagree with the index are read again from a reopened shard, all together, after a wait, before they are given up.
        """
        numbers = [int(ordinal) for ordinal in ordinals]
        found: dict[int, Group | SampleProblem] = {n: self._quarantine[n] for n in numbers if n in self._quarantine}
        asked = [n for n in dict.fromkeys(numbers) if n not in found]
        for wait_s in (*_BACKOFF_S, None):
            found |= self._attempt(asked)
            asked = [n for n in asked if _changed(found[n])]
            if not asked or wait_s is None:
                break
            time.sleep(wait_s)
            for span in self.spans(np.asarray(asked)):
                self._ranged.forget(span.url)
                self._tables.forget(span.url)
        if len(self._quarantine) < _QUARANTINE:
            self._quarantine |= {n: problem for n in asked if isinstance(problem := found[n], SampleProblem)}
        return [found[n] for n in numbers]

    def spans(self, ordinals: NDArray[Any]) -> list[Span]:
        """Where the samples at `ordinals` lie."""
        urls = self.index.shard_urls
        rows = self.index.locators[ordinals.astype(np.int64)]
        return [Span(urls[int(row["shard"])], int(row["start"]), int(row["span"])) for row in rows]

    def name_of(self, ordinal: int) -> str:
        """Of the shard that the sample lies in."""
        return self.index.shard_names[int(self.index.locators[ordinal]["shard"])]

    def _attempt(self, ordinals: list[int]) -> dict[int, Group | SampleProblem]:
        spans = dict(zip(ordinals, self.spans(np.asarray(ordinals, dtype=np.int64)), strict=True))
        rows = {n: span for n, span in spans.items() if span.url.endswith(TABLE)}
        ranges = {n: span for n, span in spans.items() if n not in rows}
        data = dict(zip(ranges, self._ranged.read([*ranges.values()]), strict=True))
        data |= dict(zip(rows, self._tables.read([(span.url, span.start) for span in rows.values()]), strict=True))
        return {n: self._group(n, data[n]) for n in ordinals}

    def _group(self, ordinal: int, data: bytes | SampleProblem) -> Group | SampleProblem:
        if isinstance(data, SampleProblem):
            return data
        row = self.index.locators[ordinal]
        name, check = self.name_of(ordinal), int(row["check"])
        digest = None if self._digests is None else bytes(self._digests[ordinal]).hex()
        try:
            if is_texts(name):
                return row_of_span(data, name, check=check, digest=digest)
            return group_of_span(data, name, check=check, occurrence=int(row["occurrence"]), digest=digest)
        except SampleProblem as problem:
            return problem

    def _interpreted(self, ordinal: int, group: Group | SampleProblem) -> Sample | SampleProblem:
        if isinstance(group, SampleProblem):
            return group
        try:
            return read_group(group, self.name_of(ordinal))
        except SampleProblem as problem:
            return problem


def _changed(found: Group | SampleProblem) -> bool:
    return isinstance(found, SampleProblem) and found.reason is Reason.CHANGED


@dataclass
class _Decoded:
    uid: str
    seed: int
    """All that is random about it is drawn by."""
    pixels: NDArray[np.uint8] | None
    """[views, size, size, 3]; None where the source is not read for images."""
    captions: list[str] | None
    """None where the source is not read for texts."""
    label: int | None


class PlanReader:
    """Reads positions of one plan. One per process: it keeps the indexes mapped and shards open."""

    def __init__(self, spec: ReadSpec, *, reuse_memory: bool = False) -> None:
        """`reuse_memory`: a table's pixels are valid until the next `read`. For a caller that copies them before, as a read task does
        into the object store: fresh memory for every block costs a tenth of the decoding in page faults."""
        torch.set_num_threads(1)
        self.spec = spec
        self._reuse_memory = reuse_memory
        self._memory = self._fresh(0)
        self._readers = [IndexReader(Index.open(source.index), gap_bytes=spec.gap_bytes, verify=spec.verify) for source in spec.sources]

    @cached_property
    def _kept(self) -> list[Kept]:
        """By source."""
        sets = []
        for source, reader, plan in zip(self.spec.sources, self._readers, self.spec.plan.plans, strict=True):
            kept = compile_kept(reader.index, source.ledgers)
            if kept.fingerprint != plan.kept_fingerprint:
                raise DataError(f"the index at {source.index} is not the one this run started with")
            sets.append(kept)
        return sets

    def read(self, positions: U64) -> pa.Table:
        """One row per position: `position, source, epoch, uid, image` (views x size x size x 3 bytes), `input_ids` (captions x length),
        `replaced` (a reason or null) and `replaced_shard` (of the sample that could not be used, or null). Image or token ids are empty
        where a source has none. With `labels` also `label`; with a `masking` `image_mask` (patches), `masked_ids` and `text_mask` (length).

        Args:
            positions: whole chunks of the plan.

        Raises:
            DataError: not one sample of a chunk and of those that follow it can be used.
        """
        pixels = self._pixels(len(positions))
        places, decoded = self._decoded(positions, pixels)
        reasons = [d.reason.value if isinstance(d, SampleProblem) else None for d in decoded]
        return self._table(positions, places, self._replace(decoded, positions), pixels, reasons)

    def _shards(self, places: Places, rows: list[int]) -> list[str]:
        """In which shard each of some rows was to be read."""
        found = []
        for row in rows:
            source, one = int(places.sources[row]), slice(row, row + 1)
            ordinals = self._kept[source].at(places.kept[one], places.epochs[one], self.spec.plan.plans[source].seed)
            found.append(self._readers[source].spans(ordinals)[0].url)
        return found

    def _pixels(self, count: int) -> NDArray[np.uint8]:
        if not self._reuse_memory:
            return self._fresh(count)
        if len(self._memory) < count:
            self._memory = self._fresh(count)
        return self._memory[:count]

    def _fresh(self, count: int) -> NDArray[np.uint8]:
        return np.empty((count, self.spec.augment.views, self.spec.image_size, self.spec.image_size, 3), dtype=np.uint8)

    def _decoded(self, positions: U64, pixels: NDArray[np.uint8], ahead: int = 0) -> tuple[Places, list[_Decoded | SampleProblem]]:
        """The samples at `positions`, or `ahead` chunks of the same source later, each image in its row of `pixels`."""
        places = self.spec.plan.locate(positions, ahead)
        decoded: dict[int, _Decoded | SampleProblem] = {}
        for source in map(int, np.unique(places.sources)):
            rows = np.flatnonzero(places.sources == source)
            key, reader = self.spec.plan.plans[source].seed, self._readers[source]
            ordinals = self._kept[source].at(places.kept[rows], places.epochs[rows], key)
            need = self.spec.need(reader.index)
            # The place belongs to the seed only where a sample can come twice in an epoch.
            again = () if self._kept[source].copies is None else (places.kept[rows],)
            seeds = mix(key, _AUGMENT, places.epochs[rows], ordinals, *again)
            samples = reader.read(ordinals)
            for row, sample, seed in zip(map(int, rows), samples, seeds, strict=True):
                decoded[row] = self._decode(sample, need, int(seed), pixels[row], self._kept[source].mask)
        return places, [decoded[row] for row in range(len(positions))]

    def _decode(
        self,
        sample: Sample | SampleProblem,
        need: tuple[str, ...],
        seed: int,
        pixels: NDArray[np.uint8],
        mask: tuple[PersonalKind, ...],
    ) -> _Decoded | SampleProblem:
        if isinstance(sample, SampleProblem):
            return sample
        if self.spec.labels and sample.label is None:
            return SampleProblem(Reason.CHANGED, "the class that it was indexed with is gone")
        try:
            return _Decoded(
                sample.uid,
                seed,
                self._views(sample, seed, pixels) if "image" in need else None,
                self._captions(sample, seed + _CAPTION, mask) if "text" in need else None,
                sample.label,
            )
        except SampleProblem as problem:
            return problem

    def _views(self, sample: Sample, seed: int, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
        if sample.image is None:
            raise SampleProblem(Reason.NO_IMAGE)
        return random_views(sample.image, self.spec.image_size, self.spec.augment, seed, max_pixels=self.spec.max_pixels, out=pixels)

    def _captions(self, sample: Sample, seed: int, mask: tuple[PersonalKind, ...]) -> list[str]:
        if not sample.captions:
            raise SampleProblem(Reason.NO_TEXT)
        captions = choose_captions(sample.captions, seed, self.spec.captions, self.spec.prompt_templates)
        return [mask_personal(caption, mask) for caption in captions] if mask else captions

    def _replace(self, decoded: list[_Decoded | SampleProblem], positions: U64) -> list[_Decoded]:
        """The next usable sample of the chunk, going round at its end."""
        chunk = self.spec.plan.chunk
        result: list[_Decoded] = []
        for start in range(0, len(decoded), chunk):
            group = decoded[start : start + chunk]
            if not any(isinstance(d, _Decoded) for d in group):
                group = self._stand_ins(positions[start : start + chunk], group)
            for i in range(len(group)):
                result.append(next(d for d in group[i:] + group[:i] if isinstance(d, _Decoded)))
        return result

    def _stand_ins(self, positions: U64, group: list[_Decoded | SampleProblem]) -> list[_Decoded | SampleProblem]:
        """The next chunk of the same source that holds a usable sample, for one that holds none."""
        for further in range(1, _STAND_IN_CHUNKS + 1):
            _, decoded = self._decoded(positions, self._fresh(len(positions)), further)
            if any(isinstance(d, _Decoded) for d in decoded):
                return decoded
        raise DataError(
            f"not one of the {len(group) * (_STAND_IN_CHUNKS + 1)} samples from position {positions[0]} on can be used, the first because"
            f" of {group[0]}; has the data at {self._url(positions)} moved or changed since it was indexed?"
        )

    def _url(self, positions: U64) -> str:
        return self.spec.sources[int(self.spec.plan.locate(positions[:1]).sources[0])].index

    def _table(
        self, positions: U64, places: Places, samples: list[_Decoded], pixels: NDArray[np.uint8], reasons: list[str | None]
    ) -> pa.Table:
        for row, sample, reason in zip(pixels, samples, reasons, strict=True):
            if reason is not None and sample.pixels is not None:
                row[:] = sample.pixels
        lost = [row for row, reason in enumerate(reasons) if reason is not None]
        shards = dict(zip(lost, self._shards(places, lost), strict=True))
        seen = np.array([s.pixels is not None for s in samples])
        texts = self._texts(samples)
        return pa.table(
            {
                "position": positions,
                "source": places.sources,
                "epoch": places.epochs,
                "uid": pa.array([s.uid for s in samples], pa.string()),
                "image": column_of(pixels if seen.all() else pixels[seen], seen),
                **texts,
                "replaced": pa.array(reasons, pa.string()),
                "replaced_shard": pa.array([shards.get(row) for row in range(len(samples))], pa.string()),
                **({"label": pa.array([s.label for s in samples], pa.int64())} if self.spec.labels else {}),
                **self._image_masks(samples, seen),
            }
        )

    def _texts(self, samples: list[_Decoded]) -> dict[str, pa.Array]:
        there = np.array([s.captions is not None for s in samples])
        captions = [caption for s in samples for caption in s.captions or ()]
        if self.spec.tokenizer is None or self.spec.masking is None:
            ids = np.zeros((0, 0), dtype=np.int32) if self.spec.tokenizer is None else self.spec.tokenizer(captions)
            return {"input_ids": column_of(ids.reshape(int(there.sum()), *self.spec.text_shape), there)}
        ids, words = self.spec.tokenizer.with_words(captions)
        seeds = np.array([s.seed for s in samples if s.captions is not None], dtype=np.uint64)
        masked: MaskedWords = self.spec.masking.texts(ids, words, mix(seeds, _MASK))
        columns = {"input_ids": ids, "masked_ids": masked.input_ids, "text_mask": masked.hidden}
        return {name: column_of(np.ascontiguousarray(values), there) for name, values in columns.items()}

    def _image_masks(self, samples: list[_Decoded], seen: NDArray[np.bool_]) -> dict[str, pa.Array]:
        if self.spec.masking is None:
            return {}
        seeds = np.array([s.seed for s in samples if s.pixels is not None], dtype=np.uint64)
        return {"image_mask": column_of(self.spec.masking.images(mix(seeds, _MASK)), seen)}
