"""The disk of a run fills up: it ends with an error that says so, its last whole checkpoint stays, and with room again it goes on."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from mm_core.data.index import Index
from tests.chaos.cluster import Nodes, Training

pytestmark = pytest.mark.chaos
STEPS, GLOBAL_BATCH = 400, 40
SETTINGS = (f"steps={STEPS}", f"global_batch_size={GLOBAL_BATCH}")
DISK_MB = 64


@pytest.fixture
def index(corpus: Path, tmp_path: Path, nodes: Nodes) -> Index:
    return nodes.index(corpus / "train", tmp_path / "index")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small one; only root may mount it."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_MB}m", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("a disk of its own cannot be mounted here: run as root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(disk: Path) -> Path:
    """To the last byte."""
    file = disk / "filler"
    with file.open("wb", buffering=0) as filler, suppress(OSError):
        while filler.write(bytes(1 << 16)):
            pass
    return file


def test_a_full_disk_loses_nothing(index: Index, nodes: Nodes, disk: Path, tmp_path: Path) -> None:
    undisturbed = Training(index, tmp_path / "undisturbed", nodes, SETTINGS)
    undisturbed.folder.mkdir()
    undisturbed.start(2)
    undisturbed.wait(lambda: undisturbed.ended, timeout_s=600)

    training = Training(index, tmp_path / "filled", nodes, SETTINGS, storage=disk)
    training.folder.mkdir()
    training.start(2)
    training.wait(lambda: training.step >= STEPS // 8)
    filler = fill(disk)
    at = training.step
    assert training.process.wait(timeout=300) not in (0, None)
    print(training.log)
    assert "No space left on device" in training.log
    assert training.step >= at  # what was whole is whole

    filler.unlink()
    began = time.monotonic()
    training.start(2)
    training.wait(lambda: training.step > at)
    print(f"{time.monotonic() - began:.1f} s from the resumption to a checkpoint")
    training.wait(lambda: training.ended, timeout_s=600)
    assert training.consumed() == undisturbed.consumed()
    assert training.final_loss == pytest.approx(undisturbed.final_loss, rel=1e-5)
