"""What an export holds and how it is laid out: which sample stands where, which shard ends where, and what of a sample is written.

All of it is a pure function of index, ledgers and settings: whoever writes a shard, it has the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from webdataset.writer import TarWriter

from mm_core.data.ledger import Kept
from mm_core.data.locators import Locators
from mm_core.data.permutation import U64, mix, permute
from mm_core.data.personal import PersonalKind, mask_personal
from mm_core.data.problems import Reason, SampleProblem
from mm_core.data.sample import CAPTION_KEYS, Group, metadata_of, uid_of

_SHUFFLE = 7
"""Keeps the key of an export's order apart from those of training."""
_AT_ONCE = 1 << 20
_KEY_DIGITS = 9
END_BYTES = 1024 + 20 * 512
"""Of a tar, at most: its end mark, and what fills its last record."""


@dataclass(frozen=True)
class ExportOrder:
    """Which sample stands at each place."""

    kept: Kept
    repeat: bool = False
    """A sample as often as the first epoch of a training run with this seed reads it; else each once, whatever its weight."""
    shuffle: bool = False
    """Else they stand as in the index."""
    seed: int = 0

    def __len__(self) -> int:
        return len(self.kept) if self.repeat else len(self.kept.ordinals)

    def at(self, places: U64) -> U64:
        """Ordinals in the index."""
        if self.shuffle:
            places = permute(places, len(self), mix(self.seed, _SHUFFLE))
        if self.repeat:
            return self.kept.at(places, np.zeros_like(places), self.seed)
        return np.asarray(self.kept.ordinals[places.astype(np.int64)])

    def between(self, first: int, last: int) -> U64:
        return self.at(np.arange(first, last, dtype=np.uint64))


def sample_bytes(order: ExportOrder, locators: Locators) -> NDArray[np.uint32]:
    """What the sample at each place takes in its shard, headers included."""
    sizes = np.empty(len(order), dtype=np.uint32)
    for first in range(0, len(order), _AT_ONCE):
        last = min(first + _AT_ONCE, len(order))
        sizes[first:last] = locators["span"][order.between(first, last).astype(np.int64)]
    return sizes


def shard_ends(sizes: NDArray[Any], *, max_bytes: int | None, max_samples: int | None) -> list[int]:
    """Where each shard ends: as many samples as come to `max_bytes` at most and are not more than `max_samples`, one at least."""
    totals = np.cumsum(sizes, dtype=np.uint64)
    ends, first, before = list[int](), 0, 0
    while first < len(sizes):
        last = len(sizes) if max_samples is None else min(len(sizes), first + max_samples)
        if max_bytes is not None:
            last = min(last, max(first + 1, int(np.searchsorted(totals, np.uint64(before + max_bytes), side="right"))))
        ends.append(last)
        first, before = last, int(totals[last - 1])
    return ends


def blocks(sizes: NDArray[Any], max_bytes: int) -> Iterator[tuple[int, int]]:
    """First and last of samples that are read together."""
    ends = shard_ends(sizes, max_bytes=max_bytes, max_samples=None)
    yield from zip([0, *ends], ends, strict=False)


class ShardFile:
    """A shard being written to `file`, by webdataset's own writer. Nothing in it tells when or by whom it was written."""

    def __init__(self, file: BinaryIO) -> None:
        self._tar = TarWriter(file, encoder=False, user="mm", group="mm", mtime=0, keep_meta=True)

    def write(self, place: int, members: Sequence[tuple[str, bytes]]) -> None:
        """A sample, under a key that is its place in the export: keys of several shards may be the same, and webdataset ends a key at
        its first dot. Member by member, as the writer would sort them."""
        for suffix, data in members:
            self._tar.write({"__key__": f"{place:0{_KEY_DIGITS}d}", suffix: data})

    def close(self) -> None:
        self._tar.close()


def members_of(group: Group, shard_name: str, mask: Sequence[PersonalKind]) -> list[tuple[str, bytes]]:
    """What is written of a sample: its members as they are, in their order; but captions are masked as training would read them, and
    JSON that is an object without a uid, or missing, gets the uid that the index derived, so that it stays when the shard changes.

    Raises:
        SampleProblem: a member that is too large to be held, or has a name that webdataset cannot write.
    """
    members = {}
    for suffix, member in group.members.items():
        if member.data is None:
            raise SampleProblem(Reason.MEMBER_TOO_LARGE, f"{member.name!r} has {member.size} bytes")
        if suffix.startswith("__"):
            raise SampleProblem(Reason.UNSUPPORTED_MEMBER, f"{member.name!r}: webdataset keeps such suffixes to itself")
        members[suffix] = member.data
    metadata = metadata_of(group)
    if metadata or "json" not in members or json.loads(members["json"]) == {}:
        written = _masked(metadata, mask) | {"uid": uid_of(group, metadata, shard_name)}
        if written != metadata:
            members["json"] = json.dumps(written).encode()
    if mask and "txt" in members:
        text = members["txt"].decode("utf-8", "surrogateescape")
        members["txt"] = mask_personal(text, mask).encode("utf-8", "surrogateescape")
    return list(members.items())


def _masked(metadata: dict[str, Any], mask: Sequence[PersonalKind]) -> dict[str, Any]:
    """Metadata with personal data masked in all that can be read as a caption."""
    return metadata | {key: _masked_value(metadata[key], mask) for key in CAPTION_KEYS if mask and key in metadata}


def _masked_value(value: Any, mask: Sequence[PersonalKind]) -> Any:
    if isinstance(value, list):
        return [_masked_value(item, mask) for item in value]
    return mask_personal(value, mask) if isinstance(value, str) else value
