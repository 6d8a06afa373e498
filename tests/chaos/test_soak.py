"""How much of its time a run trains where something is struck every few minutes (ETTR): `MM_SOAK_MINUTES=60 MM_SOAK_EVERY_S=600 python -m
pytest -m chaos -s tests/chaos/test_soak.py`. Other intervals give the curve of ETTR by the time between failures."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections import Counter
from pathlib import Path

import pytest

from mm_core.data.index import Index
from mm_core.data.ledger import compile_kept
from tests.chaos import faults
from tests.chaos.cluster import Nodes, Training
from tests.chaos.faults import ENVIRONMENT, Fault, Outage, Role, Scene, table
from tests.tracking_server import TrackingServer

MINUTES = float(os.environ.get("MM_SOAK_MINUTES", "0"))
EVERY_S = float(os.environ.get("MM_SOAK_EVERY_S", "600"))
pytestmark = [pytest.mark.chaos, pytest.mark.skipif(not MINUTES, reason="takes as long as it is told to: MM_SOAK_MINUTES=60")]
SETTINGS = (*faults.SETTINGS, "steps=10000000", "global_batch_size=40", "log_every_steps=20", "checkpoint.every_steps=100")
LOST = ("start_up", "restart", "replayed", "checkpoint")
"""Parts of the wall time in which nothing new is learned."""


def test_a_run_trains_nearly_all_of_the_time(corpus: Path, nodes: Nodes, server: TrackingServer, tmp_path: Path) -> None:
    index = nodes.index(corpus / "train", tmp_path / "index")
    training = Training(index, tmp_path, nodes, SETTINGS, ENVIRONMENT, server.config.uri)
    struck, wall_s = soak(Scene(training, nodes, Outage(server), random.Random(0)))
    seconds = json.loads(training.read("goodput.json"))["seconds"]
    ettr = sum(value for part, value in seconds.items() if part not in LOST) / wall_s
    print(f"{wall_s / 60:.1f} minutes, {len(struck)} faults, one each {EVERY_S:g} s: ETTR {ettr:.3f}")
    print(table(struck, training))
    each_sample_came_once(training, index)
    assert ettr >= 0.95 or EVERY_S < 600


def soak(scene: Scene) -> tuple[list[Fault], float]:
    """The faults, and the wall time from the command on."""
    training, struck, began = scene.training, list[Fault](), time.monotonic()
    training.start(2)
    training.wait(lambda: training.step > 0)
    while (left_s := began + 60 * MINUTES - time.monotonic()) > EVERY_S:
        time.sleep(EVERY_S)
        struck.append(scene.struck(scene.draw.choice([role for role in Role if role.ends_workers])))
    time.sleep(max(0.0, left_s))
    training.process.send_signal(signal.SIGINT)
    training.process.wait(timeout=60)
    return struck, time.monotonic() - began


def each_sample_came_once(training: Training, index: Index) -> None:
    """In every epoch that is over."""
    found = Counter((epoch, uid) for step in training.consumed().values() for epoch, _, uid in step)
    assert set(found.values()) == {1}
    last = max(epoch for epoch, _ in found)
    samples = len(compile_kept(index))
    assert all(count == samples for epoch, count in Counter(epoch for epoch, _ in found).items() if epoch < last)
