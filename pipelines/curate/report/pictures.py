"""Samples as a page shows them: a small picture, captions, where they lie.

They are read as training reads them, and what cannot be read says so.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import simplejpeg

from mm_core.data.image import decode_whole
from mm_core.data.index import Index
from mm_core.data.personal import PersonalKind, mask_personal
from mm_core.data.problems import SampleProblem
from mm_core.data.reader import IndexReader
from mm_core.data.sample import Sample

_SIDE = 176
"""Pixels of a small picture's longer side: some 5 kB."""
_QUALITY = 72
_AT_A_TIME = 64
_MAX_CAPTIONS = 5
_MAX_CHARACTERS = 400


@dataclass(frozen=True)
class Shown:
    """One sample."""

    ordinal: int
    uid: str
    place: str
    """Shard and key."""
    captions: tuple[str, ...] = ()
    """The first few, cut where they are long."""
    picture: str | None = None
    """A data URI."""
    width: int = 0
    height: int = 0
    problem: str | None = None
    """Why it, or its picture, cannot be read."""


def read_samples(
    index: Index,
    ordinals: Iterable[int],
    mask: Sequence[PersonalKind] = (),
    *,
    pictures: bool = True,
) -> dict[int, Shown]:
    """By ordinal. Personal data of the kinds in `mask` is masked in captions."""
    reader, found = IndexReader(index), dict[int, Shown]()
    wanted = sorted(set(ordinals))
    for first in range(0, len(wanted), _AT_A_TIME):
        some = wanted[first : first + _AT_A_TIME]
        for ordinal, sample in zip(some, reader.read(np.array(some, dtype=np.uint64)), strict=True):
            shard = index.shard_names[int(index.locators["shard"][ordinal])]
            found[ordinal] = _shown(ordinal, shard, sample, mask, pictures)
    return found


def _shown(ordinal: int, shard: str, sample: Sample | SampleProblem, mask: Sequence[PersonalKind], pictures: bool) -> Shown:
    if isinstance(sample, SampleProblem):
        return Shown(ordinal, "", f"{shard}, row {ordinal:,}", problem=sample.reason.value)
    captions = tuple(_cut(mask_personal(caption, mask) if mask else caption) for caption in sample.captions[:_MAX_CAPTIONS])
    place = f"{shard}: {sample.key}"
    if sample.image is None or not pictures:
        return Shown(ordinal, sample.uid, place, captions)
    try:
        pixels = decode_whole(sample.image, _SIDE)
    except SampleProblem as problem:
        return Shown(ordinal, sample.uid, place, captions, problem=problem.reason.value)
    encoded = simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), quality=_QUALITY, colorsubsampling="420")
    uri = f"data:image/jpeg;base64,{base64.b64encode(encoded).decode()}"
    return Shown(ordinal, sample.uid, place, captions, uri, pixels.shape[1], pixels.shape[0])


def _cut(caption: str) -> str:
    return caption if len(caption) <= _MAX_CHARACTERS else f"{caption[:_MAX_CHARACTERS]}…"
