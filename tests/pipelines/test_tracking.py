"""Runs, metrics, outages and restarts against real MLflow stores: sqlite files and a served one."""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mm_core.address import without_password
from mm_core.config import validate
from mm_core.errors import ConfigError, ServiceError
from pipelines.cli import resolve_run
from pipelines.metric_log import MetricLog, Spool, system_metrics
from pipelines.tracking import (
    DatasetInput,
    RunStatus,
    TrackingConfig,
    continue_run,
    create_run,
    describe_run,
    finish_run,
    log_artifacts,
    metric_history,
    open_client,
    resolve_uri,
)
from tests.tracking_server import TrackingServer


@pytest.fixture(scope="module")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A migrated sqlite store: each test copies it, which is faster than migrating anew."""
    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    open_client(TrackingConfig(uri=f"sqlite:///{path}"))
    return path


@pytest.fixture
def tracking(empty_database: Path, tmp_path: Path) -> TrackingConfig:
    shutil.copy(empty_database, tmp_path / "mlflow.db")
    return TrackingConfig(uri=f"sqlite:///{tmp_path}/mlflow.db").resolved()


@pytest.fixture
def run_id(tracking: TrackingConfig) -> str:
    return create_run(tracking, run_name="test", params={})


def steps_of(tracking: TrackingConfig, run_id: str, name: str = "loss") -> list[int]:
    """Every stored point's step, repeated points included."""
    return sorted(metric.step for metric in open_client(tracking).get_metric_history(run_id, name))


def wait_until(condition: Callable[[], bool], timeout_s: float = 120) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def test_a_relative_sqlite_file_becomes_absolute_with_its_artifacts_beside_it(tmp_path: Path) -> None:
    resolved = TrackingConfig().resolved(tmp_path)
    assert resolved.uri == f"sqlite:///{tmp_path}/mlflow.db"
    assert resolved.artifact_location == f"file://{tmp_path}/mlartifacts"
    assert resolved.resolved(Path("/elsewhere")) == resolved


def test_a_server_is_left_as_it_is() -> None:
    config = TrackingConfig(uri="http://mlflow:5000")
    assert config.resolved() == config
    assert resolve_uri("postgresql://db/mlflow") == "postgresql://db/mlflow"


@pytest.mark.parametrize("uri", ["mlruns", "file:///mlruns", "sqlite://", "sqlite:///:memory:", "ftp://host"])
def test_a_store_that_cannot_serve_is_refused_with_a_way_out(uri: str) -> None:
    with pytest.raises(ConfigError, match=r"use sqlite:///"):
        validate(TrackingConfig, {"uri": uri})


def test_a_run_holds_parameters_tags_config_and_data(tracking: TrackingConfig, tmp_path: Path) -> None:
    params = {
        "optimizer": {"lr": 1e-3, "betas": [0.9, 0.98]},
        "note": "x" * 7000,
        "store": "postgresql://mm:secret@db/mlflow",
        "odd key!": True,
        **{f"many_{i}": i for i in range(150)},
    }
    data = DatasetInput("clothing", digest="a" * 64, source="/data/clothing.index", samples=1234)
    run_id = create_run(tracking, run_name="clip", params=params, tags={"recipe": "clip-tiny"}, datasets=[data])

    run = open_client(tracking).get_run(run_id)
    assert run.info.run_name == "clip"
    assert run.info.status == "RUNNING"
    assert run.data.tags["recipe"] == "clip-tiny"
    assert run.data.params["optimizer.lr"] == "0.001"
    assert run.data.params["odd key_"] == "True"
    assert run.data.params["many_149"] == "149"
    assert len(run.data.params["note"]) == 6000
    assert run.data.params["store"] == "postgresql://mm:***@db/mlflow"
    assert run.inputs is not None
    (logged,) = run.inputs.dataset_inputs
    assert logged.dataset.profile is not None
    assert (logged.dataset.name, logged.dataset.digest) == ("clothing", "a" * 36)
    assert json.loads(logged.dataset.source) == {"uri": "/data/clothing.index"}
    assert json.loads(logged.dataset.profile) == {"num_rows": 1234}
    (config,) = tmp_path.glob("mlartifacts/*/artifacts/config.json")
    assert json.loads(config.read_text()) == {**params, "store": "postgresql://mm:***@db/mlflow"}


