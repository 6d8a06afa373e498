"""`mm submit -- train … --init MODEL` runs the same training as a job of a real Ray head, from that model, seen by Prometheus."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import duckdb
import psutil
import pytest
import requests
import torch
from mlflow import MlflowClient

from mm_core.bundle import load_bundle, read_manifest, write_bundle
from mm_core.models.clip import build_clip, clip_tiny
from mm_core.models.tokenizer import special_tokens, train_bpe
from pipelines.exported import BLOCK_SAMPLES, BLOCK_SECONDS, TRAIN
from pipelines.index import build_index

if TYPE_CHECKING:
    from conftest import RunningHead

pytestmark = pytest.mark.long
SOMETIMES = {"ray_mm_train_mfu", "ray_mm_train_skipped_steps", "ray_mm_train_rollbacks"}
"""On GPUs, or where steps are looked at before they count."""
ALWAYS = {each.name for each in (*TRAIN, BLOCK_SAMPLES, BLOCK_SECONDS)} - SOMETIMES


def mm(head: RunningHead, *arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = head.environment | {"RAY_API_SERVER_ADDRESS": head.address}
    command = [sys.executable, "-m", "mm", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


def write_model(folder: Path) -> None:
    tokenizer = train_bpe(["a red circle", "two blue squares"] * 5, vocab_size=320, context_length=32)
    config = clip_tiny().model_copy(update={"vocab_size": len(tokenizer)})
    model = build_clip(config, special_tokens(tokenizer))
    write_bundle(folder, model=model, tokenizer=tokenizer, config=config, recipe="clip-tiny", data_fingerprint="none", metrics={})


def weights(bundle: Path) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in load_bundle(str(bundle)).model.parameters()])


def words_of(process: psutil.Process) -> list[str]:
    """Its command; of one that has ended meanwhile none."""
    with suppress(psutil.NoSuchProcess):
        return process.cmdline()
    return []


def test_training_as_a_job(running_head: RunningHead, ray_cluster: None, corpus: Path, tmp_path: Path) -> None:
    build_index([str(corpus / "train")], str(tmp_path / "index"))
    write_model(tmp_path / "start")
    settings = ["steps=4", "global_batch_size=32", "tracking.system_metrics=false", "optimizer.lr=1e-9"]
    train = ["train", "clip-tiny", "--data", "index", "--name", "job", "--workers", "1", "--init", "start"]
    train += [part for setting in settings for part in ("--set", setting)]

    submitted = mm(running_head, "submit", "--json", "--", *train, folder=tmp_path)

    assert submitted.returncode == 0, submitted.stderr
    job = json.loads(submitted.stdout.splitlines()[-1])
    assert f"mm jobs logs -f {job['job_id']}" in submitted.stderr
    until, exported = time.monotonic() + 240, set[str]()
    while not (tmp_path / "runs" / "job" / "bundle" / "mm.json").exists():
        assert time.monotonic() < until, mm(running_head, "jobs", "logs", job["job_id"], folder=tmp_path).stdout
        exported |= set(re.findall(r"^(ray_mm_\w+)\{", requests.get(running_head.metrics, timeout=10).text, re.MULTILINE))
        time.sleep(0.2)
    assert {name.removesuffix("_bucket") for name in exported} >= ALWAYS
    assert read_manifest(tmp_path / "runs" / "job" / "bundle").run_id == job["run_id"]
    torch.testing.assert_close(weights(tmp_path / "runs" / "job" / "bundle"), weights(tmp_path / "start"), atol=1e-6, rtol=0)


def test_a_run_whose_driver_is_killed_goes_on_by_itself(running_head: RunningHead, corpus: Path, tmp_path: Path) -> None:
    """As by a kernel that is out of memory: its job starts it again, on the same samples, in the same run."""
    mm(running_head, "data", "index", str(corpus / "train"), "--out", "index", folder=tmp_path)
    settings = ["steps=120", "global_batch_size=32", "checkpoint.every_steps=20", "tracking.system_metrics=false"]
    train = ["train", "clip-tiny", "--data", "index", "--name", "killed", "--workers", "1", "--audit", "audit"]
    train += [part for setting in settings for part in ("--set", setting)]
    job = json.loads(mm(running_head, "submit", "--json", "--wait-s", "0", "--", *train, folder=tmp_path).stdout.splitlines()[-1])

    until = time.monotonic() + 240
    while len([*(tmp_path / "runs" / "killed").glob("checkpoint_*")]) < 2:  # the first is whole then
        assert time.monotonic() < until, mm(running_head, "jobs", "logs", job["job_id"], folder=tmp_path).stdout
        time.sleep(0.1)
    (driver,) = [each for each in running_head.cluster.nodes[0].processes() if words_of(each)[1:4] == ["-m", "mm", "train"]]
    driver.kill()

    followed = mm(running_head, "jobs", "logs", "-f", job["job_id"], folder=tmp_path)
    assert followed.returncode == 0, followed.stdout
    assert "was killed (SIGKILL)" in followed.stdout
    last = f"FROM '{tmp_path}/audit/*.parquet' QUALIFY attempt = max(attempt) OVER (PARTITION BY step)"
    found = duckdb.sql(f"SELECT count(*), count(DISTINCT (epoch, uid)), count(DISTINCT attempt) FROM ({last})").fetchall()
    assert found == [(120 * 32, 120 * 32, 2)]
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    (run,) = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    assert run.info.status == "FINISHED"
    points = [(point.step, point.timestamp, point.value) for point in client.get_metric_history(run.info.run_id, "loss")]
    assert {step for step, _, _ in points} == set(range(10, 121, 10))
    assert len(set(points)) == len(points), "a step that was taken again has a point of its own time"
