"""What a cluster lacks for a run is said before a worker starts."""

from __future__ import annotations

import pytest
import ray

from mm_core.config import resolve
from mm_core.console import Console
from mm_core.errors import ConfigError
from pipelines.recipes import recipe
from pipelines.train.config import TrainRun
from pipelines.train.launch import check_folders, check_resources, gpus_per_worker


def run_with(*overrides: str) -> TrainRun:
    return resolve(recipe("clip-tiny"), environment={}, overrides=overrides)[0]


class Notes(Console):
    """What a person is told."""

    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []

    def note(self, text: str) -> None:
        self.said.append(text)


GPUS = ("resources.workers=2", "resources.gpus_per_worker=1")


@pytest.fixture(autouse=True)
def _one_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "nodes", lambda: nodes("a", "a"))


def nodes(*hosts: str) -> list[dict[str, object]]:
    """What Ray tells of nodes, and of one that is gone."""
    gone = {"Alive": False, "NodeManagerHostname": "gone"}
    return [*({"Alive": True, "NodeManagerHostname": host} for host in hosts), gone]


FOLDERS = [("storage", "runs"), ("index", "s3://bucket/index"), ("audit", "/audit")]


@pytest.mark.parametrize(
    ("hosts", "folders", "noted"),
    [
        (("a", "b"), FOLDERS, ["storage runs, audit /audit: on all 2 machines it must be the same folder, or use a URL (s3://…)"]),
        (("a", "b"), FOLDERS[1:2], []),
        (("a", "a"), FOLDERS, []),
    ],
)
def test_folders_of_one_machine_are_none_for_two(
    hosts: tuple[str, ...], folders: list[tuple[str, str]], noted: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray, "nodes", lambda: nodes(*hosts))
    console = Notes()
    check_folders(folders, console)
    assert console.said == noted


def test_what_lies_beside_a_jobs_code_is_not_kept() -> None:
    beside = "/tmp/ray/session_1/runtime_resources/working_dir_files/_ray_pkg_1f/runs"
    with pytest.raises(ConfigError, match=r"^storage .*/runs: a job's code, and what it keeps beside it, is removed by Ray"):
        check_folders([("storage", beside), ("audit", "/audit")], Console())


@pytest.mark.parametrize("address", [None, "", "local"])
def test_gpus_that_this_machine_does_not_have(address: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 2.0, "GPU": 1.0})
    if address is not None:
        monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(ConfigError, match=r"2 workers with 1 GPUs each, but the cluster has 1$"):
        check_resources(run_with(*GPUS), Console())


@pytest.mark.parametrize(("gpus", "noted"), [(0.0, True), (1.0, True), (2.0, False)])
def test_gpus_that_a_cluster_may_still_get_are_waited_for(gpus: float, noted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.5:6379")
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 2.0, "GPU": gpus})
    console = Notes()
    check_resources(run_with(*GPUS), console)
    assert [f"the cluster has {gpus:g}: training waits" in text for text in console.said] == [True] * noted
    assert gpus_per_worker(run_with(*GPUS)) == 1


@pytest.mark.parametrize(("gpus", "taken"), [(0.0, 0), (2.0, 1)])
def test_unless_told_a_run_takes_the_gpus_there_are(gpus: float, taken: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.5:6379")
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"GPU": gpus})
    assert gpus_per_worker(run_with("resources.workers=2")) == taken


def test_fewer_gpus_than_workers_on_one_machine_are_left_alone_and_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 2.0, "GPU": 1.0})
    console = Notes()
    check_resources(run_with("resources.workers=2"), console)
    assert console.said == ["2 workers train on processors, as there are only 1 GPUs: --workers 1 takes those"]
    assert gpus_per_worker(run_with("resources.workers=2")) == 0


def test_a_cluster_with_fewer_gpus_than_workers_does_not_go_on_on_processors_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """As after the loss of a node."""
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.5:6379")
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 64.0, "GPU": 7.0})
    with pytest.raises(ConfigError, match="8 workers, but the cluster has 7 GPUs now: --workers 7 takes those"):
        check_resources(run_with("resources.workers=8"), Console())
    check_resources(run_with("resources.workers=8", "resources.gpus_per_worker=0"), Console())
    check_resources(run_with("resources.workers=8", "resources.min_workers=2"), Console())


def test_fp8_on_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 2.0})
    with pytest.raises(ConfigError, match="the workers have none: set precision=bf16"):
        check_resources(run_with("precision=fp8"), Console())


@pytest.mark.parametrize(("types", "refused"), [(["A100"], True), (["A100", "H100"], False), (["H200"], False), ([], False)])
def test_fp8_on_gpus_of_a_type(types: list[str], refused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What Ray tells of such clusters."""
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"GPU": 8.0} | {f"accelerator_type:{name}": 1.0 for name in types})
    if not refused:
        return check_resources(run_with("precision=fp8"), Console())
    with pytest.raises(ConfigError, match=r"the cluster's GPUs \(A100\) do not multiply fp8"):
        check_resources(run_with("precision=fp8"), Console())
