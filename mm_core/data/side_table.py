"""Columns that stand beside an index, in its order: decisions of a ledger, scores.

FOLDER/00000.parquet, 00001.parquet, …: 262,144 rows each, so that any number of tasks write and read them independently, and what is
written does not depend on how many did.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from mm_core.errors import DataError
from mm_core.store import open_file, open_store, reaching, write_whole

CHUNK_ROWS = 1 << 18


@dataclass(frozen=True)
class SideTable:
    """A table of `rows` rows in the folder `url`."""

    url: str
    rows: int

    def __len__(self) -> int:
        """Chunks."""
        return -(-self.rows // CHUNK_ROWS)

    def bounds(self, chunk: int) -> tuple[int, int]:
        """First row of a chunk, and the first after it."""
        return chunk * CHUNK_ROWS, min(self.rows, (chunk + 1) * CHUNK_ROWS)

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

    def tables(self, columns: list[str] | None = None) -> Iterator[pa.Table]:
        """Chunk by chunk."""
        for chunk in range(len(self)):
            yield self.read(chunk, columns)

    def _file(self, chunk: int) -> str:
        return f"{self.url}/{chunk:05d}.parquet"
