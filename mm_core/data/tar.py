"""Walking a tar front to back: ustar, pax and GNU long names, from a whole shard or from a span of one.

Python's `tarfile` ends without an error at a zeroed header and at a cut on a member boundary; here both are reported, and
reading goes on at the next valid header. Whatever the bytes are: no exception, one pass, memory for one member and one extended
header. Nothing is ever extracted to disk, so a name is only a name.
"""

from __future__ import annotations

import posixpath
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import BinaryIO, NamedTuple, Protocol

from mm_core.data.problems import Reason

BLOCK = 512
_ZERO = bytes(BLOCK)
_RECORD = 20 * BLOCK
"""Tars are padded to whole records, so a second tar that was appended to a first one begins at a multiple of it."""
_MAX_PADDING_BLOCKS = 2048
"""1 MiB: the largest record in use. More zeros than that are a shard that was not copied to its end."""
_SKIP_BYTES = 1 << 20
_MAX_EXTENDED_BYTES = 1 << 20
"""A pax header or GNU long name above 1 MiB is an attack or damage, not a name."""
_SIZE_DIGITS = 18
"""More digits do not fit 64 bits; Python refuses to convert thousands of them."""
_WITHOUT_DATA = b"123456"
"""Links, devices, directories and fifos: their size field counts no bytes of the tar."""


class Stream(Protocol):
    def read(self, size: int, /) -> bytes: ...


class Member(NamedTuple):
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


class _Header(NamedTuple):
    name: str
    size: int
    kind: bytes
    extended_sparse: bool


@dataclass(slots=True)
class _Extended:
    """What pax headers and GNU long names say of the member that follows."""

    start: int
    records: dict[str, str] = field(default_factory=dict)
    fault: str = ""
    """Why they cannot be used; the member's name is then unknown."""


_NOTHING = _Extended(0)
"""Of a member without extended headers."""


def walk(stream: BinaryIO | Stream, *, max_member_bytes: int, whole: bool = True) -> Iterator[Member | Hole]:
    """Yield the members of `stream` in order, holes where something is wrong, directories left out.

    Args:
        max_member_bytes: data of larger members is skipped (`Member.data` is None), so memory stays bounded.
        whole: the stream is a whole shard, which ends with tar's zero block; a span of one does not.
    """
    reader = _Reader(stream)
    extended: _Extended | None = None
    damaged_at: int | None = None
    zeros = 0
    while block := reader.read(BLOCK):
        here = reader.offset - len(block)
        if block == _ZERO:
            zeros += 1
            if extended is not None:
                yield Hole(Reason.BAD_HEADER, extended.start, "an extended header that no member follows")
                extended = None
            continue
        if len(block) < BLOCK:
            break
        header = _parse(block)
        if header is None:
            if damaged_at is None:
                damaged_at = here if extended is None else extended.start
            extended = None  # it was of the member whose header this should have been
            zeros = 0
            continue
        if damaged_at is not None or (zeros and not _is_seam(here, zeros)):
            begin = here - zeros * BLOCK if damaged_at is None else damaged_at
            yield Hole(Reason.BAD_HEADER, begin, f"no valid header between bytes {begin} and {here}")
        damaged_at, zeros = None, 0
        if header.kind in b"xXgLK":
            extended = extended or _Extended(here)
            _extend(extended, header, reader)
            continue
        entry = _entry(reader, header, extended or _NOTHING, here if extended is None else extended.start, max_member_bytes)
        extended = None
        if entry is not None:
            yield entry
            if isinstance(entry, Hole) and entry.reason is Reason.TRUNCATED:
                return
    if damaged_at is not None:
        yield Hole(Reason.BAD_HEADER, damaged_at, f"no valid header after byte {damaged_at}")
    elif whole and not 0 < zeros <= _MAX_PADDING_BLOCKS:
        ends = f"with {zeros * BLOCK} bytes of zeros, more than pad any tar" if zeros else "without tar's end mark"
        yield Hole(Reason.TRUNCATED, reader.offset, f"ends at byte {reader.offset} {ends}")


def is_header(block: bytes) -> bool:
    """Whether a member begins with this block."""
    return len(block) == BLOCK and _parse(block) is not None


def _is_seam(here: int, zeros: int) -> bool:
    """The zeros before a header are the end mark of a tar to which another was appended, not a header that was lost."""
    return 2 <= zeros <= _MAX_PADDING_BLOCKS and here % _RECORD == 0


