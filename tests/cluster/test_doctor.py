"""The checks against this machine, real sockets and real files."""

from __future__ import annotations

import base64
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from importlib.metadata import version
from pathlib import Path

import pytest

from cluster import machine, services
from cluster.check import Check, State
from cluster.needs import configured
from tests.cluster.answering import answering
from tests.tracking_server import TrackingServer

NOBODY = "127.0.0.1:9"


def tracking() -> Check:
    """Of what is configured."""
    (check, *_) = services.needed(configured())
    return check


@pytest.fixture
def listener() -> Iterator[int]:
    """A port somebody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in list(os.environ):
        if name.startswith(("RAY_", "AWS_", "HF_", "MM_SET__")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))


def test_the_command_reports_this_machine(tmp_path: Path) -> None:
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "mm", "doctor", "--json"]
    process = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    report = json.loads(process.stdout)
    checks = {check["name"]: check for check in report["checks"]}
    assert process.returncode == (1 if report["fail"] else 0)
    assert report["ok"] + report["warn"] + report["fail"] == len(report["checks"])
    assert {"Python", "ray", "torch", "memory", "GPUs", "port 8000", "Ray head", "tracking store"} <= set(checks)
    assert all(checks[name]["state"] == "ok" for name in ("Python", "ray", "mlflow", "torch", "other packages", "tracking store"))
    assert all(check["remedy"] for check in report["checks"] if check["state"] != "ok")
    assert list(tmp_path.iterdir()) == []


def test_a_failure_is_the_exit_code(tmp_path: Path) -> None:
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "RAY_ADDRESS": NOBODY}
    process = subprocess.run(
        [sys.executable, "-m", "mm", "doctor"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60
    )
    assert process.returncode == 1


def test_an_old_package_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(machine.FLOORS, "torch", "99")
    torch = next(check for check in machine.packages() if check.name == "torch")
    assert torch.state is State.FAIL
    assert ">=99" in torch.evidence


def test_a_folder_that_is_no_shared_memory_is_said(tmp_path: Path) -> None:
    assert machine.shared_memory(tmp_path / "absent").state is State.OK


def test_a_port_in_use_is_a_warning(monkeypatch: pytest.MonkeyPatch, listener: int) -> None:
    monkeypatch.setattr(services, "_PORTS", {listener: ("mm serve", "serve on another one")})
    (check,) = services.ports()
    assert check.state is State.WARN
    assert check.remedy == "serve on another one"


@pytest.mark.parametrize(
    ("mode", "token", "state"),
    [
        (None, False, State.WARN),
        (None, True, State.OK),
        ("token", True, State.OK),
        ("token", False, State.FAIL),
        ("disabled", True, State.WARN),
        ("basic", True, State.FAIL),
    ],
)
def test_ray_authentication(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, mode: str | None, token: bool, state: State) -> None:
    if token:
        (tmp_path / ".ray").mkdir()
        (tmp_path / ".ray" / "auth_token").write_text("geheim")
        (tmp_path / ".ray" / "auth_token").chmod(0o600)
    if mode:
        monkeypatch.setenv("RAY_AUTH_MODE", mode)
    check = services.ray_authentication()
    assert check.state is state
    assert "geheim" not in f"{check}"


def test_a_token_that_others_can_read_is_a_warning(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("geheim")
    (tmp_path / "token").chmod(0o644)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    check = services.ray_authentication()
    assert (check.state, check.remedy) == (State.WARN, f"chmod 600 {tmp_path / 'token'}")


def test_ray_head(monkeypatch: pytest.MonkeyPatch, listener: int) -> None:
    states = []
    for address in (None, f"127.0.0.1:{listener}", f"http://127.0.0.1:{listener}", NOBODY, "head", "head:many"):
        if address:
            monkeypatch.setenv("RAY_ADDRESS", address)
        states.append(services.ray_head().state)
    assert states == [State.OK, State.OK, State.WARN, State.FAIL, State.FAIL, State.FAIL]


def test_tracking_in_a_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert tracking().state is State.OK
    assert not (tmp_path / "mlflow.db").exists()
    monkeypatch.setenv("MM_SET__TRACKING__URI", "sqlite:///absent/mlflow.db")
    check = tracking()
    assert check.state is State.FAIL
    assert "absent does not exist" in check.evidence


@pytest.mark.parametrize("form", ["http://me:{}@host", "postgresql+psycopg2://me:{}@db/runs", "postgresql://db/runs?user=me&password={}"])
def test_a_tracking_store_with_a_password_fails_and_is_not_shown(monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    monkeypatch.setenv("MM_SET__TRACKING__URI", form.format("geheim"))
    check = tracking()
    assert (check.state, "carries a password" in check.evidence) == (State.FAIL, True)
    assert "geheim" not in f"{check}"


@pytest.mark.parametrize("uri", [f"http://{NOBODY}", f"postgresql+psycopg2://me@{NOBODY}/runs", "geheim", "file:geheim"])
def test_tracking_that_does_not_answer(monkeypatch: pytest.MonkeyPatch, uri: str) -> None:
    monkeypatch.setenv("MM_SET__TRACKING__URI", uri)
    check = tracking()
    assert check.state is State.FAIL
    assert "carries a password" not in check.evidence


def test_a_tracking_store_whose_driver_is_missing_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which MLflow would find out when the run begins, as an error of Python's."""
    monkeypatch.setenv("MM_SET__TRACKING__URI", f"mysql+pymysql://me@{NOBODY}/runs")
    check = tracking()
    assert (check.state, "pymysql" in check.evidence, "MLflow server" in check.remedy) == (State.FAIL, True, True)


