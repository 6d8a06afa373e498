"""An alias is followed under load with no failed request; a canary gets its share; what fails its checks never answers, and is named."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch

from mm_core.bundle import load_bundle
from pipelines.registry import RegistryModels
from pipelines.tracking import open_client
from serve.run import Server
from tests.serve.conftest import make_bundle, register, wait

TEXT = "a red circle"


@contextmanager
def load(server: Server, callers: int = 3) -> Iterator[list[httpx.Response]]:
    """Callers who ask one after the other, without trying again."""
    answers: list[httpx.Response] = []
    stop = threading.Event()

    def ask() -> None:
        with httpx.Client(base_url=server.url, timeout=60) as session:
            while not stop.is_set():
                answers.append(session.post("/v1/embeddings", json={"input": TEXT}))

    threads = [threading.Thread(target=ask) for _ in range(callers)]
    for thread in threads:
        thread.start()
    try:
        yield answers
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def vector(answer: httpx.Response) -> np.ndarray:
    return np.array(answer.json()["data"][0]["embedding"])


@pytest.mark.slow
def test_a_version_gets_a_share_and_then_takes_over_under_load_with_no_failed_request(
    server: Server, client: httpx.Client, registry: RegistryModels, bundle_folder: Path, tmp_path: Path, point: Callable[[str, int], None]
) -> None:
    folder = make_bundle(tmp_path / "second", 1)
    version = register(registry, folder)
    first, second = "models:/tiny/1", f"models:/tiny/{version}"

    def asked(session: str) -> str:
        return client.post("/v1/embeddings", json={"input": TEXT}, headers={"x-session-id": session}).headers["x-mm-version"]

    with load(server) as answers:
        point("challenger", version)
        wait(client, lambda state: state["answers"] == {first: 70.0, second: 30.0})
        versions = [asked(f"session {i}") for i in range(120)]
        assert 18 <= versions.count(second) <= 54, "36 of 120, four standard deviations either way"
        assert [asked(f"session {i}") for i in range(20)] == versions[:20]
        point("champion", version)
        wait(client, lambda state: state["answers"] == {second: 100.0})
        time.sleep(1)
    assert {answer.status_code for answer in answers} == {200}
    vectors = {name: load_bundle(f).text_features([TEXT])[0] for name, f in ((first, bundle_folder), (second, folder))}
    for answer in answers:
        np.testing.assert_allclose(vector(answer), vectors[answer.headers["x-mm-version"]], atol=1e-5)
    assert answers[0].headers["x-mm-version"] == first
    assert answers[-1].headers["x-mm-version"] == second
    found = client.post("/v1/search", json={"text": TEXT, "limit": 1})
    assert found.headers["x-mm-version"] == first, "the index was made with version 1, which stays for it"
    assert found.status_code == 200


def not_numbers(model: torch.nn.Module) -> None:
    with torch.no_grad():
        model.text_projection.weight[0, 0] = float("nan")  # type: ignore[union-attr, operator, index]


@pytest.mark.slow
def test_versions_that_fail_never_answer_and_are_named(
    server: Server, client: httpx.Client, registry: RegistryModels, tmp_path: Path, point: Callable[[str, int], None]
) -> None:
    damaged = register(registry, make_bundle(tmp_path / "damaged", 2))
    stored = Path(open_client(registry.tracking).get_model_version("tiny", str(damaged)).source.removeprefix("file://"))
    weights = next(stored.rglob("model.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    cases = {
        damaged: "SHA-256 differs",
        register(registry, make_bundle(tmp_path / "nan", 3, spoil=not_numbers)): "no numbers",
        999: "version",
    }
    with load(server, 1) as answers:
        for version, reason in cases.items():
            if version == 999:
                open_client(registry.tracking).delete_registered_model_alias("tiny", "champion")
            else:
                point("champion", version)
            state = wait(client, lambda state, reason=reason: reason in (state["refused"] or ""))  # type: ignore[misc]
            assert state["answers"] == {"models:/tiny/1": 100.0}
    assert {(answer.status_code, answer.headers["x-mm-version"]) for answer in answers} == {(200, "models:/tiny/1")}
    assert re.search(r'mm_version_refused\{gateway="[^"]+",model="tiny"\} 1\.0', client.get("/metrics").text)
