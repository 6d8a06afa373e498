"""What a cluster lacks for a run is said before a worker starts."""

from __future__ import annotations

import pytest
import ray

from mm_core.config import resolve
from mm_core.errors import ConfigError
from pipelines.recipes import recipe
from pipelines.train.config import TrainRun
from pipelines.train.launch import check_resources


def run_with(*overrides: str) -> TrainRun:
    return resolve(recipe("clip-tiny"), environment={}, overrides=overrides)[0]


def test_gpus_that_are_not_there(ray_cluster: None) -> None:
    with pytest.raises(ConfigError, match=r"2 workers with 1.0 GPUs each, but the cluster has 0"):
        check_resources(run_with("resources.workers=2", "resources.gpus_per_worker=1"))


def test_fp8_on_processors(ray_cluster: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.train.launch.check_fp8_installed", lambda: None)
    with pytest.raises(ConfigError, match="the workers have none: set precision=bf16"):
        check_resources(run_with("precision=fp8"))


@pytest.mark.parametrize(("types", "refused"), [(["A100"], True), (["A100", "H100"], False), (["H200"], False), ([], False)])
def test_fp8_on_gpus_of_a_type(types: list[str], refused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What Ray tells of such clusters."""
    monkeypatch.setattr("pipelines.train.launch.check_fp8_installed", lambda: None)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"GPU": 8.0} | {f"accelerator_type:{name}": 1.0 for name in types})
    if not refused:
        return check_resources(run_with("precision=fp8"))
    with pytest.raises(ConfigError, match=r"the cluster's GPUs \(A100\) do not multiply fp8"):
        check_resources(run_with("precision=fp8"))
