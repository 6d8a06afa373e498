"""`mm demo` as a user runs it, on shards of their own, with the training cut short; then its bundle as transformers sees it."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from mlflow import MlflowClient
from transformers import AutoTokenizer, CLIPModel

from mm_core.bundle import load_bundle
from mm_core.data.image import decode_centre

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
    assert result["passed"]
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


def test_the_bundle_is_transformers_own(demo: tuple[dict[str, Any], Path, str], corpus: Path) -> None:
    """The features that mm serves are those of `CLIPModel.from_pretrained` on the same pixels, to 1e-5."""
    folder = Path(demo[0]["train"]["bundle"])
    bundle, model = load_bundle(folder), CLIPModel.from_pretrained(folder).eval()
    with tarfile.open(corpus / "train" / "00000.tar") as tar:
        member = tar.extractfile("00000000.jpg")
        assert member is not None
        image = decode_centre(member.read(), bundle.image_size)
    mean, std = (np.asarray(v, dtype=np.float32) for v in (bundle.towers.mean, bundle.towers.std))
    pixels = torch.from_numpy((image / np.float32(255) - mean) / std).permute(2, 0, 1)[None].float()
    ids = AutoTokenizer.from_pretrained(folder)(["a red circle"], padding="max_length", truncation=True, return_tensors="pt").input_ids
    with torch.no_grad():
        theirs = torch.nn.functional.normalize(model.get_image_features(pixel_values=pixels).pooler_output)
        texts = torch.nn.functional.normalize(model.get_text_features(input_ids=ids).pooler_output)
    np.testing.assert_allclose(bundle.image_features(image[None]), theirs.numpy(), atol=1e-5)
    np.testing.assert_allclose(bundle.text_features(["a red circle"]), texts.numpy(), atol=1e-5)


def test_the_registered_model_answers_with_the_same_features(
    demo: tuple[dict[str, Any], Path, str], corpus: Path, ray_cluster: None
) -> None:
    from pipelines.registry import resolve_model
    from pipelines.tracking import TrackingConfig
    from serve.config import ServeConfig
    from serve.run import free_port, look_at, start

    result, folder, _ = demo
    model = resolve_model("models:/clip-demo@champion", TrackingConfig(uri=f"sqlite:///{folder / 'mlflow.db'}"))
    bundle = load_bundle(result["train"]["bundle"])
    with tarfile.open(corpus / "train" / "00000.tar") as tar:
        member = tar.extractfile("00000001.jpg")
        assert member is not None
        data = member.read()
    config = ServeConfig(port=free_port())
    server = start(look_at(str(model), config), config)
    try:
        inputs = ["two blue squares", f"data:image/jpeg;base64,{base64.b64encode(data).decode()}"]
        answer = httpx.post(f"{server.url}/v1/embeddings", json={"input": inputs}, timeout=60)
    finally:
        server.stop()
    assert answer.status_code == 200, answer.text
    text, image = (np.asarray(row["embedding"]) for row in answer.json()["data"])
    np.testing.assert_allclose(text, bundle.text_features(["two blue squares"])[0], atol=1e-5)
    np.testing.assert_allclose(image, bundle.image_features(decode_centre(data, bundle.image_size)[None])[0], atol=1e-5)
