"""A worker is killed, then Ctrl-C, or the driver killed; the run goes on with other workers: the same samples, the same batches."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import duckdb
import psutil
import pyarrow as pa
import pytest
import torch
from mlflow import MlflowClient
from typer.testing import CliRunner

import mm
from mm_core.bundle import load_bundle
from mm_core.config import resolve
from mm_core.console import Console
from mm_core.data.index import Index
from mm_core.data.ledger import Source
from mm_core.errors import CheckpointError, ConfigError, TrainingError
from pipelines.index import build_index
from pipelines.metric_log import Spool, spool_folder
from pipelines.recipes import recipe
from pipelines.tracking import TrackingConfig, create_run
from pipelines.train.audit import read_audit
from pipelines.train.begin import begin, claim
from pipelines.train.config import TrainRun
from pipelines.train.driver import TrainRequest, TrainResult, train
from pipelines.train.run_data import RunData
from pipelines.train.run_folder import RunFolder, RunRecord, newest_run
from tests.stacks import stacks

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]
STEPS = 50


def settings(storage: Path) -> list[str]:
    tower = "{width: 32, layers: 1, heads: 2}"
    return [
        f"steps={STEPS}", "global_batch_size=40", "data.chunk=8", "precision=fp32", "log_every_steps=5", "checkpoint.every_steps=10",
        "model.image_size=32", f"model.vision={tower}", f"model.text={tower}", "model.embed_dim=16", "tokenizer.vocab_size=320",
        f"storage={storage / 'runs'}", f"tracking.uri=sqlite:///{storage / 'mlflow.db'}", "tracking.system_metrics=false",
        "data.augment.crop_area=[0.5, 1.0]",
    ]  # fmt: skip


def tiny_run(storage: Path, workers: int, *more: str) -> TrainRun:
    return resolve(recipe("clip-tiny"), overrides=[*settings(storage), f"resources.workers={workers}", *more])[0]


def run(index: Index, storage: Path, workers: int, audit: Path, *more: str, name: str | None = "tiny", resume: bool = False) -> TrainResult:
    request = TrainRequest(tiny_run(storage, workers, *more), (Source(index=index.url),), name=name, resume=resume, audit=str(audit))
    return train(request, Console(json=True))


def batches(audit: Path) -> dict[int, list[tuple[int, str]]]:
    """Per step (epoch, uid) in the order of the global batch, from each step's highest attempt."""
    rows: pa.Table = read_audit(str(audit))
    found: dict[int, list[tuple[int, str]]] = {}
    for row in rows.to_pylist():
        found.setdefault(row["step"], []).append((row["epoch"], row["uid"]))
    return found


def weights(bundle: str) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in load_bundle(bundle).model.parameters()])


