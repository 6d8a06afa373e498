"""An index: an immutable snapshot of what a set of shards holds.

INDEX/index.json       format, fingerprint, counts
INDEX/shards.parquet   one row per shard: url, bytes, mtime or etag, rows, file
INDEX/samples/*.parquet   one row per sample, for people and filters (columns: `scan.SAMPLE_SCHEMA`)
INDEX/locators.npy     24 bytes per sample, for machines
INDEX/digests.npy      16 bytes per sample, for reads that are verified
INDEX/ledgers/NAME/    decisions (`ledger.py`)
INDEX/scores/NAME/     what was measured of the samples (`scores.py`)
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pydantic import Field

from mm_core.address import absolute
from mm_core.config import Config
from mm_core.data.locators import Locators, open_mapped
from mm_core.data.scan import SAMPLE_SCHEMA, shard_name
from mm_core.errors import DataError
from mm_core.store import open_file, open_store, reaching

FORMAT = 2
SHARD_SCHEMA = pa.schema(
    [
        ("shard", pa.uint32()),
        ("url", pa.string()),
        ("bytes", pa.uint64()),
        ("version", pa.string()),
        ("rows", pa.uint64()),
        ("samples", pa.uint64()),
        ("file", pa.string()),
    ]
)
"""`version`: etag, or time of the last write. `samples`: usable rows. `file`: of `samples/`, which holds the shard's rows."""


class IndexSummary(Config):
    """index.json."""

    format: int = FORMAT
    fingerprint: str = Field(description="Of the shards' names and contents; the same shards give the same, wherever they lie.")
    shards: int
    samples: int = Field(description="Usable samples.")
    rows: int = Field(description="All rows, those with a reason against them included.")
    bytes: int
    need: tuple[str, ...] = Field(description="The modalities a usable sample has.")
    max_pixels: int = Field(description="Larger pictures are counted as `too_many_pixels`.")
    bad: dict[str, int] = Field(description="Rows that are not usable, by reason.")
    cut: dict[str, int] = Field(default_factory=dict, description="Shards that end too early, a hundred at most: from which byte on.")
    duplicate_uids: int = 0


@dataclass(frozen=True)
class Index:
    """An opened index. Cheap to open: locators are mapped, tables are read when asked for."""

    url: str
    summary: IndexSummary

    @classmethod
    def open(cls, url: str) -> Index:
        """
        Raises:
            DataError: there is no index at `url`, or its format is another.
        """
        url = absolute(url.rstrip("/"))
        try:
            with reaching(url), open_file(f"{url}/index.json", "rt") as file:
                values = json.load(file)
        except (FileNotFoundError, NotADirectoryError, ValueError):
            raise DataError(f"no index at {url}: make one with `mm data index SHARDS --out {url}`") from None
        except OSError as error:
            raise DataError(f"cannot read the index at {url}: {error}") from None
        if values.get("format") != FORMAT:
            raise DataError(f"the index at {url} has format {values.get('format')!r}, this mm reads {FORMAT}: index the shards again")
        return cls(url, IndexSummary.model_validate(values))

    @cached_property
    def locators(self) -> Locators:
        return open_mapped(f"{self.url}/locators.npy", self.summary.fingerprint)

    @cached_property
    def digests(self) -> NDArray[np.void]:
        """What `content_digest` gave of each row, in binary.

        Raises:
            DataError: the index was made before there were digests in it.
        """
        try:
            return open_mapped(f"{self.url}/digests.npy", self.summary.fingerprint)
        except FileNotFoundError:
            raise DataError(
                f"the index at {self.url} has no digests.npy, which --verify and mm data export compare with: index the shards again"
            ) from None

    @cached_property
    def shards(self) -> pa.Table:
        with open_file(f"{self.url}/shards.parquet", "rb") as file:
            return pq.read_table(file)

    @cached_property
    def shard_urls(self) -> list[str]:
        return [str(url) for url in self.shards["url"].to_pylist()]

    @cached_property
    def shard_names(self) -> list[str]:
        return [shard_name(url) for url in self.shard_urls]

    def samples(self, columns: list[str]) -> Iterator[pa.RecordBatch]:
        """The sample table, in order, a batch at a time."""
        fs, path = open_store(f"{self.url}/samples")
        files = [f"{path}/{name}" for name, _, _ in self._files]
        yield from pads.dataset(files, filesystem=fs, format="parquet").to_batches(columns=columns, fragment_readahead=1)

    def rows(self, first: int, last: int, columns: list[str]) -> pa.Table:
        """Rows `first` up to `last` of the sample table; of the files only the row groups that hold them are read."""
        found = []
        for name, start, end in self._files:
            if start < last and first < end:
                with open_file(f"{self.url}/samples/{name}", "rb") as file:
                    found.append(
                        _rows_of_file(pq.ParquetFile(file, pre_buffer=True), max(0, first - start), min(end, last) - start, columns)
                    )
        return pa.concat_tables(found) if found else SAMPLE_SCHEMA.empty_table().select(columns)

    @cached_property
    def _files(self) -> list[tuple[str, int, int]]:
        """Of `samples/`, in order: name, first row, and the first after it."""
        ends: dict[str, int] = {}
        total = 0
        for name, rows in zip(self.shards["file"].to_pylist(), self.shards["rows"].to_pylist(), strict=True):
            total += rows
            ends[name] = total
        return [(name, start, end) for (name, end), start in zip(ends.items(), [0, *ends.values()], strict=False)]


def _rows_of_file(file: pq.ParquetFile, first: int, last: int, columns: list[str]) -> pa.Table:
    groups, before, skipped = [], 0, 0
    for group in range(file.metadata.num_row_groups):
        end = before + file.metadata.row_group(group).num_rows
        if end <= first:
            skipped = end
        elif before < last:
            groups.append(group)
        before = end
    return file.read_row_groups(groups, columns=columns).slice(first - skipped, last - first)


def changed_shard(url: str, size: int, version: str) -> str | None:
    """Why a shard is not what an index recorded, or None."""
    try:
        size_now, version_now = shard_version(url)
    except FileNotFoundError:
        return "is gone"
    except OSError as error:
        return f"cannot be reached: {error}"
    if size_now != size:
        return f"had {size:,} bytes when it was indexed, has {size_now:,} now"
    return f"was written again since it was indexed ({version} → {version_now})" if version_now != version else None


def shard_version(url: str) -> tuple[int, str]:
    """Size in bytes, and the store's etag or else the time of the last write."""
    fs, path = open_store(url)
    with reaching(url):
        info = fs.info(path)
    version = info.get("ETag") or info.get("etag") or info.get("mtime") or info.get("LastModified") or ""
    return int(info["size"]), str(version)