def test_a_run_ends_and_goes_on(tracking: TrackingConfig, run_id: str) -> None:
    client = open_client(tracking)
    assert finish_run(tracking, run_id, RunStatus.FAILED)
    assert client.get_run(run_id).info.status == "FAILED"
    continue_run(tracking, run_id)
    assert client.get_run(run_id).info.status == "RUNNING"


def test_a_run_of_another_store_cannot_be_continued(tracking: TrackingConfig) -> None:
    with pytest.raises(ServiceError, match=r"run feedbeef .*set tracking\.uri to the store"):
        continue_run(tracking, "feedbeef")


def test_artifacts_are_files_or_whole_folders(tracking: TrackingConfig, run_id: str, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    (bundle / "mm.json").write_text("{}")
    (tmp_path / "loss.png").write_bytes(b"png")
    assert log_artifacts(tracking, run_id, bundle, "bundle")
    assert log_artifacts(tracking, run_id, tmp_path / "loss.png", "plots")
    client = open_client(tracking)
    assert [f.path for f in client.list_artifacts(run_id, "bundle")] == ["bundle/mm.json"]
    assert [f.path for f in client.list_artifacts(run_id, "plots")] == ["plots/loss.png"]


def test_a_person_is_told_how_to_open_the_run(tracking: TrackingConfig, run_id: str, tmp_path: Path) -> None:
    text = describe_run(tracking, run_id)
    assert f"mlflow ui --backend-store-uri sqlite:///{tmp_path}/mlflow.db" in text
    assert text.endswith(f"/runs/{run_id}")


def test_opening_a_new_store_prints_nothing(tmp_path: Path) -> None:
    code = "from pipelines.tracking import *; open_client(TrackingConfig(uri='sqlite:///new/mlflow.db'))"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, check=True)
    assert (done.stdout, done.stderr) == (b"", b"")
    assert (tmp_path / "new/mlflow.db").exists()


def test_an_unusable_store_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_text("this is not a database, and is long enough to be looked at as one" * 100)
    with pytest.raises(ServiceError, match=r"failed in the MLflow store sqlite:///.*check tracking\.uri"):
        open_client(TrackingConfig(uri=f"sqlite:///{tmp_path}/mlflow.db"))


def test_a_store_whose_driver_is_missing_is_one_line_with_a_way_out() -> None:
    with pytest.raises(ServiceError, match=r"No module named 'pymysql'; install that where mm and its workers run"):
        open_client(TrackingConfig(uri="mysql+pymysql://me@127.0.0.1:9/runs"))


@pytest.mark.parametrize(
    "uri",
    [
        "https://me:geheim@mlflow.example.org",
        "postgresql+psycopg2://me:geheim@db/mlflow",
        "postgresql+psycopg2://db/mlflow?user=me&password=geheim",
    ],
)
def test_a_store_with_a_password_is_refused_without_showing_it(uri: str) -> None:
    with pytest.raises(ConfigError, match=r"tracking\.uri.*carries a password.*MLFLOW_TRACKING_PASSWORD") as error:
        resolve_run("clip-tiny", [f"tracking.uri={uri}"])
    assert "geheim" not in str(error.value)


def test_passwords_are_not_shown() -> None:
    assert without_password("at http://me:pw@host/x and http://host") == "at http://me:***@host/x and http://host"
    assert without_password('{"a": "pg://db/x?Password=pw&user=me", "b": 1}') == '{"a": "pg://db/x?Password=***&user=me", "b": 1}'
    for plain in (
        "x?max_tokens=5&passwords=no",
        "http://h:5000/#/runs/a@b and models:/m@champion",
        "http://h:80 s3://b/x@y",
        "pg://me@db/x",
        "http://[::1]:5000/#/runs/a@b",
        "http://h:${PORT}/a@b",
    ):
        assert without_password(plain) == plain
    assert without_password("s3://b/k?X-Amz-Signature=pw&X-Amz-Date=1") == "s3://b/k?X-Amz-Signature=***&X-Amz-Date=1"


