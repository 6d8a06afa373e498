"""`mm demo --keep` as a user runs it, on shards of their own, with the training cut short: its page is up at the end, until Ctrl-C."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from mlflow import MlflowClient

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def demo(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path, str]:
    """Its JSON, its folder, and what it showed."""
    folder = tmp_path_factory.mktemp("demo")
    command = [sys.executable, "-m", "mm", "demo", "--data", f"{corpus}/train/*.tar", "--json", "--keep"]
    environment = os.environ | {"MM_SET__STEPS": "30", "MM_SET__CHECKPOINT__EVERY_STEPS": "20"}
    with (folder / "stdout").open("w") as out:
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=out, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
    with process, watchdog(process, 400):
        assert process.stderr is not None
        shown = list[str]()
        for line in process.stderr:
            shown.append(line)
            if line.startswith("The page:"):
                break
        assert shown, "it said nothing"
        (url,) = re.findall(r"The page: +(http://\S+) until Ctrl-C", shown[-1]) or [pytest.fail("".join(shown))]
        assert "<title>mm</title>" in httpx.get(url).text
        os.killpg(process.pid, signal.SIGINT)  # as a terminal's Ctrl-C, which all of its processes get
        shown += process.stderr
        process.wait()
    assert process.returncode == 0, "".join(shown)
    for noise in ("Traceback", "INFO", "Warning", "(raylet)"):
        assert noise not in "".join(shown)
    return json.loads((folder / "stdout").read_text().splitlines()[-1]), folder, "".join(shown)


@contextmanager
def watchdog(process: subprocess.Popen[str], seconds: float) -> Iterator[None]:
    """Ends a process that hangs, or that a failed test leaves, and whoever waits for a line of it."""
    timer = threading.Timer(seconds, process.kill)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        process.kill()


def test_every_stage_ran(demo: tuple[dict[str, Any], Path, str]) -> None:
    result, _, shown = demo
    assert all(f"{stage}/7" in shown for stage in range(1, 8))
    assert result["train"]["steps"] == 30
    assert set(result["eval"]["retrieval"]) == {"t2i_r1", "t2i_r5", "t2i_r10", "i2t_r1", "i2t_r5", "i2t_r10"}
    assert result["register"] == {"name": "clip-demo", "version": 1, "alias": "champion"}
    assert result["serve"]["answer"]
    with pytest.raises(httpx.ConnectError):
        httpx.get(result["serve"]["url"], timeout=2)


def test_the_run_is_in_mlflow_whole(demo: tuple[dict[str, Any], Path, str]) -> None:
    result, folder, _ = demo
    client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    run = client.get_run(result["train"]["run_id"])
    assert run.info.status == "FINISHED"
    wanted = {
        "loss",
        "loss/contrastive",
        "lr",
        "logit_scale",
        "samples_per_s",
        "time_fraction/data_wait",
        "time_fraction/forward",
        "time_fraction/collective",
        "grad_norm",
        "memory/rss_gb",
    }
    assert wanted <= set(run.data.metrics)
    assert "eval/retrieval/t2i_r5" in run.data.metrics
    assert [m.step for m in client.get_metric_history(run.info.run_id, "loss")] == [10, 20, 30]
    assert run.data.params["recipe"] == "clip-tiny"
    assert run.inputs.dataset_inputs[0].dataset.name == "index"
    artifacts = {f.path for path in ("", "bundle", "plots") for f in client.list_artifacts(run.info.run_id, path)}
    assert {"bundle/model.safetensors", "bundle/mm.json", "plots/loss.png", "plots/recall.png", "plots/retrieval.png"} <= artifacts
    version = client.get_model_version_by_alias("clip-demo", "champion")
    assert version.run_id == run.info.run_id
    assert any("fingerprint" in tag for tag in version.tags)
