"""Whichever process of the endpoint is killed, callers who try again as `mm.Client` does get right answers, and another takes its place.

They try more often than it does by itself: on one machine nobody listens until Serve's controller, which looks every ten seconds, has
started another proxy."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest

import mm
from mm_core.bundle import Bundle
from pipelines.registry import RegistryModels
from serve.fleet import application_of
from serve.run import Server
from tests.serve.conftest import PATIENCE_S, make_bundle, register, wait

TEXT = "a red circle"
VERSION = application_of("models:/tiny/1")
KINDS = {
    "gateway": "ray::ServeReplica:mm:Gateway",
    "keeper": "ray::ServeReplica:mm:Keeper",
    "searcher": "ray::ServeReplica:mm:Searcher",
    "preparer": f"ray::ServeReplica:{VERSION}:Preparer",
    "encoder": f"ray::ServeReplica:{VERSION}:Encoder",
    "proxy": "ray::ProxyActor",
    "controller": "ray::ServeController",
}


def processes(kind: str) -> list[int]:
    """Of this test's Ray, but for those that are gone by the time they are looked at."""
    found = []
    for one in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if " ".join(one.cmdline()).startswith(KINDS[kind]):
                found.append(one.pid)
    return found


@pytest.mark.chaos
def test_whatever_is_killed_answers_stay_right(
    server: Server, client: httpx.Client, bundle: Bundle, registry: RegistryModels, point: Callable[[str, int], None], tmp_path: Path
) -> None:
    """All the while the alias points at a version that is damaged: a new keeper must not forget who answers."""
    damaged = register(
        registry, make_bundle(tmp_path / "damaged", 2, spoil=lambda model: model.text_projection.weight.data.fill_(float("nan")))
    )
    point("champion", damaged)
    wait(client, lambda state: "no numbers" in (state["refused"] or ""))
    expected, counts, done, killed = bundle.text_features([TEXT])[0], Counter[str](), threading.Event(), "nothing"

    def ask() -> None:
        with mm.Client(server.url, retries=20) as asking:
            while not done.is_set():
                try:
                    right = np.abs(asking.embed(TEXT)[0] - expected).max() < 1e-5 and asking.search(TEXT, limit=1).results
                    counts["right" if right else "wrong"] += 1
                except mm.RefusedError as error:
                    counts[f"failed after {killed} was killed: {error}"] += 1

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        for kind in KINDS:
            (before,), killed = processes(kind), kind
            os.kill(before, signal.SIGKILL)
            end = time.monotonic() + PATIENCE_S
            while not (found := processes(kind)) or found == [before]:
                assert time.monotonic() < end, f"no other {kind} came"
                time.sleep(0.5)
            time.sleep(5)
    finally:
        done.set()
        for thread in threads:
            thread.join()
        print(counts)
    assert set(counts) == {"right"}
    (state,) = client.get("/readyz").json()["models"]
    assert state["answers"] == {"models:/tiny/1": 100.0}
    assert "no numbers" in state["refused"]