@pytest.mark.parametrize("password", ["pa/ss", "p@ss", "1p/w@x", "a:b", "p%40w", "12,34", "12#4", "12?4", "12", "pa'ss", 'pa"ss', "${x"])
def test_a_password_is_hidden_whole_whatever_it_is_made_of(password: str) -> None:
    assert without_password(f"(pg://me:{password}@db:5432/x, http://h:80/y)") == "(pg://me:***@db:5432/x, http://h:80/y)"


def test_metrics_arrive_with_their_steps(tracking: TrackingConfig, run_id: str, tmp_path: Path) -> None:
    metrics = MetricLog(tracking.uri, run_id, tmp_path / "spool")
    for step in range(1, 301):
        metrics.log(step, {"loss": 1 / step, "lr": 1e-3, "grad norm (l2)": math.nan, "a//b": math.inf})
    assert metrics.close(timeout_s=30)
    assert metrics.close()
    history = metric_history(tracking, run_id, ["loss", "lr", "grad norm _l2_", "a/b", "absent"])
    assert list(history) == ["loss", "lr", "grad norm _l2_", "a/b"]
    assert history["loss"] == [(step, 1 / step) for step in range(1, 301)]
    assert all(math.isnan(value) for _, value in history["grad norm _l2_"])
    assert not list((tmp_path / "spool").iterdir())


def test_what_is_no_number_is_warned_about_and_left_out(
    tracking: TrackingConfig, run_id: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    metrics = MetricLog(tracking.uri, run_id, tmp_path / "spool")
    metrics.log(1, {"loss": "high"})  # type: ignore[dict-item]
    metrics.log(2, {"loss": 2.0})
    assert metrics.close(timeout_s=30)
    metrics.log(3, {"loss": 3.0})
    assert steps_of(tracking, run_id) == [2]
    assert [record.levelname for record in caplog.records if "lost" in record.message] == ["WARNING"]


def test_a_replayed_step_counts_with_its_last_value(tracking: TrackingConfig, run_id: str, tmp_path: Path) -> None:
    metrics = MetricLog(tracking.uri, run_id, tmp_path / "spool")
    for value in (1.0, 2.0):
        metrics.log(7, {"loss": value})
        time.sleep(0.002)  # A restart takes longer than the millisecond that tells the two apart.
    assert metrics.close(timeout_s=30)
    assert metric_history(tracking, run_id, ["loss"]) == {"loss": [(7, 2.0)]}


def test_a_store_on_another_machine_is_named_once_and_the_points_stay(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    metrics = MetricLog(f"sqlite:///{tmp_path}/absent.db", "run", tmp_path / "spool", flush_interval_s=0.01)
    metrics.log(1, {"loss": 1.0})
    wait_until(lambda: "set tracking.uri to a server" in caplog.text)
    assert not metrics.close(timeout_s=0.2)
    assert caplog.text.count("kept in a file") == 1
    assert not (tmp_path / "absent.db").exists()
    assert len(list((tmp_path / "spool").glob("run.*.jsonl"))) == 1


def test_what_a_killed_process_left_is_sent_once(tracking: TrackingConfig, run_id: str, tmp_path: Path) -> None:
    """Killed after half was delivered, with its last line torn: the next process sends the rest."""
    program = f"""
        import os, signal
        from pathlib import Path
        from pipelines.metric_log import MetricLog
        metrics = MetricLog({tracking.uri!r}, {run_id!r}, Path({str(tmp_path / "spool")!r}), flush_interval_s=0.05)
        for step in range(100):
            metrics.log(step, {{"loss": step}})
        while not metrics._spool.is_empty():
            pass
        metrics._send_all = lambda: False  # From here the store is out of reach.
        for step in range(100, 200):
            metrics.log(step, {{"loss": step}})
        metrics._spool.append(b'{{"step": 200, "time_ms"')
        os.kill(os.getpid(), signal.SIGKILL)
    """
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    killed = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], env=environment, check=False)
    assert killed.returncode == -9
    assert set(steps_of(tracking, run_id)) >= set(range(100))

    metrics = MetricLog(tracking.uri, run_id, tmp_path / "spool")
    metrics.log(201, {"loss": 201.0})
    assert metrics.close(timeout_s=30)
    assert steps_of(tracking, run_id) == [*range(200), 201]
    assert not list((tmp_path / "spool").iterdir())