@pytest.fixture(scope="module")
def index(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Index:
    return build_index([str(corpus / "train")], str(tmp_path_factory.mktemp("resume") / "index"))


@pytest.fixture(scope="module")
def heldout(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What measures a run; whether it does or not, the run learns the same."""
    pairs = build_index([str(corpus / "heldout")], str(tmp_path_factory.mktemp("heldout") / "index"))
    return [f"evaluation.retrieval={pairs.url}", f"evaluation.zeroshot={corpus / 'zeroshot'}", "evaluation.every_steps=20"]


@pytest.fixture(scope="module")
def undisturbed(index: Index, heldout: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainResult, Path]:
    """Measured in the background, on a processor that neither of the ranks uses."""
    folder = tmp_path_factory.mktemp("undisturbed")
    return run(index, folder, 2, folder / "audit", *heldout, "evaluation.background=true"), folder


def start(index: Index, folder: Path, workers: int, *flags: str) -> subprocess.Popen[bytes]:
    """The run by the command line."""
    arguments = [item for setting in settings(folder) for item in ("--set", setting)]
    command = [sys.executable, "-m", "mm", "train", "clip-tiny", "--data", index.url, "--name", "tiny", "--workers", str(workers)]
    command += ["--audit", str(folder / "audit"), *flags, *arguments]
    with (folder / "log").open("wb") as log:
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=log)


def torn(index: Index, folder: Path) -> tuple[subprocess.Popen[bytes], list[psutil.Process]]:
    """A run by the command line that goes on by itself after SIGKILL to a worker, and its workers now."""
    driver = start(index, folder, 2)
    try:
        wait_for(lambda: reached(folder, 10), driver, folder)
        workers_of(driver)[0].send_signal(signal.SIGKILL)
        wait_for(lambda: attempts(folder) == 2 and reached(folder, 20), driver, folder)
    except BaseException:
        driver.kill()
        raise
    return driver, workers_of(driver)


def workers_of(driver: subprocess.Popen[bytes]) -> list[psutil.Process]:
    found = []
    for process in psutil.Process(driver.pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # one that was killed, and is not buried yet
            found += [process] if "RayTrainWorker" in " ".join(process.cmdline()) else []
    return found


@pytest.fixture(scope="module")
def interrupted(index: Index, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A worker killed, then Ctrl-C."""
    folder = tmp_path_factory.mktemp("interrupted")
    driver, _ = torn(index, folder)
    try:
        driver.send_signal(signal.SIGINT)
        assert driver.wait(120) == 130
    finally:
        driver.kill()
    return folder


@pytest.fixture(scope="module")
def killed(index: Index, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A worker killed, then the driver."""
    folder = tmp_path_factory.mktemp("killed")
    driver, workers = torn(index, folder)
    driver.kill()
    driver.wait()
    assert not psutil.wait_procs(workers, timeout=120)[1]
    return folder


def copy_run(old: Path, new: Path) -> None:
    for name in ("runs", "audit"):
        shutil.copytree(old / name, new / name)
    shutil.copy(old / "mlflow.db", new / "mlflow.db")


def test_ctrl_c_says_how_to_go_on(interrupted: Path) -> None:
    said = (interrupted / "log").read_text()
    assert "stopped; continue with the same command and --resume --name tiny" in said
    assert "Traceback" not in said
    record = json.loads((interrupted / "runs" / "tiny" / "run.json").read_text())
    status = MlflowClient(f"sqlite:///{interrupted / 'mlflow.db'}").get_run(record["tracking_run_id"]).info.status
    assert status == "KILLED"


def wait_for(done: Callable[[], bool], driver: subprocess.Popen[bytes], folder: Path, timeout_s: float = 600) -> None:
    """Long: a run may share two slow processors with the rest of the suite."""
    end = time.monotonic() + timeout_s
    while not done():
        assert driver.poll() is None, (folder / "log").read_text()
        assert time.monotonic() < end, f"{(folder / 'log').read_text()}\n{stacks(driver.pid)}"
        time.sleep(0.05)


def reached(folder: Path, step: int) -> bool:
    found = [int(path.parent.name.split("_")[1]) for path in (folder / "runs" / "tiny").glob("checkpoint_*/state.json")]
    return bool(found) and max(found) >= step


def attempts(folder: Path) -> int:
    return int((folder / "runs" / "tiny" / "attempt").read_text())


def test_the_run_is_whole(undisturbed: tuple[TrainResult, Path]) -> None:
    result, folder = undisturbed
    assert (result.steps, result.samples_seen) == (STEPS, STEPS * 40)
    assert math.isfinite(result.final_loss)
    consumed = batches(folder / "audit")
    assert sorted(consumed) == list(range(STEPS))
    assert all(len(step) == 40 for step in consumed.values())
    first = [uid for step in consumed.values() for epoch, uid in step if epoch == 0]
    assert len(first) == len(set(first)) == 330
    state = json.loads((Path(result.checkpoint) / "state.json").read_text())
    assert (state["step"], state["chunks_consumed"], state["tracking_run_id"]) == (STEPS, STEPS * 5, result.run_id)
    assert state["code_revision"]
    assert state["config"]["steps"] == STEPS


def test_interrupted_and_resumed_is_as_undisturbed(
    interrupted: Path, undisturbed: tuple[TrainResult, Path], index: Index, heldout: list[str], tmp_path: Path
) -> None:
    """Two workers, one of them killed; two again, Ctrl-C; one to the end, which measures itself as it goes. No name is given the last time:
    the newest run of this configuration and data is continued."""
    resumed_is_as_undisturbed(interrupted, undisturbed, index, tmp_path, 1, *heldout, name=None)
    there, here = (evaluated(folder)[STEPS] for folder in (undisturbed[1], tmp_path))
    assert here == pytest.approx(there, abs=0.05)


def test_the_guides_query_shows_that_nothing_came_twice(interrupted: Path) -> None:
    guide = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    query = next(line for line in guide.splitlines() if "audit/*.parquet" in line).replace("audit/", f"{interrupted}/audit/")
    assert duckdb.sql(query).fetchall() == []
    assert len(duckdb.sql(query.replace("count(*) > 1", "count(*) = 1")).fetchall()) >= 330, "it looked at nothing"


def evaluated(folder: Path) -> dict[int, dict[str, float]]:
    """By step what was measured, as MLflow has it."""
    client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    run_id = json.loads((folder / "runs" / "tiny" / "run.json").read_text())["tracking_run_id"]
    found: dict[int, dict[str, float]] = {}
    for name in ("eval/loss", "eval/retrieval/t2i_r10", "eval/zeroshot/top5", "eval/embedding/alignment"):
        for metric in client.get_metric_history(run_id, name):
            found.setdefault(metric.step, {})[name] = metric.value
    return found


def test_a_run_is_measured_in_the_background(undisturbed: tuple[TrainResult, Path]) -> None:
    """At its last step at least: the steps are faster than the actor starts. A picture shows them."""
    _, folder = undisturbed
    found = evaluated(folder)
    assert STEPS in found
    assert set(found) <= {20, 40, STEPS}
    assert len(found[STEPS]) == 4
    assert list((folder / "mlartifacts").rglob("plots/evaluation.png"))


@pytest.mark.chaos
@pytest.mark.parametrize("workers", [1, 2, 3])
def test_killed_and_resumed_is_as_undisturbed(
    workers: int, killed: Path, undisturbed: tuple[TrainResult, Path], index: Index, tmp_path: Path
) -> None:
    resumed_is_as_undisturbed(killed, undisturbed, index, tmp_path, workers, name="tiny")


def resumed_is_as_undisturbed(
    stopped: Path, undisturbed: tuple[TrainResult, Path], index: Index, folder: Path, workers: int, *more: str, name: str | None
) -> None:
    copy_run(stopped, folder)
    before = attempts(folder)
    assert {path.name.split("-")[0] for path in (folder / "audit").glob("*.parquet")} == {f"attempt{n + 1:05d}" for n in range(before)}
    reference, whole = undisturbed

    result = run(index, folder, workers, folder / "audit", *more, name=name, resume=True)

    assert batches(folder / "audit") == batches(whole / "audit")
    assert result.run_id == json.loads((stopped / "runs" / "tiny" / "run.json").read_text())["tracking_run_id"]
    torch.testing.assert_close(weights(result.bundle), weights(reference.bundle), atol=2e-3, rtol=1e-2)
    assert abs(result.final_loss - reference.final_loss) < 1e-2


def test_killed_and_resumed_sharded_is_as_undisturbed(
    killed: Path, undisturbed: tuple[TrainResult, Path], index: Index, tmp_path: Path
) -> None:
    """What replicas wrote is divided among ranks."""
    resumed_is_as_undisturbed(killed, undisturbed, index, tmp_path, 2, "parallel.kind=fsdp", name="tiny")


def test_a_run_is_not_overwritten_nor_continued_as_another(undisturbed: tuple[TrainResult, Path], index: Index, corpus: Path) -> None:
    _, folder = undisturbed
    with pytest.raises(ConfigError, match="exists: continue it with --resume"):
        run(index, folder, 1, folder / "audit2")
    other = tiny_run(folder, 1).model_copy(update={"steps": 7})
    with pytest.raises(CheckpointError, match=f"of another run: steps was {STEPS}, now 7"):
        train(TrainRequest(other, (Source(index=index.url),), name="tiny", resume=True), Console(json=True))
    with pytest.raises(CheckpointError, match="no run of clip-tiny with this configuration"):
        train(TrainRequest(other, (Source(index=index.url),), resume=True), Console(json=True))
    data = build_index([str(corpus / "heldout")], str(folder / "other-index"))
    with pytest.raises(CheckpointError, match="was started on other data"):
        run(data, folder, 1, folder / "audit2", resume=True)


def test_the_checkpoint_of_another_architecture_is_refused_before_ray_is_asked_for(
    undisturbed: tuple[TrainResult, Path], index: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, folder = undisturbed
    monkeypatch.setattr("pipelines.train.driver.ray_session", lambda: pytest.fail("Ray was asked for"))
    arguments = [item for setting in (*settings(folder), "model.embed_dim=24") for item in ("--set", setting)]
    with pytest.raises(CheckpointError, match=r"is of another run: model\.embed_dim was 16, now 24; give the values it began with"):
        CliRunner().invoke(
            mm.app, ["train", "clip-tiny", "--data", index.url, "--name", "tiny", "--resume", *arguments], catch_exceptions=False
        )


def test_a_finished_run_is_not_continued(undisturbed: tuple[TrainResult, Path], index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    result, folder = undisturbed
    before = (folder / "runs" / "tiny" / "bundle" / "mm.json").stat().st_mtime_ns
    elsewhere = tiny_run(folder, 1).model_copy(update={"tracking": TrackingConfig()})  # by default a store in the working folder
    monkeypatch.chdir(folder / "runs")
    for asked in ({"resume": True}, {"or_resume": True}):
        assert train(TrainRequest(elsewhere, (Source(index=index.url),), name="tiny", **asked), Console(json=True)) == result
    assert (folder / "runs" / "tiny" / "bundle" / "mm.json").stat().st_mtime_ns == before
    assert not (folder / "runs" / "mlflow.db").exists()


def test_what_mlflow_lacks_of_a_finished_run_is_told_by_the_next_command(undisturbed: tuple[TrainResult, Path], index: Index) -> None:
    """As where MLflow was away at the end, or the driver was killed between its bundle and its last word."""
    result, folder = undisturbed
    client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    client.update_run(result.run_id, status="RUNNING")
    bundle = Path(client.get_run(result.run_id).info.artifact_uri.removeprefix("file://")) / "bundle"
    shutil.rmtree(bundle)
    spool = Spool(spool_folder(), result.run_id)
    spool.append(b'{"step": 1, "time_ms": 1, "values": {"unsent": 3.0}}\n')
    spool.close()
    again = train(TrainRequest(tiny_run(folder, 1), (Source(index=index.url),), name="tiny", resume=True), Console(json=True))
    assert again == result
    assert client.get_run(result.run_id).info.status == "FINISHED"
    assert (bundle / "mm.json").exists()
    assert [point.value for point in client.get_metric_history(result.run_id, "unsent")] == [3.0]


def test_a_run_that_is_not_there_yet_is_started(index: Index, tmp_path: Path) -> None:
    run = tiny_run(tmp_path, 1)
    data = RunData.open((Source(index=index.url),))
    folder, record = claim(run, data, "new", resume=False, or_resume=True)
    assert (folder.name, record) == ("new", None)
    with pytest.raises(ConfigError, match="--or-resume needs --name"):
        claim(run, data, None, resume=False, or_resume=True)


def test_a_run_that_cannot_be_read_is_passed_over(
    undisturbed: tuple[TrainResult, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(undisturbed[1] / "runs" / "tiny", tmp_path / "tiny")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "run.json").write_text('{"name": "of another program"}')
    record = RunFolder.of(str(tmp_path), "tiny").read()
    assert newest_run(str(tmp_path), record.identity, record.data_fingerprint) == RunFolder.of(str(tmp_path), "tiny")
    assert "foreign holds no run that can be continued" in caplog.text
    assert "\n" not in caplog.records[-1].getMessage()


def test_a_run_that_another_command_has_taken_over_ends_without_a_checkpoint(index: Index, tmp_path: Path) -> None:
    """As where a head was cut off and its job goes on, beside the one that was submitted again."""
    long = tiny_run(tmp_path, 2, "steps=3000", "checkpoint.every_steps=20")

    def take_over() -> None:
        folder = tmp_path / "runs" / "tiny"
        while not reached(tmp_path, 20):
            time.sleep(0.05)
        (folder / "attempt").write_text(str(attempts(tmp_path) + 1))

    other = threading.Thread(target=take_over, daemon=True)
    other.start()
    with pytest.raises(TrainingError, match="another command has gone on with it since"):
        train(TrainRequest(long, (Source(index=index.url),), name="tiny"), Console(json=True))
    other.join(10)
    assert attempts(tmp_path) == 2
    assert not reached(tmp_path, 1000)
    record = RunFolder.of(str(tmp_path / "runs"), "tiny").read()
    assert MlflowClient(long.tracking.uri).get_run(record.tracking_run_id).info.status == "RUNNING"  # it is the other's


@pytest.mark.long
def test_a_gradient_that_is_not_finite_stops_the_run_and_names_the_batch(index: Index, tmp_path: Path) -> None:
    broken = tiny_run(tmp_path, 1)
    broken = broken.model_copy(update={"steps": 12, "optimizer": broken.optimizer.model_copy(update={"lr": 1e30})})
    with pytest.raises(TrainingError, match=r"the gradient of step \d+ is not finite.*synth-0-train-[^ ]+ …$"):
        train(TrainRequest(broken, (Source(index=index.url),), name="nan"), Console(json=True))
    (listed,) = (tmp_path / "mlartifacts").rglob("stopped_at.json")
    assert len(json.loads(listed.read_text())) == broken.global_batch_size
    assert not list((tmp_path / "runs" / "nan").glob("checkpoint_*"))


@pytest.mark.long
def test_shards_that_lose_their_pictures_stop_the_run(index: Index, corpus: Path, tmp_path: Path) -> None:
    """Every second sample is damaged after indexing, sizes and times kept: each is replaced and counted, then the bound is reached."""
    shard = tmp_path / "s.tar"
    data = bytearray((corpus / "train" / "00000.tar").read_bytes())
    shard.write_bytes(data)
    damaged = build_index([str(shard)], str(tmp_path / "index"))
    times = shard.stat()
    for row in damaged.locators[::2]:
        data[row["start"] : row["start"] + 512] = bytes(512)
    shard.write_bytes(data)
    os.utime(shard, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(TrainingError, match=r"could not be read, above data.max_bad_fraction 0.1: changed \d+"):
        train(TrainRequest(tiny_run(tmp_path, 1), (Source(index=damaged.url),), name="damaged"), Console(json=True))


def test_a_start_that_was_killed_before_its_run_was_there_is_begun_anew(
    index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whom the kernel ends between the tracking run and its record, it leaves no time to clear up."""
    tiny, data = tiny_run(tmp_path, 1), RunData.open((Source(index=index.url),))
    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "write", lambda *_: sys.exit(137))
        patch.setattr(RunFolder, "remove", lambda _: None)
        patch.setattr("pipelines.train.begin.finish_run", lambda *_: None)
        folder, _ = claim(tiny, data, "tiny", resume=False, or_resume=True)
        with pytest.raises(SystemExit):
            begin(tiny, data, folder, None)
    assert runs_of(tiny) == ["RUNNING"]
    folder, record = claim(tiny, data, "tiny", resume=False, or_resume=True)
    assert record is None
    begun = begin(tiny, data, folder, None)
    assert claim(tiny, data, "tiny", resume=False, or_resume=True) == (folder, begun)
    assert {path.name for path in (tmp_path / "runs" / "tiny").iterdir()} == {"run.json", "tokenizer"}
    assert runs_of(tiny) == ["RUNNING", "KILLED"]


def test_of_two_that_begin_a_run_the_later_goes_on_and_loses_nothing(index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The earlier one waits for its tracking server meanwhile."""
    tiny, data = tiny_run(tmp_path, 1), RunData.open((Source(index=index.url),))
    folder, _ = claim(tiny, data, "tiny", resume=False, or_resume=True)
    create, others = create_run, list[RunRecord]()

    def create_late(*arguments: Any, **named: Any) -> str:
        monkeypatch.setattr("pipelines.train.begin.create_run", create)
        own = create(*arguments, **named)
        others.append(begin(tiny, data, folder, None))
        return own

    monkeypatch.setattr("pipelines.train.begin.create_run", create_late)
    with pytest.raises(ConfigError, match="another command has begun"):
        begin(tiny, data, folder, None)
    assert folder.read() == others[0]
    assert (tmp_path / "runs" / "tiny" / "tokenizer").is_dir()
    assert runs_of(tiny) == ["RUNNING", "KILLED"]


def test_a_run_that_another_command_began_since_is_left_alone(index: Index, tmp_path: Path) -> None:
    """Between the look whether there is one and the start lie Ray's own start and the tokenizer's training."""
    tiny, data = tiny_run(tmp_path, 1), RunData.open((Source(index=index.url),))
    folder, _ = claim(tiny, data, "tiny", resume=False, or_resume=True)
    record = begin(tiny, data, folder, None)
    tokenizer = tmp_path / "runs" / "tiny" / "tokenizer" / "tokenizer.json"
    written = tokenizer.stat().st_mtime_ns
    with pytest.raises(ConfigError, match="exists: continue it with --resume"):
        begin(tiny, data, folder, None)
    assert (folder.read(), tokenizer.stat().st_mtime_ns) == (record, written)
    assert runs_of(tiny) == ["RUNNING"]


def test_a_start_that_was_killed_while_it_cleared_up_is_begun_anew(index: Index, tmp_path: Path) -> None:
    tiny, data = tiny_run(tmp_path, 1), RunData.open((Source(index=index.url),))
    (tmp_path / "runs" / "tiny").mkdir(parents=True)
    (tmp_path / "runs" / "tiny" / "begun.0a1b2c3d.tmp").write_text("half a ma")
    folder, record = claim(tiny, data, "tiny", resume=False, or_resume=True)
    assert record is None
    assert begin(tiny, data, folder, None) == folder.read()


def runs_of(run: TrainRun) -> list[str]:
    """The states of its tracking runs, the newest first."""
    client = MlflowClient(run.tracking.uri)
    return [found.info.status for found in client.search_runs([each.experiment_id for each in client.search_experiments()])]


def test_a_folder_that_is_no_run_is_left_alone(index: Index, tmp_path: Path) -> None:
    (tmp_path / "runs" / "tiny").mkdir(parents=True)
    (tmp_path / "runs" / "tiny" / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match="exists and holds no run: give another --name"):
        run(index, tmp_path, 1, tmp_path / "audit")
    assert (tmp_path / "runs" / "tiny" / "thesis.txt").read_text() == "mine"
