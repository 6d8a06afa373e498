"""What the whole suite shares: one embedded Ray, small corpora, tiny bundles. Real photos come from MM_TEST_DATA or ../shared/data."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from socket import socket

import pytest
import torch
import torch.distributed as dist
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

from tests.object_store import ObjectStore, reserve

torch.set_num_threads(1)
# A shell's background job ignores Ctrl-C, and so would every command that a test starts and interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)


class Apart(LoadScopeScheduling):
    """What `pytest -n 2` runs beside the rest: tests of heads of their own, which mostly wait, and each file that needs no Ray."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.split("::")[0]
        package = file.split("/")[1]
        return {"cluster": package, "serve": package, "mm_core": file}.get(package, "the rest")


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> Apart:
    return Apart(config, log)


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test reads or writes the user's cache."""
    os.environ["MM_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    os.environ["HF_HUB_OFFLINE"] = "1"
    yield
    del os.environ["MM_CACHE"]


@pytest.fixture(scope="session", autouse=True)
def _own_object_store() -> Iterator[socket]:
    """Whatever a test, or a worker it starts, calls S3 is a port of this machine; `object_store` serves it."""
    with reserve(os.environ) as bound:
        yield bound


@pytest.fixture(scope="session")
def object_store(_own_object_store: socket) -> Iterator[ObjectStore]:
    with ObjectStore(_own_object_store) as store:
        yield store


@pytest.fixture(scope="session")
def ray_cluster(_own_cache: None, _own_object_store: socket) -> Iterator[None]:
    """One embedded Ray for the session: starting it costs as much as many tests. Four CPUs, so that three ranks fit.

    Idle workers, which have imported all, stay for the next test."""
    from pipelines.session import ray_session

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_num_workers_soft_limit", "12")
        patch.setenv("RAY_idle_worker_killing_time_threshold_ms", "600000")
        with ray_session(cpus=4):
            yield


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    """Of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rendered scenes: train/ (4 shards, 330 samples), heldout/ and zeroshot/."""
    from mm_core.data.synth.corpus import SynthConfig, write_corpus

    folder = tmp_path_factory.mktemp("corpus")
    settings = SynthConfig(samples=330, samples_per_shard=100, image_size=48, heldout_samples=60, zeroshot_samples=96)
    write_corpus(folder, settings)
    return folder


def photos_folder() -> Path | None:
    folder = Path(os.environ.get("MM_TEST_DATA") or Path(__file__).parents[2] / "shared" / "data")
    return folder if folder.is_dir() else None


@pytest.fixture(scope="session")
def photos() -> Path:
    """Real photographs and captions.

    Skips where they are absent: they are not ours to ship.
    """
    folder = photos_folder()
    if folder is None:
        pytest.skip("no test photos: set MM_TEST_DATA")
    return folder