def test_a_spool_is_sent_again_without_doubling(tracking: TrackingConfig, run_id: str, tmp_path: Path) -> None:
    """Killed between sending and noting it: the same lines go out twice."""
    lines = b"".join(b'{"step": %d, "time_ms": 5, "values": {"loss": 0.5}}\n' % step for step in range(50))
    for _ in range(2):
        (tmp_path / f"{run_id}.killed.jsonl").write_bytes(lines)
        assert MetricLog(tracking.uri, run_id, tmp_path).close(timeout_s=30)
    assert steps_of(tracking, run_id) == list(range(50))


def test_what_a_lost_machine_had_not_sent_is_sent_by_another(tracking: TrackingConfig, run_id: str, tmp_path: Path) -> None:
    """From the run's folder, as of the last checkpoint, into a spool of its own."""
    lost = MetricLog(f"sqlite:///{tmp_path}/away/mlflow.db", run_id, tmp_path / "lost")
    for step in range(20):
        lost.log(step, {"loss": float(step)})
    kept = lost.unsent()
    other = MetricLog(tracking.uri, run_id, tmp_path / "other")
    other.resend(kept)
    other.resend(kept)
    assert other.close(timeout_s=30)
    assert steps_of(tracking, run_id) == [*range(20)]
    assert not lost.close(timeout_s=0.1)


def test_the_spool_of_a_living_process_and_of_another_run_are_left_alone(tmp_path: Path) -> None:
    first = Spool(tmp_path, "run")
    first.append(b'{"step": 1, "time_ms": 1, "values": {"loss": 1.0}}\n')
    (tmp_path / "other.x.jsonl").write_bytes(b'{"step": 2, "time_ms": 1, "values": {"loss": 1.0}}\n')
    second = Spool(tmp_path, "run")
    assert second.is_empty()
    second.close()
    first.close()
    third = Spool(tmp_path, "run")
    assert third.read()[0] == [("loss", 1.0, 1, 1)]
    third.close()


def test_a_spool_that_is_never_quite_empty_does_not_grow(tmp_path: Path) -> None:
    spool = Spool(tmp_path, "run")
    line = b'{"step": 1, "time_ms": 1, "values": {"%s": 1.0}}\n' % (b"x" * 200)
    points = 0
    for _ in range(40_000):
        spool.append(line)
    while points < 39_990:
        read, taken = spool.read()
        points += len(read)
        spool.append(line)
        spool.discard(taken)
    (path,) = tmp_path.iterdir()
    assert path.stat().st_size < 6_000_000  # 10 MB were written.
    while not spool.is_empty():
        read, taken = spool.read()
        points += len(read)
        spool.discard(taken)
    assert points >= 40_000
    spool.close()
    assert not list(tmp_path.iterdir())


