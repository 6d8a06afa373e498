"""Texts that lie in JSON Lines or Parquet files, as samples: each line or row is a group with one member, its JSON, so that whatever reads
shards reads them too.

A line is addressed by its bytes. A row has none of its own: it is addressed by its number, and its group of rows is read and kept.
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mm_core.data.problems import Reason, SampleProblem
from mm_core.data.sample import CAPTION_KEYS, Group, content_digest
from mm_core.data.tar import Hole, Member
from mm_core.errors import DataError
from mm_core.store import open_store

LINES, TABLE = ".jsonl", ".parquet"
TEXT_SUFFIXES = (LINES, TABLE)
_MAX_LINE = 4 << 20
_CHUNK = 1 << 20
_COLUMNS = (*CAPTION_KEYS, "uid")
_OPEN_TABLES, _HELD_GROUPS = 8, 16


class Bytes(Protocol):
    def read(self, size: int, /) -> bytes: ...


@dataclass
class TextRow(Group):
    """A line or a row. Its key is a digest of what it says, so equal texts are seen to be equal."""

    first: int = 0
    last: int = 0
    """Bytes of the file, or the row's number and the next."""

    @property
    def start(self) -> int:
        return self.first

    @property
    def end(self) -> int:
        return self.last


def is_texts(url: str) -> bool:
    return url.endswith(TEXT_SUFFIXES)


def row_of(data: bytes, first: int = 0, last: int = 0) -> TextRow:
    """The group of a line's or row's JSON."""
    key = hashlib.blake2b(data, digest_size=16).hexdigest()
    return TextRow(key, {"json": Member(f"{key}.json", first, first, len(data), data)}, first=first, last=last)


def row_of_span(data: bytes, name: str, *, check: int, digest: str | None = None) -> TextRow:
    """What `group_of_span` is for members of a tar.

    Raises:
        SampleProblem: CHANGED where it is not what was indexed.
    """
    row = row_of(data)
    if row.check != check or (digest is not None and content_digest(row) != digest):
        raise SampleProblem(Reason.CHANGED, f"in {name}: the text is not the one that was indexed")
    return row


def lines(stream: Bytes) -> Iterator[TextRow | Hole]:
    """The lines of a JSONL file, in order; empty ones are passed over, and of more than 4 MB is no text."""
    rest, start = b"", 0
    while chunk := stream.read(_CHUNK):
        *whole, rest = (rest + chunk).split(b"\n")
        for line in whole:
            yield from _line(line, start)
            start += len(line) + 1
        if len(rest) > _MAX_LINE:
            length, rest = _passed_over(stream, len(rest))
            yield _too_long(length, start)
            start += length + 1
    for line in rest.split(b"\n"):
        yield from _line(line, start)
        start += len(line) + 1


def _passed_over(stream: Bytes, length: int) -> tuple[int, bytes]:
    """How long a line is of which `length` bytes are read, and what follows it; it is not kept."""
    while chunk := stream.read(_CHUNK):
        head, end, rest = chunk.partition(b"\n")
        length += len(head)
        if end:
            return length, rest
    return length, b""


def _too_long(length: int, start: int) -> Hole:
    return Hole(Reason.MEMBER_TOO_LARGE, start, f"a line of {length:,} bytes")


def _line(line: bytes, start: int) -> Iterator[TextRow | Hole]:
    if len(line) > _MAX_LINE:
        yield _too_long(len(line), start)
    elif line.strip():
        yield row_of(line, start, start + len(line))


def table_rows(url: str) -> Iterator[TextRow]:
    """The rows of a Parquet file, in order.

    Raises:
        DataError: no Parquet, or none of its columns is one that texts are read from.
    """
    table, number = _open_table(url), 0
    for batch in table.iter_batches(columns=_text_columns(table, url)):
        for data in _rows_as_json(batch):
            yield row_of(data, number, number + 1)
            number += 1


class TableReader:
    """Rows of Parquet files by number. Keeps some files open and some groups of rows in memory: neighbouring rows are one read."""

    def __init__(self) -> None:
        self._tables: OrderedDict[str, _Table] = OrderedDict()
        self._groups: OrderedDict[tuple[str, int], list[bytes]] = OrderedDict()

    def read(self, places: Sequence[tuple[str, int]]) -> list[bytes | SampleProblem]:
        """The JSON of each (file, row); READ_FAILED in the place of one that cannot be read."""
        found: list[bytes | SampleProblem] = []
        for url, number in places:
            try:
                found.append(self._row(url, number))
            except (OSError, pa.ArrowException, DataError, IndexError) as error:
                found.append(SampleProblem(Reason.READ_FAILED, f"{url} row {number}: {error}"))
        return found

    def forget(self, url: str) -> None:
        """Open the file anew at the next read."""
        self._tables.pop(url, None)
        for key in [key for key in self._groups if key[0] == url]:
            del self._groups[key]

    def _row(self, url: str, number: int) -> bytes:
        table = self._tables.get(url) or _Table(url, _open_table(url))
        _keep(self._tables, url, table, _OPEN_TABLES)
        group = table.group_of(number)
        rows = self._groups.get((url, group))
        if rows is None:
            rows = list(_rows_as_json(table.file.read_row_group(group, columns=table.columns)))
        _keep(self._groups, (url, group), rows, _HELD_GROUPS)
        return rows[number - int(table.ends[group])]


@dataclass
class _Table:
    url: str
    file: pq.ParquetFile

    @cached_property
    def columns(self) -> list[str]:
        return _text_columns(self.file, self.url)

    @cached_property
    def ends(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """The first row of each group, and one after the last."""
        metadata = self.file.metadata
        return np.cumsum([0, *(metadata.row_group(group).num_rows for group in range(metadata.num_row_groups))])

    def group_of(self, number: int) -> int:
        group = int(np.searchsorted(self.ends, number, side="right")) - 1
        if not 0 <= group < len(self.ends) - 1:
            raise IndexError(f"the file has {self.ends[-1]:,} rows")
        return group


def _keep(held: OrderedDict[Any, Any], key: object, value: object, at_most: int) -> None:
    held[key] = value
    held.move_to_end(key)
    if len(held) > at_most:
        held.popitem(last=False)


def _open_table(url: str) -> pq.ParquetFile:
    fs, path = open_store(url)
    try:
        return pq.ParquetFile(fs.open(path, "rb"), pre_buffer=True)
    except pa.ArrowInvalid as error:
        raise DataError(f"cannot read {url}: {error}") from None


def _text_columns(table: pq.ParquetFile, url: str) -> list[str]:
    there = [name for name in table.schema_arrow.names if name in _COLUMNS]
    if not set(there) & set(CAPTION_KEYS):
        raise DataError(
            f"{url} has none of the columns {', '.join(CAPTION_KEYS)}, which texts are read from: rename the one that holds them"
        )
    return there


def _rows_as_json(rows: pa.RecordBatch | pa.Table) -> Iterator[bytes]:
    for row in rows.to_pylist():
        yield json.dumps(row, ensure_ascii=False, default=str).encode("utf-8", "surrogatepass")
