"""A worker's machine must have the run's own folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from mm_core.errors import ConfigError
from pipelines.train import run_folder
from pipelines.train.run_folder import RunFolder, RunRecord, check_shared


def write(storage: Path, tracking_run_id: str) -> RunFolder:
    folder = RunFolder(str(storage), "first")
    record = RunRecord(identity={}, config={}, sources=(), data_fingerprint="f", tracking_run_id=tracking_run_id)
    folder.write(record)
    return folder


def test_the_runs_own_folder_will_do(tmp_path: Path) -> None:
    check_shared(write(tmp_path, "1f").url, "1f")


@pytest.mark.parametrize("there", [None, "of another run"])
def test_a_disk_of_the_workers_own_is_refused(there: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_folder, "_FRESH_S", 1)
    url = f"{tmp_path}/first"
    if there is not None:
        assert write(tmp_path, there).url == url
    with pytest.raises(ConfigError, match=r"first on \S+, where a worker runs, is not the folder that the run's driver has"):
        check_shared(url, "1f")


def test_an_object_store_is_one_for_all() -> None:
    check_shared("s3://bucket/runs/first", "1f")
