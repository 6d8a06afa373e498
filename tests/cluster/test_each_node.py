"""What nodes find when they look at themselves: two real ones, and answers as other clusters would give."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import ray
from ray.exceptions import RayTaskError

from cluster import each_node, machine
from cluster.check import State, fail, ok, warn
from cluster.needs import configured
from cluster.nodes import Room

if TYPE_CHECKING:
    from conftest import RunningHead


def look(environment: dict[str, str], *options: str) -> tuple[int, list[dict[str, Any]]]:
    command = [sys.executable, "-m", "mm", "doctor", "--nodes", "--json", *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout.splitlines()[-1])["checks"]


def test_the_node_on_which_something_fails_is_named(running_head: RunningHead, tmp_path: Path) -> None:
    """The second finds an older package than mm needs, as a node of another image does."""
    environment = running_head.environment | {"RAY_ADDRESS": running_head.cluster.gcs_address}
    _, alone = look(environment)
    assert (alone[0]["name"], alone[0]["state"]) == ("the nodes", "ok")
    assert alone[0]["evidence"] == "each of 1 has looked at itself: nothing is amiss"
    (tmp_path / "transformers-0.1.dist-info").mkdir()
    (tmp_path / "transformers-0.1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: transformers\nVersion: 0.1\n")
    path = os.pathsep.join(filter(None, (str(tmp_path), environment.get("PYTHONPATH"))))
    grown = running_head.cluster.add(Room(cpus=1, memory=1 << 30, object_store=80 << 20), running_head.environment | {"PYTHONPATH": path})
    try:
        grown.wait()
        nobodys = environment | {"MM_SET__TRACKING__URI": "http://127.0.0.1:9"}
        code, failures = look(nobodys, "--failures", "--before", "train clip-tiny --data index")
        _, untracked = look(nobodys, "--failures", "--before", "data index shards --out index")
    finally:
        grown.lose(grown.nodes[-1])
    assert code == 1
    found = {check["name"].partition(" (")[0]: check["evidence"] for check in failures}
    assert found.keys() == {"transformers of node1", "tracking store of all 2 nodes"}, "and what they say this machine need not say again"
    assert found["transformers of node1"].startswith("0.1 is outside ")
    assert [check["name"].partition(" (")[0] for check in untracked] == ["transformers of node1"], "its command tracks nothing"


@pytest.mark.parametrize("address", ["", "local", "127.0.0.1:9", "http://127.0.0.1:9"])
def test_without_a_cluster_the_check_fails(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """At once: Ray itself would try for minutes."""
    monkeypatch.setenv("RAY_ADDRESS", address)
    (check,) = each_node.checks(configured())
    assert (check.name, check.state) == ("the nodes", State.FAIL)
    assert "RAY_ADDRESS" in check.remedy


@pytest.mark.parametrize(
    ("error", "name", "state", "said"),
    [
        (ray.exceptions.GetTimeoutError("x"), "the answer", State.WARN, "none in 120 s"),
        (ray.exceptions.NodeDiedError("x"), "the node", State.WARN, "NodeDiedError"),
        (RayTaskError("look", "a traceback\nModuleNotFoundError: No module 'x'\n", ValueError()), "the look", State.FAIL, "No module 'x'"),
        (ray.exceptions.RuntimeEnvSetupError("pip\nERROR: No matching distribution"), "the job's environment", State.FAIL, "No matching"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
)  # fmt: skip
def test_a_node_without_an_answer(error: Exception, name: str, state: State, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lost or silent, it is a warning, as runs go on without one; where nothing of mm can start, it would stop them."""

    def refuse(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(ray, "get", refuse)
    (check,) = each_node._read(None)
    assert (check.name, check.state) == (name, state)
    assert said in check.evidence
    assert check.remedy


def test_without_a_token_nothing_is_shown_but_what_to_do(running_head: RunningHead, tmp_path: Path) -> None:
    environment = running_head.environment | {"RAY_ADDRESS": running_head.cluster.gcs_address, "MM_SECRET": "geheim"}
    code, checks = look(environment | {"RAY_AUTH_TOKEN_PATH": str(tmp_path / "absent"), "HOME": str(tmp_path)}, "--failures")
    assert (code, checks[0]["name"]) == (1, "the nodes")
    assert "Ray authentication" in checks[0]["remedy"]
    assert "geheim" not in json.dumps(checks)


def test_what_is_amiss_on_several_nodes_is_said_once() -> None:
    full, low = fail("disk", "0.1 GB free at /tmp", "free space"), warn("memory", "1.0 GB of 8.0 GB free", "end other programs")
    found = each_node.summary({"a": [full, ok("torch", "2.13.0")], "b": [full, low, ok("torch", "2.13.0")], "c": [ok("torch", "2.13.0")]})
    assert [(check.name, check.state) for check in found] == [("disk of a, b", State.FAIL), ("memory of b", State.WARN)]
    assert [check.name for check in each_node.summary({"a": [full], "b": [full]})] == ["disk of all 2 nodes"]


def test_nodes_with_other_versions_are_a_warning() -> None:
    (check,) = each_node.summary({"a": [ok("torch", "2.13.0")], "b": [ok("torch", "2.11.0")], "c": [ok("torch", "2.13.0")]})
    assert (check.name, check.state, check.evidence) == ("torch of the nodes", State.WARN, "2.13.0 on a, c; 2.11.0 on b")


def test_a_gpu_of_ray_that_torch_does_not_see_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert machine.gpus(of_ray=0).state is not State.FAIL
    check = machine.gpus(of_ray=2)
    assert (check.state, check.evidence.startswith("Ray gives 2 away, but torch ")) == (State.FAIL, True)
