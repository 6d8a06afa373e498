"""One sequential read of one shard: a row for every sample and for every place that holds none.

Nothing is decoded that a header answers. What is wrong becomes a row with a reason; only a shard that cannot be opened raises.
"""

from __future__ import annotations

import hashlib
import posixpath
from dataclasses import dataclass
from typing import Any, BinaryIO

import fsspec
import numpy as np
import pyarrow as pa

from mm_core.address import is_local
from mm_core.data.image import MAX_PIXELS, read_header
from mm_core.data.locators import BAD, HAS_IMAGE, HAS_LABEL, HAS_TEXT, LOCATOR, Locators
from mm_core.data.problems import Reason, SampleProblem
from mm_core.data.sample import MAX_MEMBER_BYTES, Group, groups, read_group
from mm_core.data.tar import Hole, walk
from mm_core.errors import DataError

SAMPLE_SCHEMA = pa.schema(
    [
        ("shard", pa.uint32()),
        ("row", pa.uint32()),
        ("uid", pa.string()),
        ("key", pa.string()),
        ("start", pa.uint64()),
        ("span", pa.uint64()),
        ("members", pa.list_(pa.struct([("suffix", pa.string()), ("offset", pa.uint64()), ("size", pa.uint64())]))),
        ("image_format", pa.string()),
        ("width", pa.uint32()),
        ("height", pa.uint32()),
        ("captions", pa.list_(pa.string())),
        ("caption_characters", pa.uint32()),
        ("label", pa.int32()),
        ("digest", pa.string()),
        ("reason", pa.string()),
    ]
)
"""One row per sample, sorted by (shard, row). `digest`: blake2b-128 of the members' bytes. `reason`: null where usable."""


@dataclass(frozen=True)
class ShardRead:
    """What one read of a shard found. Rows and locators are in the same order."""

    rows: list[dict[str, Any]]
    locators: Locators


def shard_name(url: str) -> str:
    """The part of a shard's address that stays when the folder moves."""
    return posixpath.basename(url)


def scan_shard(url: str, shard: int, need: tuple[str, ...], *, max_pixels: int = MAX_PIXELS) -> ShardRead:
    """Read the shard at `url` once, front to back.

    Args:
        need: the modalities (`image`, `text`) a sample must have; one it lacks is its reason.

    Raises:
        DataError: the shard cannot be opened, or is compressed.
    """
    rows: list[dict[str, Any]] = []
    locators: list[tuple[int, int, int, int, int, int]] = []
    try:
        with fsspec.open(url, "rb", **_buffering(url)) as stream:
            _refuse_compressed(url, stream)
            for entry in groups(walk(stream, max_member_bytes=MAX_MEMBER_BYTES)):
                row, locator = _hole_row(entry) if isinstance(entry, Hole) else _sample_row(entry, url, need, max_pixels)
                rows.append(row | {"shard": shard, "row": len(rows)})
                locators.append((locator[0], locator[1], shard, *locator[2:]))
    except OSError as error:
        raise DataError(f"cannot read shard {url}: {error}") from None
    return ShardRead(rows, np.asarray(locators, dtype=LOCATOR))


def _hole_row(hole: Hole) -> tuple[dict[str, Any], tuple[int, int, int, int, int]]:
    return {"start": hole.start, "span": 0, "reason": hole.reason.value}, (hole.start, 0, 0, BAD, 0)


def _sample_row(group: Group, url: str, need: tuple[str, ...], max_pixels: int) -> tuple[dict[str, Any], tuple[int, int, int, int, int]]:
    span, occurrence = group.end - group.start, min(group.occurrence, 0xFFFF)
    row: dict[str, Any] = {
        "key": group.key.encode("utf-8", "replace").decode(),
        "start": group.start,
        "span": span,
        "members": [{"suffix": s, "offset": m.offset, "size": m.size} for s, m in group.members.items()],
        "digest": _digest(group),
    }
    flags = 0
    try:
        if span > np.iinfo(np.uint32).max:
            raise SampleProblem(Reason.MEMBER_TOO_LARGE, f"{span} bytes")
        sample = read_group(group, shard_name(url))
        flags = HAS_IMAGE * (sample.image is not None) | HAS_TEXT * bool(sample.captions) | HAS_LABEL * (sample.label is not None)
        row |= {
            "uid": sample.uid,
            "captions": sample.captions,
            "caption_characters": len(sample.captions[0]) if sample.captions else 0,
            "label": sample.label,
        }
        if sample.image is not None:
            header = read_header(sample.image, max_pixels=max_pixels)
            row |= {"image_format": header.format, "width": header.width, "height": header.height}
        if "image" in need and sample.image is None:
            raise SampleProblem(Reason.NO_IMAGE)
        if "text" in need and not sample.captions:
            raise SampleProblem(Reason.NO_TEXT)
    except SampleProblem as problem:
        flags |= BAD
        row["reason"] = problem.reason.value
    return row, (group.start, min(span, 0xFFFFFFFF), group.check, flags, occurrence)


def _digest(group: Group) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for suffix, member in group.members.items():
        digest.update(f"{suffix} {member.size}\0".encode())
        digest.update(member.data or b"")
    return digest.hexdigest()


def _refuse_compressed(url: str, stream: BinaryIO) -> None:
    magic = stream.read(6)
    stream.seek(0)
    for name, signature in (("gzip", b"\x1f\x8b"), ("bzip2", b"BZh"), ("xz", b"\xfd7zXZ\0"), ("zstd", b"\x28\xb5\x2f\xfd")):
        if magic.startswith(signature):
            raise DataError(f"shard {url} is compressed with {name}; samples in it cannot be addressed: unpack it to a plain .tar")


def _buffering(url: str) -> dict[str, Any]:
    """Remote stores: read ahead in large blocks, as the shard is read once from front to back."""
    return {"block_size": 8 << 20, "cache_type": "readahead"} if not is_local(url) else {}


def usable(flags: np.ndarray[Any, np.dtype[np.uint16]], need: tuple[str, ...]) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Which samples have every modality of `need` and no reason against them."""
    wanted = (HAS_IMAGE if "image" in need else 0) | (HAS_TEXT if "text" in need else 0)
    return ((flags & BAD) == 0) & ((flags & wanted) == wanted)


def to_table(rows: list[dict[str, Any]]) -> pa.Table:
    """Rows as an Arrow table of the published schema."""
    return pa.Table.from_pylist(rows, schema=SAMPLE_SCHEMA)
