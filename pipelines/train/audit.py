"""The audit: which sample every rank consumed at every step, as Parquet, so that "exactly once" can be checked, not believed.

Columns `epoch, step, position, source, rank, uid, attempt, applied`; `source` counts the indexes of a mix from 0. A restart replays steps
since the last checkpoint under a higher attempt: the rows of a step's highest attempt are what trained the model, but for those that are
not `applied`: of a step whose update was left out (`faults`).
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mm_core.errors import CheckpointError
from mm_core.store import make_folder, open_store, reaching, write_whole
from pipelines.batches import StepBatch


class Audit:
    """Collects one rank's rows; `flush` before a checkpoint is reported, so no step before a checkpoint is without rows."""

    def __init__(self, folder: str, *, rank: int, attempt: int) -> None:
        """
        Raises:
            CheckpointError: the folder cannot be made.
        """
        self._folder = folder.rstrip("/")
        try:
            with reaching(folder):
                make_folder(folder)
        except OSError as error:
            raise CheckpointError(f"the audit cannot be written to {folder}: {error}; look at the store, or leave out --audit") from None
        self._rank, self._attempt = rank, attempt
        self._rows: list[pa.Table] = []
        self._first_step = 0

    def add(self, batch: StepBatch, *, applied: bool = True) -> None:
        if not self._rows:
            self._first_step = batch.step
        # Copies: columns of a batch are views of its block, which they would hold in the object store, pictures and all.
        rows = batch.rows.select(["source", "epoch", "uid"]).take(np.arange(batch.rows.num_rows))
        constants = {"step": batch.step, "rank": self._rank, "attempt": self._attempt}
        for name, value in constants.items():
            rows = rows.append_column(name, pa.repeat(pa.scalar(value, pa.int64()), rows.num_rows))
        rows = rows.append_column("applied", pa.repeat(pa.scalar(applied), rows.num_rows))
        self._rows.append(rows.append_column("position", pa.array(batch.positions.copy())))

    def flush(self) -> None:
        """Write the rows since the last time.

        Raises:
            CheckpointError: they could not be written, twice in a row.
        """
        if not self._rows:
            return
        name = f"attempt{self._attempt:05d}-rank{self._rank:05d}-step{self._first_step:08d}.parquet"
        table = pa.concat_tables(self._rows).select(["epoch", "step", "position", "source", "rank", "uid", "attempt", "applied"])
        buffer = pa.BufferOutputStream()
        pq.write_table(table, buffer)
        for last in (False, True):
            try:
                with reaching(self._folder):
                    write_whole(f"{self._folder}/{name}", buffer.getvalue().to_pybytes())
                break
            except OSError as error:
                if last:
                    said = f"the audit could not be written to {self._folder}: {error}"
                    raise CheckpointError(f"{said}, twice in a row: look at the store") from None
        self._rows = []


def read_audit(folder: str) -> pa.Table:
    """The rows of each step's highest attempt, sorted by (step, position)."""
    fs, path = open_store(folder)
    rows = pa.concat_tables(pq.read_table(file, filesystem=fs) for file in sorted(fs.glob(f"{path}/attempt*.parquet")))
    highest = rows.group_by("step").aggregate([("attempt", "max")])
    joined = rows.join(highest, "step").filter(pa.compute.field("attempt") == pa.compute.field("attempt_max"))
    return joined.drop_columns(["attempt_max"]).sort_by([("step", "ascending"), ("position", "ascending")])
