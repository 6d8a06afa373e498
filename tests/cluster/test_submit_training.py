"""`mm submit -- train …` runs the same training as a job of a real Ray head."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from mm_core.bundle import read_manifest
from pipelines.index import build_index

if TYPE_CHECKING:
    from conftest import RunningHead

pytestmark = pytest.mark.slow


def mm(head: RunningHead, *arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = head.environment | {"RAY_API_SERVER_ADDRESS": head.address}
    command = [sys.executable, "-m", "mm", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


def test_training_as_a_job(running_head: RunningHead, ray_cluster: None, corpus: Path, tmp_path: Path) -> None:
    build_index([str(corpus / "train")], str(tmp_path / "index"))
    settings = ["steps=4", "global_batch_size=32", "tracking.system_metrics=false", "tokenizer.vocab_size=320"]
    train = ["train", "clip-tiny", "--data", "index", "--name", "job", "--workers", "1", *(part for s in settings for part in ("--set", s))]

    submitted = mm(running_head, "submit", "--json", "--", *train, folder=tmp_path)

    assert submitted.returncode == 0, submitted.stderr
    job = json.loads(submitted.stdout.splitlines()[-1])
    assert f"mm jobs logs -f {job['job_id']}" in submitted.stderr
    until = time.monotonic() + 240
    while not (tmp_path / "runs" / "job" / "bundle" / "mm.json").exists():
        assert time.monotonic() < until, mm(running_head, "jobs", "logs", job["job_id"], folder=tmp_path).stdout
        time.sleep(1)
    assert "train  4/4 steps" in mm(running_head, "jobs", "logs", "-f", job["job_id"], folder=tmp_path).stdout
    assert read_manifest(tmp_path / "runs" / "job" / "bundle").run_id == job["run_id"]
