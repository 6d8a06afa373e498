"""Two joined towers through the whole command: trained, killed, continued while the process that evaluates is killed too, exported."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import torch
from mlflow import MlflowClient
from transformers import VisionTextDualEncoderModel, ViTModel
from typer.testing import CliRunner, Result

import mm
from mm_core.bundle import load_bundle
from pipelines.index import build_index
from pipelines.train.audit import read_audit
from tests.mm_core.models.hub import write_hub

pytestmark = [pytest.mark.chaos, pytest.mark.usefixtures("ray_cluster")]
STEPS, GLOBAL_BATCH = 120, 40
SETTINGS = (
    f"steps={STEPS}", f"global_batch_size={GLOBAL_BATCH}", "data.chunk=8", "data.run_length=8", "precision=fp32", "log_every_steps=5",
    "checkpoint.every_steps=20", "model.image_size=32", "model.embed_dim=16", "model.context_length=12", "schedule.warmup_steps=10",
    "tracking.system_metrics=false",
)  # fmt: skip


def arguments(folder: Path, hub: Path, index: str, *more: str) -> list[str]:
    sources = (f"model.vision_source={hub / 'vit'}", f"model.text_source={hub / 'bert'}")
    settings = (*SETTINGS, *sources, f"storage={folder / 'runs'}", f"tracking.uri=sqlite:///{folder / 'mlflow.db'}", *more)
    command = ["train", "dual", "--data", index, "--name", "joined", "--audit", str(folder / "audit"), "--json"]
    return command + [item for setting in settings for item in ("--set", setting)]


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub")
    write_hub(folder)
    return folder


@pytest.fixture(scope="module")
def index(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    return build_index([str(corpus / "train")], str(tmp_path_factory.mktemp("dual") / "index")).url


@pytest.fixture(scope="module")
def killed(hub: Path, index: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its driver, after the first checkpoint."""
    folder = tmp_path_factory.mktemp("dual")
    with (folder / "log").open("wb") as log:
        driver = subprocess.Popen([sys.executable, "-m", "mm", *arguments(folder, hub, index)], stdout=log, stderr=log)
    end = time.monotonic() + 240
    try:
        while not list((folder / "runs" / "joined").glob("checkpoint_*/state.json")):
            assert driver.poll() is None, (folder / "log").read_text()
            assert time.monotonic() < end, (folder / "log").read_text()
            time.sleep(0.02)
    finally:
        driver.kill()
        driver.wait()
    assert not (folder / "runs" / "joined" / "bundle").exists()
    return folder


def kill_evaluator(killed: threading.Event, over: threading.Event) -> None:
    """With SIGKILL, once and while it evaluates: Ray names its processes after what they do."""
    while not over.wait(0.05):
        for process in psutil.Process(os.getpid()).children(recursive=True):
            with suppress(psutil.Error):
                if "SnapshotEvaluator.evaluate" in " ".join(process.cmdline()):
                    process.send_signal(signal.SIGKILL)
                    killed.set()
                    return


@pytest.fixture(scope="module")
def resumed(killed: Path, hub: Path, index: str, corpus: Path) -> Result:
    """Evaluated in the background, where the first evaluation's process is killed."""
    pairs = build_index([str(corpus / "heldout")], str(killed / "heldout")).url
    evaluation = ("evaluation.every_steps=80", "evaluation.background=true", f"evaluation.retrieval={pairs}")
    struck, over = threading.Event(), threading.Event()
    killer = threading.Thread(target=kill_evaluator, args=(struck, over))
    killer.start()
    try:
        result = CliRunner().invoke(mm.app, [*arguments(killed, hub, index, *evaluation), "--resume"], catch_exceptions=False)
    finally:
        over.set()
        killer.join()
    assert struck.is_set(), "no evaluation was seen"
    return result


def test_a_killed_run_of_joined_towers_goes_on_where_it_was(resumed: Result, killed: Path) -> None:
    report = json.loads(resumed.stdout.splitlines()[-1])
    assert (resumed.exit_code, report["steps"]) == (0, STEPS)
    rows = read_audit(str(killed / "audit")).to_pylist()
    assert [row["position"] for row in rows] == list(range(STEPS * GLOBAL_BATCH))
    assert {row["attempt"] for row in rows} == {1, 2}


def test_its_bundle_is_transformers_own_model_with_the_locked_tower_as_it_came(resumed: Result, hub: Path) -> None:
    bundle = json.loads(resumed.stdout.splitlines()[-1])["bundle"]
    model = VisionTextDualEncoderModel.from_pretrained(bundle)
    source = ViTModel.from_pretrained(hub / "vit")
    torch.testing.assert_close(model.vision_model.state_dict(), source.state_dict())
    features = load_bundle(bundle).text_features(["a red circle", "a blue square"])
    assert features.shape == (2, 16)
    assert abs(float(features[0] @ features[1])) < 0.9999


def test_an_evaluation_whose_process_is_killed_is_lost_and_the_next_one_is_not(resumed: Result, killed: Path) -> None:
    assert "the evaluation of step 80 in the background failed, training goes on: " in " ".join(resumed.stderr.split())
    client = MlflowClient(f"sqlite:///{killed / 'mlflow.db'}")
    run_id = json.loads(resumed.stdout.splitlines()[-1])["run_id"]
    assert [metric.step for metric in client.get_metric_history(run_id, "eval/retrieval/t2i_r1")] == [STEPS]
