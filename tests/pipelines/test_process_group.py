"""Ending the ranks' process group."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import ray
from ray.actor import ActorHandle

from pipelines.train.process_group import ProcessGroupConfig


@ray.remote(num_cpus=0, max_concurrency=2)
class Rank:
    """As Ray Train's: it runs what it is told."""

    def execute(self, function: Callable[..., object], **arguments: Any) -> object:
        return function(**arguments)

    def answers(self) -> bool:
        importlib.import_module("ray.train.torch")  # as a rank's process has
        return True


class Hangs(Rank.__ray_actor_class__):  # type: ignore[misc, name-defined]
    def execute(self, function: Callable[..., object], **arguments: Any) -> object:
        time.sleep(3600)
        return None


class Worker(NamedTuple):
    actor: ActorHandle


class Group(list[Worker]):
    """What the group of a run's workers is asked for."""

    def execute_async(self, function: Callable[..., object], **arguments: Any) -> list[ray.ObjectRef]:
        return [worker.actor.execute.remote(function, **arguments) for worker in self]

    def get_workers(self) -> list[Worker]:
        return self


def test_a_rank_that_hangs_is_ended_and_the_others_leave(ray_cluster: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.train.process_group._LEAVE_S", 10)  # the machine may be busy
    hanging = ray.remote(num_cpus=0, max_concurrency=2)(Hangs)
    group = Group(Worker(actor) for actor in (Rank.remote(), hanging.remote(), Rank.remote()))
    ray.get([worker.actor.answers.remote() for worker in group])
    config = ProcessGroupConfig(backend="gloo")
    config.backend_cls().on_shutdown(group, config)
    with pytest.raises(ray.exceptions.RayActorError):
        ray.get(group[1].actor.answers.remote(), timeout=60)
    assert ray.get([group[rank].actor.answers.remote() for rank in (0, 2)], timeout=60) == [True, True]


def test_a_rank_that_is_gone_keeps_no_other_from_leaving(ray_cluster: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.train.process_group._LEAVE_S", 60)
    group = Group(Worker(Rank.remote()) for _ in range(2))
    ray.get([worker.actor.answers.remote() for worker in group])
    ray.kill(group[0].actor)
    config = ProcessGroupConfig(backend="gloo")
    config.backend_cls().on_shutdown(group, config)
    assert ray.get(group[1].actor.answers.remote(), timeout=60)
