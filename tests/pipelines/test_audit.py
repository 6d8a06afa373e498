"""The audit in a store that fails."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from mm_core.errors import CheckpointError
from mm_core.store import write_whole
from pipelines.batches import StepBatch
from pipelines.train.audit import Audit, read_audit


def batch(step: int) -> StepBatch:
    none = pa.nulls(2, pa.string())
    columns = {"source": [0, 0], "epoch": [0, 0], "uid": ["a", "b"], "replaced": none, "replaced_shard": none}
    return StepBatch(step, None, None, np.arange(2, dtype=np.uint64) + 2 * step, pa.table(columns))


class Failing:
    """A store that does not take the next so many files."""

    def __init__(self, times: int) -> None:
        self._times = times

    def __call__(self, url: str, data: bytes) -> None:
        if self._times:
            self._times -= 1
            raise OSError(28, "No space left on device")
        write_whole(url, data)


def test_rows_that_a_store_refused_once_are_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.train.audit.write_whole", Failing(1))
    audit = Audit(str(tmp_path), rank=0, attempt=1)
    audit.add(batch(0))
    audit.flush()
    assert read_audit(str(tmp_path))["uid"].to_pylist() == ["a", "b"]


def test_twice_in_a_row_ends_the_run_and_no_row_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With an error of mm's own, after which workers are not started again and again."""
    monkeypatch.setattr("pipelines.train.audit.write_whole", Failing(2))
    audit = Audit(str(tmp_path), rank=0, attempt=1)
    audit.add(batch(0))
    with pytest.raises(
        CheckpointError, match=rf"audit could not be written to {tmp_path}: .*No space left.*, twice in a row: look at the store"
    ):
        audit.flush()
    audit.add(batch(1))
    audit.flush()
    assert read_audit(str(tmp_path))["step"].to_pylist() == [0, 0, 1, 1]


def test_a_folder_that_cannot_be_made_ends_the_run_too(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"the audit cannot be written to .*/file/audit: .*leave out --audit"):
        Audit(str(tmp_path / "file" / "audit"), rank=0, attempt=1)
