"""What is looked at before anything is submitted: on the real head, and on what answers as others would."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest
import ray
from typer.testing import CliRunner

import mm
from cluster import target
from cluster.check import State, fail, ok
from cluster.head import Head
from mm_core.errors import ServiceError
from tests.cluster.answering import answering

if TYPE_CHECKING:
    from conftest import RunningHead


def mm_with(head: RunningHead, before: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The program in a process of its own, as Ray keeps a process' first token; `before` is run in it first."""
    command = [sys.executable, "-c", f"{before}\nimport mm\nmm.main()", *arguments]
    return subprocess.run(command, env=head.environment, capture_output=True, text=True, timeout=120)


@pytest.fixture
def open_door() -> Iterator[str]:
    """Answers whoever asks, as the job service of a head without a token does."""
    with answering(lambda _: (200, b"[]")) as address:
        yield address


def nobody(address: str) -> Head:
    return Head(address, cast(Any, None))


def test_doctor_looks_at_a_cluster_too(running_head: RunningHead) -> None:
    done = mm_with(running_head, "", "doctor", "--address", running_head.address, "--json")
    checks = json.loads(done.stdout.splitlines()[-1])["checks"]
    assert all(check.keys() == {"name", "state", "evidence", "remedy"} for check in checks)
    assert all(check["remedy"] for check in checks if check["state"] != "ok")
    found = {check["name"]: check for check in checks[:3]}
    assert [check["state"] for check in found.values()] == ["ok", "ok", "ok"]
    assert found["the cluster's Ray"]["evidence"] == ray.__version__
    assert found["the cluster's door"]["evidence"] == "asks for a token"
    assert found["the cluster's nodes"]["evidence"].startswith("1 nodes, 2 CPUs, 0 GPUs, ")


def test_a_head_that_does_not_answer_is_a_failed_check() -> None:
    done = CliRunner().invoke(mm.app, ["doctor", "--address", "http://127.0.0.1:9", "--json"])
    first, *others = json.loads(done.stdout.splitlines()[-1])["checks"]
    assert (done.exit_code, first["name"], first["state"]) == (1, "the cluster", "fail")
    assert first["evidence"].startswith("no Ray head answers at http://127.0.0.1:9 (")
    assert first["remedy"].startswith("start one with `ray start --head`")
    assert "Python" in [check["name"] for check in others]


def test_an_old_cluster_gets_no_job(running_head: RunningHead) -> None:
    old = "from cluster.machine import FLOORS; FLOORS['ray'] = '99'"
    command = ["submit", "--address", running_head.address, "--", "doctor"]
    done = mm_with(running_head, old, *command)
    assert done.returncode == 1
    assert re.search(r"nothing was submitted to .*: the cluster's Ray: .* Ray 99 or newer.*--skip-checks", done.stderr)
    assert len(done.stderr.splitlines()) == 1
    assert "job " not in done.stdout


def test_another_version_is_a_warning() -> None:
    check = target.version(cast(Head, SimpleNamespace(ray_version=lambda: "2.59.9")))
    assert (check.state, check.evidence) == (State.WARN, f"2.59.9, here {ray.__version__}")


def test_a_cluster_without_processors_is_a_warning() -> None:
    nodes = [{"state": "ALIVE", "resources_total": {"memory": 8e9}}, {"state": "DEAD", "resources_total": {"CPU": 4}}]
    (check,) = target.resources(cast(Head, SimpleNamespace(nodes=lambda: nodes)))
    assert (check.state, check.evidence) == (State.WARN, "1 nodes, 0 CPUs, 0 GPUs, 8 GB")


def test_an_open_head_on_this_machine_is_a_warning(open_door: str) -> None:
    assert target.door(nobody(open_door)).state is State.WARN


def test_an_open_head_on_another_machine_is_refused(open_door: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target, "is_this_machine", lambda address: False)
    check = target.door(nobody(open_door))
    assert (check.state, "RAY_AUTH_MODE=token" in check.remedy) == (State.FAIL, True)
    with pytest.raises(ServiceError, match="the cluster's door: open"):
        target.refuse([ok("a", "b"), check], open_door)


def test_an_open_head_behind_a_tunnel_is_refused_too(open_door: str) -> None:
    """Its address is this machine's; that the code is sent along says that it is not here."""
    assert target.door(nobody(open_door)).state is State.WARN
    assert target.door(nobody(open_door), elsewhere=True).state is State.FAIL


def test_what_is_good_passes_and_all_failures_are_told() -> None:
    target.refuse([ok("a", "b")], "http://head")
    with pytest.raises(ServiceError, match="a: seen: mend it; b: seen: mend that"):
        target.refuse([fail("a", "seen", "mend it"), fail("b", "seen", "mend that")], "http://head")


def test_only_failures_are_shown_where_only_they_are_wanted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith(("AWS_", "RAY_"))]:
        monkeypatch.delenv(name)
    assert CliRunner().invoke(mm.app, ["doctor", "--failures"]).output == ""
    shown = CliRunner().invoke(mm.app, ["doctor", "--failures", "--json"])
    assert (json.loads(shown.output), shown.exit_code) == ({"checks": [], "ok": 0, "warn": 0, "fail": 0}, 0)
    monkeypatch.setenv("MM_SET__TRACKING__URI", "sqlite:///absent/mlflow.db")
    done = CliRunner().invoke(mm.app, ["doctor", "--failures"])
    assert done.exit_code == 1
    assert "tracking store" in done.output
    assert "Python" not in done.output
