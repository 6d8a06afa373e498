"""Columns that stand beside an index, in its order: decisions of a ledger, scores.

FOLDER/00000.parquet, 00001.parquet, …: 262,144 rows each, so that any number of tasks write and read them independently, and what is
written does not depend on how many did. What is dear to make, or wide, has fewer: 8,192 rows are minutes of a model, and a file of vectors
of 512 float16 has 8 MB.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from mm_core.errors import ConfigError, DataError
from mm_core.store import open_file, open_store, reaching, write_whole

CHUNK_ROWS = 1 << 18
SMALL_CHUNK_ROWS = 1 << 13
_SUFFIX = ".parquet"
_NAME = re.compile(r"\w[\w.\-]{0,99}")


def check_name(name: str) -> str:
    """`name`, where it can be that of a folder beside an index.

    Raises:
        ConfigError: it cannot.
    """
    if not _NAME.fullmatch(name):
        raise ConfigError(f"{name!r} cannot be a name here: use up to 100 letters, digits, '_', '-' or '.', a letter or digit first")
    return name


@dataclass(frozen=True)
class SideTable:
    """A table of `rows` rows in the folder `url`."""

    url: str
    rows: int
    chunk_rows: int | None = None
    """Rows of a file; None for 262,144."""

    def __len__(self) -> int:
        """Chunks."""
        return -(-self.rows // self._chunk_rows)

    @property
    def _chunk_rows(self) -> int:
        return self.chunk_rows or CHUNK_ROWS

    def bounds(self, chunk: int) -> tuple[int, int]:
        """First row of a chunk, and the first after it."""
        return chunk * self._chunk_rows, min(self.rows, (chunk + 1) * self._chunk_rows)

    def write(self, chunk: int, table: pa.Table) -> None:
        """Whole or not at all."""
        first, last = self.bounds(chunk)
        assert table.num_rows == last - first, "a chunk is written whole"
        buffer = pa.BufferOutputStream()
        pq.write_table(table, buffer, compression="zstd", row_group_size=1 << 16)
        with reaching(self.url):
            write_whole(self._file(chunk), buffer.getvalue().to_pybytes())

    def holds(self, chunk: int) -> bool:
        fs, path = open_store(self._file(chunk))
        return bool(fs.exists(path))

    def held(self) -> set[int]:
        """The chunks that are there, by one listing."""
        fs, path = open_store(self.url)
        with reaching(self.url):
            files = fs.ls(path, detail=False) if fs.exists(path) else []
        names = [file.rpartition("/")[2] for file in files]
        return {int(name[: -len(_SUFFIX)]) for name in names if name.endswith(_SUFFIX)}

    def read(self, chunk: int, columns: list[str] | None = None) -> pa.Table:
        """
        Raises:
            DataError: the file is missing, damaged or of another length.
        """
        try:
            with reaching(self.url), open_file(self._file(chunk), "rb") as file:
                table = pq.read_table(file, columns=columns)
        except (OSError, pa.ArrowInvalid) as error:
            raise DataError(f"cannot read {self._file(chunk)}: {error}; make it again") from None
        first, last = self.bounds(chunk)
        if table.num_rows != last - first:
            raise DataError(f"{self._file(chunk)} has {table.num_rows:,} rows, the index {last - first:,} there: make it again")
        return table

    def between(self, first: int, last: int, columns: list[str] | None = None) -> pa.Table:
        """Rows `first` up to `last`, of whichever chunks hold them: tables of one index need not have files of one length.

        Raises:
            DataError: as `read`.
        """
        chunks = range(first // self._chunk_rows, max(first // self._chunk_rows + 1, -(-last // self._chunk_rows)))
        tables = [self.read(chunk, columns) for chunk in chunks]
        return pa.concat_tables(tables).slice(first - self.bounds(chunks[0])[0], last - first)

    def tables(self, columns: list[str] | None = None) -> Iterator[pa.Table]:
        """Chunk by chunk."""
        for chunk in range(len(self)):
            yield self.read(chunk, columns)

    def _file(self, chunk: int) -> str:
        return f"{self.url}/{chunk:05d}{_SUFFIX}"
