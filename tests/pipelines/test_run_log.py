"""What rank 0 tells MLflow outlives rank 0's machine."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from pipelines.tracking import TrackingConfig, create_run, metric_history
from pipelines.train.loop import WorkerTask
from pipelines.train.run_log import RunLog

pytestmark = pytest.mark.usefixtures("ray_cluster")


def task_of(folder: Path, tracking: TrackingConfig, run_id: str) -> WorkerTask:
    """As much of one as the log asks for."""
    nobody = SimpleNamespace(update=SimpleNamespace(remote=lambda *_: None))
    run = SimpleNamespace(tracking=tracking, steps=10)
    return cast(WorkerTask, SimpleNamespace(run=run, folder=str(folder), tracking_run_id=run_id, board=nobody))


def test_points_that_mlflow_had_not_taken_at_a_checkpoint_are_sent_from_another_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = TrackingConfig(uri=f"sqlite:///{tmp_path}/mlflow.db", system_metrics=False).resolved()
    away = there.model_copy(update={"uri": f"sqlite:///{tmp_path}/away/mlflow.db"})
    run_id, unsent = create_run(there, run_name="r", params={}), tmp_path / "run" / "unsent.jsonl"

    monkeypatch.setenv("MM_CACHE", str(tmp_path / "lost"))
    with RunLog(task_of(tmp_path / "run", away, run_id), 0) as log:
        log.metrics(5, {"loss": 5.0})
        log.before_checkpoint()
    assert unsent.read_bytes().count(b"\n") == 1

    monkeypatch.setenv("MM_CACHE", str(tmp_path / "other"))
    with RunLog(task_of(tmp_path / "run", there, run_id), 0):
        pass
    assert metric_history(there, run_id, ["loss"]) == {"loss": [(5, 5.0)]}

    with RunLog(task_of(tmp_path / "run", there, run_id), 0) as log:
        until = time.monotonic() + 60
        while unsent.exists():  # goes with the first checkpoint after which all is sent
            assert time.monotonic() < until
            time.sleep(0.2)
            log.before_checkpoint()
    assert metric_history(there, run_id, ["loss"]) == {"loss": [(5, 5.0)]}
