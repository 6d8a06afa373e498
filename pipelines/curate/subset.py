"""`mm data export --format uids` and `mm data import`: what is kept, as a list of uids and back.

On one core and chunk by chunk, with 16 bytes a uid in memory: looking up a uid takes less than reading it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mm_core.address import absolute
from mm_core.data.export import ExportOrder
from mm_core.data.index import Index
from mm_core.data.ledger import Ledger, LedgerSummary
from mm_core.data.scan import usable
from mm_core.data.side_table import SideTable
from mm_core.data.split import write_ledger
from mm_core.data.uids import Keys, UidList, subset_array, uid_keys
from mm_core.errors import ConfigError, DataError
from mm_core.store import open_store, reaching, writing_whole

Progress = Callable[[int], None]
"""Called with the number of rows of the index looked at since the last call."""


@dataclass(frozen=True)
class Imported:
    """What came of a list."""

    ledger: LedgerSummary
    listed: int
    """Uids, each counted once."""
    absent: int
    """Of them, those that no usable sample of the index has."""
    repeated: int
    """Of them, those listed more than once: their samples weigh as often as they are listed."""


def export_uids(index: Index, order: ExportOrder, out: str, *, parquet: bool, on_progress: Progress = lambda rows: None) -> int:
    """Write the uids of an order's samples to the file `out`: as DataComp's subset file, sorted, each once (with `order.repeat` as often as
    it is drawn: DataComp's resharder writes it as often); or as a Parquet table with a column `uid`, in the index's order.

    Returns:
        How many.

    Raises:
        ConfigError: `out` is there, or a uid is no 32 hexadecimal digits and a subset file cannot hold it.
    """
    out = absolute(out)
    fs, path = open_store(out)
    try:
        with reaching(out):
            if fs.exists(path):
                raise ConfigError(f"{out} exists: give another --out, or remove it first")
        with reaching(out), writing_whole(out, out.rpartition("/")[0]) as file:
            if not parquet:
                array = subset_array(_keys(index, order, on_progress))
                np.save(file, array)
                return len(array)
            rows = 0
            with pq.ParquetWriter(file, pa.schema([("uid", pa.string())]), compression="zstd") as writer:
                for uids in _kept_uids(index, order, on_progress):
                    writer.write_table(pa.table({"uid": uids}))
                    rows += len(uids)
            return rows
    except OSError as error:
        raise DataError(f"cannot write {out}: {error}") from None


def import_uids(index: Index, url: str, name: str, *, replace_ledger: bool = False, on_progress: Progress = lambda rows: None) -> Imported:
    """Write the ledger `name`, which keeps what the file at `url` lists (`UidList.read`). Of the same list it stays as it is.

    Raises:
        ConfigError: another ledger of this name is there and is not to be replaced.
        DataError: the file cannot be read, or lists no uid of the index.
    """
    uids = UidList.read(absolute(url))
    made_by = f"uids {uids.fingerprint}"
    there = Ledger(index, name).claim(made_by, replace=replace_ledger)
    weights, seen = np.zeros(index.summary.rows, dtype=np.float32), np.zeros(len(uids.keys), dtype=bool)
    for first, last, texts in _uids(index):
        good = usable(index.locators["flags"][first:last], index.summary.need)
        places = uids.find(uid_keys(texts)[0])
        places[~good] = -1
        weights[first:last] = np.where(places < 0, 0, uids.times[places])
        seen[places[places >= 0]] = True
        on_progress(last - first)
    if not seen.any():
        raise DataError(f"not one of the {len(seen):,} uids in {url} is of a usable sample of {index.url}: is it a list of this data?")
    summary = there or write_ledger(index, name, rule=made_by, repeat=weights, reason="not_listed")
    return Imported(summary, len(seen), int((~seen).sum()), int((uids.times > 1).sum()))


def _keys(index: Index, order: ExportOrder, on_progress: Progress) -> Keys:
    found = []
    for uids in _kept_uids(index, order, on_progress):
        keys, exact = uid_keys(uids)
        if not exact.all():
            odd = uids.filter(pa.array(~exact))[0].as_py()
            raise ConfigError(
                f"the uid {odd!r} of {index.url} is not 32 hexadecimal digits, which is all that a DataComp subset file holds:"
                " --format parquet writes any uid"
            )
        found.append(keys)
    keys = np.concatenate(found)
    return keys if order.repeat else np.unique(keys)


def _kept_uids(index: Index, order: ExportOrder, on_progress: Progress) -> Iterator[pa.ChunkedArray]:
    """Of the order's samples, in the index's order, chunk by chunk."""
    ordinals = np.sort(order.between(0, len(order)))
    for first, last, uids in _uids(index):
        inside = ordinals[np.searchsorted(ordinals, first) : np.searchsorted(ordinals, last)]
        yield uids.take(pa.array(inside - np.uint64(first)))
        on_progress(last - first)


def _uids(index: Index) -> Iterator[tuple[int, int, pa.ChunkedArray]]:
    """First row, the first after the last, and the uids of each chunk of an index."""
    chunks = SideTable(index.url, index.summary.rows)
    for chunk in range(len(chunks)):
        first, last = chunks.bounds(chunk)
        yield first, last, index.rows(first, last, ["uid"])["uid"]