@pytest.fixture(scope="module")
def tracking_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TrackingServer]:
    """Of which `localhost` is not among the names that it is told."""
    folder = tmp_path_factory.mktemp("server")
    server = TrackingServer(folder, f"sqlite:///{folder}/mlflow.db", variables={"MLFLOW_SERVER_ALLOWED_HOSTS": "127.0.0.1:*"})
    server.start()
    yield server
    server.kill()


def test_a_tracking_server_that_does_not_know_its_name_fails(monkeypatch: pytest.MonkeyPatch, tracking_server: TrackingServer) -> None:
    """As one on another machine is called: it says that it is well, and refuses every run."""
    uri = tracking_server.config.uri
    monkeypatch.setenv("MM_SET__TRACKING__URI", uri)
    assert tracking().state is State.OK
    called = uri.replace("127.0.0.1", "localhost")
    monkeypatch.setenv("MM_SET__TRACKING__URI", called)
    check = tracking()
    assert check.state is State.FAIL
    assert check.remedy == f"start the server with --allowed-hosts {called.removeprefix('http://')} among its options"
    monkeypatch.setitem(services.FLOORS, "mlflow", "999")
    monkeypatch.setenv("MM_SET__TRACKING__URI", uri)
    check = tracking()
    assert (check.state, "raise the server's MLflow to 999" in check.remedy) == (State.FAIL, True)


@pytest.fixture
def closed_server() -> Iterator[str]:
    """Answers as MLflow's server does that was started with `--app-name basic-auth`: its health to anybody, all else to whom it knows."""
    known = f"Basic {base64.b64encode(b'ada:geheim').decode()}"

    def answer(asked: BaseHTTPRequestHandler) -> tuple[int, bytes]:
        body = version("mlflow").encode() if asked.path == "/version" else b"{}"
        return 200 if asked.path == "/health" or asked.headers["Authorization"] == known else 401, body

    with answering(answer) as address:
        yield address


def test_a_tracking_server_that_refuses_the_credentials_fails(monkeypatch: pytest.MonkeyPatch, closed_server: str) -> None:
    monkeypatch.setenv("MM_SET__TRACKING__URI", closed_server)
    states = []
    for password in (None, "falsch", "geheim"):
        if password:
            monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "ada")
            monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", password)
        check = tracking()
        states.append((check.state, "HTTP status 401" in check.evidence, "MLFLOW_TRACKING_PASSWORD" in check.remedy))
        assert "falsch" not in f"{check}"
        assert "geheim" not in f"{check}"
    assert states == [(State.FAIL, True, True), (State.FAIL, True, True), (State.OK, False, False)]


def test_object_storage(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [check.state for check in services.object_storage()] == [State.OK]
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "geheim")
    (half,) = services.object_storage()
    assert (half.state, half.evidence) == (State.FAIL, "AWS_SECRET_ACCESS_KEY is set, AWS_ACCESS_KEY_ID is not")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "geheim")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{NOBODY}")
    both = services.object_storage()
    assert [check.state for check in both] == [State.OK, State.FAIL]
    assert "geheim" not in f"{both}"


def test_hugging_face(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", f"http://{NOBODY}")
    assert services.hugging_face().state is State.WARN
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert services.hugging_face().state is State.OK
