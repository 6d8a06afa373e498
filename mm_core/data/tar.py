"""Walking a tar front to back: ustar, pax and GNU long names, from a whole shard or from a span of one.

Python's `tarfile` ends without an error at a zeroed header and at a cut on a member boundary; here both are reported, and
reading goes on at the next valid header. Nothing is ever extracted to disk.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from mm_core.data.problems import Reason

BLOCK = 512
_ZERO = bytes(BLOCK)
_SKIP_BYTES = 1 << 20
_MAX_EXTENDED_BYTES = 1 << 20
"""A pax header or GNU long name above 1 MiB is an attack or damage, not a name."""


@dataclass(frozen=True, slots=True)
class Member:
    """A regular file of the tar. `start` is where its first header (a pax one included) begins; offsets are in the shard."""

    name: str
    start: int
    offset: int
    size: int
    data: bytes | None
    """None where the member is larger than the reader's limit."""

    @property
    def end(self) -> int:
        return self.offset + _padded(self.size)


@dataclass(frozen=True, slots=True)
class Hole:
    """A place that holds no member that can be read."""

    reason: Reason
    start: int
    detail: str


def walk(stream: BinaryIO, *, max_member_bytes: int, whole: bool = True) -> Iterator[Member | Hole]:
    """Yield the members of `stream` in order, holes where something is wrong, directories left out.

    Args:
        max_member_bytes: data of larger members is skipped (`Member.data` is None), so memory stays bounded.
        whole: the stream is a whole shard, which ends with tar's zero block; a span of one does not.
    """
    reader = _Reader(stream)
    extended: dict[str, str] = {}
    start: int | None = None
    damaged_at: int | None = None
    ended = False
    while block := reader.read(BLOCK):
        here = reader.offset - len(block)
        if block == _ZERO:
            ended, start, extended = True, None, {}
            continue
        header = _parse(block) if len(block) == BLOCK else None
        if header is None:
            if len(block) < BLOCK:
                break
            damaged_at = here if damaged_at is None else damaged_at
            continue
        if damaged_at is not None:
            yield Hole(Reason.BAD_HEADER, damaged_at, f"no valid header between bytes {damaged_at} and {here}")
            damaged_at = None
        ended = False
        name, size, kind = header
        start = here if start is None else start
        if kind in b"xgLK":
            if size > _MAX_EXTENDED_BYTES:
                yield Hole(Reason.BAD_HEADER, here, f"an extended header of {size} bytes")
                reader.skip(_padded(size))
                start, extended = None, {}
            else:
                extended |= _extension(kind, reader.read(_padded(size))[:size])
            continue
        name, size = extended.get("path", name), int(extended.get("size", size))
        member_start, start, extended = start, None, {}
        for entry in _member(reader, name, member_start, size, kind, max_member_bytes):
            yield entry
            if isinstance(entry, Hole) and entry.reason is Reason.TRUNCATED:
                return
    if damaged_at is not None:
        yield Hole(Reason.BAD_HEADER, damaged_at, f"no valid header after byte {damaged_at}")
    elif whole and not ended:
        yield Hole(Reason.TRUNCATED, reader.offset, f"ends at byte {reader.offset} without tar's end mark")


def _member(reader: _Reader, name: str, start: int, size: int, kind: bytes, max_member_bytes: int) -> Iterator[Member | Hole]:
    if kind == b"5":
        return
    if kind not in (b"0", b"\0", b"7"):
        if kind not in b"123456":
            reader.skip(_padded(size))
        yield Hole(Reason.UNSUPPORTED_MEMBER, start, f"{name!r} is no regular file (tar type {kind!r})")
        return
    offset = reader.offset
    if size > max_member_bytes:
        reader.skip(_padded(size))
        yield Member(name, start, offset, size, None)
        return
    data = reader.read(_padded(size))
    if len(data) < size:
        yield Hole(Reason.TRUNCATED, start, f"{name!r} has {len(data)} of its {size} bytes")
        return
    yield Member(name, start, offset, size, data[:size])


class _Reader:
    """Counts the offset, reads to the requested length even where the stream returns less, skips without seeking."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self.offset = 0

    def read(self, size: int) -> bytes:
        data = self._stream.read(size)
        while 0 < len(data) < size:
            more = self._stream.read(size - len(data))
            if not more:
                break
            data += more
        self.offset += len(data)
        return data

    def skip(self, size: int) -> None:
        while size > 0:
            step = len(self.read(min(size, _SKIP_BYTES)))
            if not step:
                return
            size -= step


def _parse(block: bytes) -> tuple[str, int, bytes] | None:
    """Name, size and type of a header block; None where its checksum does not hold."""
    try:
        checksum = int(block[148:156].split(b"\0", 1)[0].strip() or b"x", 8)
        if checksum != sum(block) - sum(block[148:156]) + 256:
            return None
        size = _number(block[124:136])
    except ValueError:
        return None
    name = block[:100].split(b"\0", 1)[0]
    if block[257:262] == b"ustar" and block[345]:
        prefix = block[345:500].split(b"\0", 1)[0]
        if block[257:265] != b"ustar  \0":
            name = prefix + b"/" + name
    return name.decode("utf-8", "surrogateescape"), size, block[156:157]


def _number(field: bytes) -> int:
    """Octal, or base 256 where GNU tar needs more than 8 GiB."""
    if field[0] & 0x80:
        return int.from_bytes(field[1:], "big")
    return int(field.split(b"\0", 1)[0].strip() or b"0", 8)


def _extension(kind: bytes, data: bytes) -> dict[str, str]:
    """What a pax header or a GNU long name says of the member that follows."""
    if kind == b"L":
        return {"path": data.rstrip(b"\0").decode("utf-8", "surrogateescape")}
    if kind != b"x":
        return {}
    records: dict[str, str] = {}
    while data:
        length_text, _, _ = data.partition(b" ")
        if not length_text.isdigit() or not (0 < int(length_text) <= len(data)):
            break
        length = int(length_text)
        key, _, value = data[len(length_text) + 1 : length - 1].partition(b"=")
        if key in (b"path", b"size") and (key != b"size" or value.isdigit()):
            records[key.decode()] = value.decode("utf-8", "surrogateescape")
        data = data[length:]
    return records


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK
