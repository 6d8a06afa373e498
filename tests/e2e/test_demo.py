"""`mm demo` as a user runs it, on shards of their own, with the training cut short."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
from mlflow import MlflowClient

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def demo(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path, str]:
    folder = tmp_path_factory.mktemp("demo")
    command = [sys.executable, "-m", "mm", "demo", "--data", f"{corpus}/train/*.tar", "--json"]
    environment = os.environ | {"MM_SET__STEPS": "30", "MM_SET__CHECKPOINT__EVERY_STEPS": "20"}
    process = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=400)
    assert process.returncode == 0, process.stderr
    for noise in ("Traceback", "INFO", "Warning", "(raylet)"):
        assert noise not in process.stderr
    return json.loads(process.stdout.splitlines()[-1]), folder, process.stderr


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