def _entry(reader: _Reader, header: _Header, extended: _Extended, start: int, max_member_bytes: int) -> Member | Hole | None:
    """What one header and its data are; None for a folder at the top, which says nothing."""
    records, kind = extended.records, header.kind
    name, size = records.get("path", header.name), int(records.get("size", header.size))
    if extended.fault or "sparse" in records or (kind not in (b"0", b"\0", b"7") and kind not in _WITHOUT_DATA):
        more = header.extended_sparse
        while more:  # GNU's sparse maps go on in blocks of their own
            block = reader.read(BLOCK)
            more = len(block) == BLOCK and block[504] != 0
        reader.skip(_padded(size))
        if extended.fault:
            return Hole(Reason.BAD_HEADER, start, extended.fault)
        return Hole(Reason.UNSUPPORTED_MEMBER, start, f"{name!r} is no regular file (tar type {kind!r})")
    if kind == b"5" or (name.endswith("/") and size == 0):
        nested = "/" in posixpath.normpath(name).strip("/")
        return Hole(Reason.UNSUPPORTED_MEMBER, start, f"{name!r} is a folder in a folder") if nested else None
    if kind in _WITHOUT_DATA:
        return Hole(Reason.UNSUPPORTED_MEMBER, start, f"{name!r} is no regular file (tar type {kind!r})")
    offset, data = reader.offset, None
    if size <= max_member_bytes:
        data = reader.read(_padded(size))
        present = len(data)
        data = data if present == size else data[:size]
    else:
        present = reader.skip(_padded(size))
    if present < _padded(size):  # cut in the padding, too: the span of a sample is what ranged reads ask for
        return Hole(Reason.TRUNCATED, start, f"{name!r} has {present} of its {_padded(size)} bytes")
    return Member(name, start, offset, size, data)


class _Reader:
    """Counts the offset, reads to the requested length even where the stream returns less, skips without seeking."""

    def __init__(self, stream: BinaryIO | Stream) -> None:
        self._read = stream.read
        self.offset = 0

    def read(self, size: int) -> bytes:
        data = self._read(size)
        if len(data) < size and data:
            pieces, missing = [data], size - len(data)
            while missing and (more := self._read(missing)):
                pieces.append(more)
                missing -= len(more)
            data = b"".join(pieces)
        self.offset += len(data)
        return data

    def skip(self, size: int) -> int:
        """How many bytes there were to skip."""
        left = size
        while left > 0 and (step := len(self.read(min(left, _SKIP_BYTES)))):
            left -= step
        return size - left


def _parse(block: bytes) -> _Header | None:
    """A header block; None where its checksum does not hold or its size is no number."""
    checksum, size = _number(block[148:156]), _number(block[124:136])
    if checksum is None or size is None or (checksum != (total := _checksum(block)) and checksum != _signed_checksum(block, total)):
        return None
    name = block[:100].partition(b"\0")[0]
    if block[345] and block[257:262] == b"ustar" and block[257:265] != b"ustar  \0":
        name = block[345:500].partition(b"\0")[0] + b"/" + name
    kind = block[156:157]
    return _Header(name.decode("utf-8", "surrogateescape"), size, kind, kind == b"S" and block[482] != 0)


def _checksum(block: bytes) -> int:
    """The sum of a header's bytes, its checksum field taken as spaces.

    The low half of Adler-32 is 1 + the sum modulo 65,521, which 256 bytes cannot reach: ten times as fast as `sum`.
    """
    return (zlib.adler32(block[:148]) & 0xFFFF) + (zlib.adler32(block[156:330]) & 0xFFFF) + (zlib.adler32(block[330:]) & 0xFFFF) - 3 + 256


def _signed_checksum(block: bytes, total: int) -> int:
    """The sum as some old tars make it, of signed bytes."""
    return total - 256 * sum(byte > 127 for byte in block[:148] + block[156:])


def _number(text: bytes) -> int | None:
    """Octal digits, or base 256 where GNU tar needs more than 8 GiB; None for anything else, a negative number included."""
    digits = text.rstrip(b" \0")
    if not digits.isdigit():
        if text[0] & 0x80:
            value = int.from_bytes(text[1:], "big")
            return value if text[0] == 0x80 and value < 1 << 63 else None
        digits = text.partition(b"\0")[0].strip()
        if not digits.isdigit():
            return None if digits else 0
    try:
        return int(digits, 8)
    except ValueError:
        return None


def _extend(extended: _Extended, header: _Header, reader: _Reader) -> None:
    """Read a pax header or a GNU long name; what it says of links and of the whole tar is passed over."""
    if header.size > _MAX_EXTENDED_BYTES:
        reader.skip(_padded(header.size))
        extended.fault = f"an extended header of {header.size} bytes, above {_MAX_EXTENDED_BYTES}"
        return
    data = reader.read(_padded(header.size))[: header.size]
    if header.kind == b"L":
        extended.records["path"] = data.partition(b"\0")[0].decode("utf-8", "surrogateescape")
    elif header.kind in b"xX":
        extended.fault = extended.fault or _pax_records(data, extended.records)


def _pax_records(data: bytes, records: dict[str, str]) -> str:
    """Add `path`, `size` and whether the member is sparse to `records`; what is wrong with the header, or nothing."""
    at = 0
    while at < len(data):
        space = data.find(b" ", at, at + 8)
        length = int(data[at:space]) if space > at and data[at:space].isdigit() else 0
        if not space - at + 3 <= length <= len(data) - at:
            return f"a pax header with no record at its byte {at}"
        key, equals, value = data[space + 1 : at + length - 1].partition(b"=")
        if not equals:
            return f"a pax header with no value at its byte {at}"
        if key == b"path":
            records["path"] = value.decode("utf-8", "surrogateescape")
        elif key == b"size":
            if not value.isdigit() or len(value) > _SIZE_DIGITS:
                return f"a pax header with a size of {value[:20]!r}"
            records["size"] = value.decode()
        elif key.startswith(b"GNU.sparse."):
            records["sparse"] = ""
        at += length
    return ""


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK
