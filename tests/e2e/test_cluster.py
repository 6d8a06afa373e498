"""From shards to an endpoint on a cluster of three nodes, by the command line alone: shards, index, checkpoints and audit in an S3 store,
MLflow on PostgreSQL, the model's files in its registry. A few minutes: `make long`."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pyarrow.compute as pc
import pytest
from mlflow import MlflowClient

from cluster.local import remembered
from mm_core.ports import free_port
from mm_core.store import open_store
from pipelines.train.audit import read_audit
from tests.object_store import ObjectStore
from tests.postgres import Postgres, find_postgres
from tests.tracking_server import TrackingServer

pytestmark = pytest.mark.long
STEPS = 40
RULES = "rules:\n  few_words: {rule: words, min: 5}\n"
SETTINGS = (f"steps={STEPS}", "global_batch_size=64", "checkpoint.every_steps=20", "log_every_steps=1", "storage=s3://store/runs")
PASSED = ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION", "MM_SET__TRACKING__URI")


@pytest.fixture
def postgres() -> Iterator[Postgres]:
    """
    Skips where PostgreSQL is not installed.
    """
    programs = find_postgres()
    if programs is None:
        pytest.skip("no PostgreSQL server here: install one (Debian: apt-get install postgresql)")
    with Postgres(programs) as server:
        yield server


@pytest.fixture
def tracking(postgres: Postgres, object_store: ObjectStore, tmp_path: Path) -> Iterator[TrackingServer]:
    fs, path = open_store("s3://store")
    fs.mkdir(path)
    server = TrackingServer(tmp_path, postgres.uri, "s3://store/mlflow", postgres.variables)
    server.start()
    yield server
    server.kill()


class Shell:
    """A terminal in which `up` was run, and what it said to export; it knows the store and the tracking server."""

    def __init__(self, folder: Path, tracking_uri: str) -> None:
        self.folder = folder
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        self.environment |= {"MM_SET__TRACKING__URI": tracking_uri, "MM_CACHE": str(folder / "cache")}

    def run(self, module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", module, *arguments]
        done = subprocess.run(command, cwd=self.folder, env=self.environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, f"{arguments}: {done.stdout}\n{done.stderr}"
        return done

    def up(self) -> str:
        said = self.run("cluster.local", "up").stdout
        exported = re.search(r"export (RAY_AUTH_MODE=.*)$", said, re.MULTILINE)
        assert exported is not None, said
        self.environment |= dict(pair.split("=", 1) for pair in exported[1].split())
        return said

    def submit(self, *arguments: str) -> str:
        """The job's id."""
        options = [part for name in PASSED for part in ("--env", name)]
        return str(result_of(self.run("mm", "submit", "--json", "--wait-s", "0", *options, "--", *arguments))["job_id"])

    def job(self, *arguments: str) -> dict[str, Any]:
        """What the command's `--json` says, once its job has ended well."""
        return result_of(self.run("mm", "jobs", "logs", "-f", self.submit(*arguments, "--json")))


def result_of(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """The last line that is a JSON object: a job's log has standard error in it."""
    found: dict[str, Any] = json.loads([line for line in done.stdout.splitlines() if line.startswith("{")][-1])
    return found


@pytest.fixture
def shell(tracking: TrackingServer, tmp_path: Path) -> Iterator[Shell]:
    shell = Shell(tmp_path, tracking.config.uri)
    yield shell
    shell.run("cluster.local", "down")


def upload(folder: Path, target: str) -> None:
    fs, path = open_store(target)
    for shard in sorted(folder.glob("*.tar")):
        fs.pipe_file(f"{path}/{shard.name}", shard.read_bytes())


def test_from_shards_to_an_endpoint(shell: Shell, postgres: Postgres, tracking: TrackingServer, corpus: Path, tmp_path: Path) -> None:
    nodes_that_come_up_once(shell)
    for name in ("train", "heldout"):
        upload(corpus / name, f"s3://store/shards/{name}")
        assert shell.job("data", "index", f"s3://store/shards/{name}", "--out", f"s3://store/{name}")["bad"] == {}
    (tmp_path / "rules.yaml").write_text(RULES)
    kept = shell.job("data", "filter", "s3://store/train", "--rules", "rules.yaml", "--name", "clean")["kept"]
    assert 64 < kept < 330

    settings = [part for setting in SETTINGS for part in ("--set", setting)]
    command = ["train", "clip-tiny", "--data", "s3://store/train", "--ledger", "clean", "--name", "first", "--workers", "2", *settings]
    trained = shell.job(*command, "--audit", "s3://store/audit")
    assert trained["bundle"] == "s3://store/runs/first/bundle"
    each_sample_came_once(kept)
    measured = shell.job("eval", trained["bundle"], "--retrieval", "s3://store/heldout")["retrieval"]
    assert 0 < measured["t2i_r10"] <= 1
    version = shell.job("register", "s3://store/runs/first", "--name", "clip", "--alias", "champion")
    assert (version["name"], version["alias"]) == ("clip", "champion")
    all_is_in_mlflow(tracking, postgres, trained["run_id"])
    an_endpoint_answers(shell)


def nodes_that_come_up_once(shell: Shell) -> None:
    assert shell.up().startswith("head, node1, node2 at http://127.0.0.1:")
    cluster = remembered(tmp := shell.folder / "cache" / "cluster.json")
    assert cluster is not None, tmp
    assert shell.up().startswith("up already: head, node1, node2 at ")
    assert remembered(tmp) == cluster
    cluster.lose(cluster.nodes[1])
    assert shell.up().startswith("head, node2, node3 at ")
    refused = httpx.get(f"{cluster.address}/api/jobs/")
    assert refused.status_code == 401
    assert shell.run("mm", "doctor", "--address", cluster.address, "--failures").stdout == ""


def each_sample_came_once(kept: int) -> None:
    """An epoch, by both ranks."""
    rows = read_audit("s3://store/audit")
    assert sorted(set(rows["step"].to_pylist())) == list(range(STEPS))
    assert set(rows["rank"].to_pylist()) == {0, 1}
    epochs = rows.group_by("epoch").aggregate([("uid", "count"), ("uid", "count_distinct")]).sort_by("epoch").to_pylist()
    assert [epoch["uid_count"] for epoch in epochs] == [epoch["uid_count_distinct"] for epoch in epochs]
    assert [epoch["uid_count"] for epoch in epochs[:-1]] == [kept] * (STEPS * 64 // kept)
    assert pc.all(rows["applied"]).as_py()


def all_is_in_mlflow(tracking: TrackingServer, postgres: Postgres, run_id: str) -> None:
    client = MlflowClient(tracking.config.uri)
    run = client.get_run(run_id)
    assert run.info.status == "FINISHED"
    assert [point.step for point in client.get_metric_history(run_id, "loss")] == list(range(1, STEPS + 1))
    assert "eval/retrieval/t2i_r10" in run.data.metrics
    assert postgres.query(f"select count(*) from metrics where run_uuid = '{run_id}' and key = 'loss'") == str(STEPS)
    fs, path = open_store("s3://store/mlflow")
    assert [file for file in fs.find(path) if file.endswith("bundle/model.safetensors")]


def an_endpoint_answers(shell: Shell) -> None:
    """As a job like the others, until it is stopped."""
    port = free_port()
    job = shell.submit("serve", "models:/clip@champion", "--port", str(port))
    url = f"http://127.0.0.1:{port}"
    await_status(f"{url}/readyz", 200)
    answer = httpx.post(f"{url}/v1/embeddings", json={"input": ["a red circle", "a blue square"]}, timeout=60).json()
    assert [len(row["embedding"]) for row in answer["data"]] == [128, 128]
    shell.run("mm", "jobs", "stop", job)
    await_status(f"{url}/readyz", None)


def await_status(url: str, wanted: int | None) -> None:
    """None: nobody answers."""
    until = time.monotonic() + 300
    found: int | None = 0
    while found != wanted:
        assert time.monotonic() < until, f"{url}: {found}, not {wanted}"
        try:
            found = httpx.get(url, timeout=5).status_code
        except httpx.TransportError:
            found = None
        time.sleep(0.5)
