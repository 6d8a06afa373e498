"""What `mm serve --write-config` writes, Ray's own `serve deploy` brings up on a cluster, and changes there."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import numpy as np
import pytest

from mm_core.bundle import load_bundle
from mm_core.ports import free_port
from tests.cluster.conftest import RunningHead
from tests.serve.conftest import make_bundle

PATIENCE_S = 180
_MM = [sys.executable, "-c", "from mm import main; main()"]
_SERVE = [sys.executable, "-c", "from ray.serve.scripts import cli; cli()"]


def until(url: str, wanted: Callable[[httpx.Response], bool]) -> httpx.Response:
    end = time.monotonic() + PATIENCE_S
    while True:
        try:
            answer = httpx.post(f"{url}/v1/embeddings", json={"input": ["a red circle", "two blue squares"]}, timeout=30)
            if wanted(answer):
                return answer
        except httpx.TransportError as error:
            answer = error  # type: ignore[assignment]
        assert time.monotonic() < end, answer
        time.sleep(0.3)


@pytest.mark.long
def test_serve_deploy_takes_what_mm_serve_writes(running_head: RunningHead, tmp_path: Path) -> None:
    folder, port, config = make_bundle(tmp_path / "tiny", 0), free_port(), tmp_path / "serve.yaml"

    def deploy(*settings: str) -> None:
        command = [*_MM, "serve", str(folder), "--port", str(port), "--write-config", str(config), *settings]
        subprocess.run(command, check=True, capture_output=True, env=running_head.environment)
        command = [*_SERVE, "deploy", str(config), "--address", running_head.address]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=running_head.environment)
        assert done.returncode == 0, done.stderr

    url = f"http://127.0.0.1:{port}"
    try:
        deploy()
        answer = until(url, lambda answer: answer.status_code == 200)
        vectors = [row["embedding"] for row in answer.json()["data"]]
        np.testing.assert_allclose(vectors, load_bundle(folder).text_features(["a red circle", "two blue squares"]), atol=1e-5)
        deploy("--set", "bounds.max_inputs=1")
        assert "at most 1" in until(url, lambda answer: answer.status_code == 413).json()["detail"]
    finally:
        command = [*_SERVE, "shutdown", "--yes", "--address", running_head.address]
        subprocess.run(command, check=True, capture_output=True, env=running_head.environment)