def test_a_full_disk_keeps_a_spool_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it would be moved to a new file, and where another process's is taken over."""
    spool = Spool(tmp_path, "run")
    line = b'{"step": 1, "time_ms": 1, "values": {"%s": 1.0}}\n' % (b"x" * 200)
    spool.append(line * 30_000)
    taken = 29_990 * len(line)
    real = os.write
    monkeypatch.setattr("pipelines.metric_log.os.write", lambda fd, data: real(fd, data[: len(data) // 2]))
    spool.discard(taken)
    assert spool.unsent() == line * 10
    monkeypatch.undo()
    (tmp_path / "run.killed.jsonl").write_bytes(line)

    def torn(source: Any, target: Any) -> None:
        target.write(line[:50])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pipelines.metric_log.shutil.copyfileobj", torn)
    second = Spool(tmp_path, "run")
    assert second.unsent() == b""
    assert (tmp_path / "run.killed.jsonl").read_bytes() == line
    second.close()
    spool.close()


def test_the_machine_is_measured_at_the_run_s_step(tracking: TrackingConfig, run_id: str, tmp_path: Path) -> None:
    metrics = MetricLog(tracking.uri, run_id, tmp_path / "spool", step=40, flush_interval_s=0.05)
    with system_metrics(metrics, interval_s=0.05):
        wait_until(lambda: bool(steps_of(tracking, run_id, "system/cpu_utilization_percentage")))
    assert metrics.close(timeout_s=30)
    names = set(open_client(tracking).get_run(run_id).data.metrics)
    assert {"system/system_memory_usage_megabytes", "system/network_receive_megabytes"} <= names
    assert set(steps_of(tracking, run_id, "system/cpu_utilization_percentage")) == {40}


@pytest.fixture
def server(empty_database: Path, tmp_path: Path) -> Iterator[TrackingServer]:
    shutil.copy(empty_database, tmp_path / "mlflow.db")
    server = TrackingServer(tmp_path, f"sqlite:///{tmp_path}/mlflow.db")
    yield server
    server.kill()


def test_an_outage_delays_points_and_loses_none(
    server: TrackingServer, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.INFO)
    with pytest.raises(ServiceError, match=r"tracking server http://127\.0\.0\.1:\d+ gives no answer"):
        create_run(server.config, run_name="early", params={})
    server.start()
    run_id = create_run(server.config, run_name="served", params={"lr": 0.1})
    assert describe_run(server.config, run_id).startswith(server.config.uri)
    metrics = MetricLog(server.config.uri, run_id, tmp_path / "spool", flush_interval_s=0.05, max_backoff_s=0.5)
    for step in range(100):
        metrics.log(step, {"loss": step, "nan": math.nan})
    wait_until(lambda: len(steps_of(server.config, run_id)) == 100)

    server.kill()
    for step in range(100, 200):
        metrics.log(step, {"loss": step})
    wait_until(lambda: "kept in a file" in caplog.text)
    continue_run(server.config, run_id)
    assert not log_artifacts(server.config, run_id, tmp_path / "server.log")
    assert not finish_run(server.config, run_id, RunStatus.FINISHED)
    assert metric_history(server.config, run_id, ["loss"]) == {}
    assert describe_run(server.config, run_id) == f"{server.config.uri}/"

    server.start()
    for step in range(200, 300):
        metrics.log(step, {"loss": step})
    assert metrics.close(timeout_s=30)
    assert steps_of(server.config, run_id) == list(range(300))
    assert steps_of(server.config, run_id, "nan") == list(range(100))
    assert caplog.text.count("kept in a file") == 1
    assert log_artifacts(server.config, run_id, tmp_path / "server.log")
    assert finish_run(server.config, run_id, RunStatus.FINISHED)
    assert capsys.readouterr().out == ""


def test_points_that_are_here_already_are_not_taken_twice(tmp_path: Path) -> None:
    """Rank 0 is started again and again while MLflow is away: its file is taken over, and its copy in the run's folder comes besides."""
    copy = b""
    for step in range(4):
        log = MetricLog("http://127.0.0.1:9", "1f", tmp_path, flush_interval_s=60)
        log.resend(copy)
        log.log(step, {"loss": 1.0})
        copy = log.unsent()
        log._stop.set()
        log._deadline = 0
        log._thread.join(60)
        log._spool.close()
    assert [json.loads(line)["step"] for line in copy.splitlines() if line] == [0, 1, 2, 3]
