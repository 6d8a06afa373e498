"""Submitting to a real head, as a user does: the mm command in a process of its own.

In the working folder of some tests lies a small `mm.py`, which the job finds before the installed one: it does quickly and
visibly what a training run does slowly.
"""

from __future__ import annotations

import json
import secrets
import shlex
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import httpx
import psutil
import pytest
from ray.runtime_env import RuntimeEnv

from cluster import again
from cluster.cli import _place
from cluster.head import Head, choose_address, is_this_machine
from cluster.run_names import named, run_of, submission_id
from cluster.submit import (
    _STOP,
    Elsewhere,
    Here,
    InImage,
    Request,
    _runtime_env,
    _stage,
    entrypoint,
    passed_variables,
    pinned,
    read_labels,
    submit,
)
from mm_core.errors import ConfigError

if TYPE_CHECKING:
    from conftest import RunningHead

LOOK = "python -m mm doctor --nodes --failures --before"
RUN_ID = "0123456789abcdef" * 2


def mm(head: RunningHead, *arguments: str, folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    # -P: this process must be the real mm, whatever lies in the folder.
    command = [sys.executable, "-P", "-m", "mm", *arguments]
    environment = head.environment | {"RAY_API_SERVER_ADDRESS": head.address} | variables
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=240)


def result_of(process: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert process.stdout, process.stderr
    values: dict[str, Any] = json.loads(process.stdout.splitlines()[-1])
    return values


def test_a_job_runs_in_the_callers_folder_and_joins_the_cluster(running_head: RunningHead, tmp_path: Path) -> None:
    folder = tmp_path / "a folder"
    folder.mkdir()
    (folder / "mm.py").write_text(
        "import json, os, pathlib, ray, sys\n"
        "from pipelines.session import ray_session\n"
        "with ray_session():\n"
        "    port = ray.get_runtime_context().gcs_address.split(':')[-1]\n"
        "pathlib.Path('seen').write_text(json.dumps([sys.argv[1:], os.environ['MM_SECRET'], port]))\n"
        f"print('run x   mlflow run {RUN_ID} (experiment mm)')\n"
    )
    arguments = ["train", "clip-tiny", "--set", "name=it's $HOME; *"]

    process = mm(running_head, "submit", "--json", "--env", "MM_SECRET", "--", *arguments, folder=folder, MM_SECRET="s3cr3t")

    assert process.returncode == 0, process.stderr
    job = result_of(process)
    assert job["run_id"] == RUN_ID
    named = [*arguments, "--name", job["name"], "--or-resume"]
    assert job["job_id"] == f"{job['name']}-1"
    assert json.loads((folder / "seen").read_text()) == [named, "s3cr3t", running_head.gcs_port]
    assert f"resume: mm submit --json --env MM_SECRET -- {shlex.join(named)}" in process.stderr
    assert f"mm jobs logs -f {job['job_id']}" in process.stderr
    listed = mm(running_head, "jobs", "list", "--json", folder=tmp_path)
    assert result_of(listed)["jobs"][0]["job_id"] == job["job_id"]
    assert "s3cr3t" not in process.stdout + process.stderr + listed.stdout + listed.stderr


def test_a_driver_that_is_killed_is_started_again_by_its_job(running_head: RunningHead, tmp_path: Path) -> None:
    (tmp_path / "mm.py").write_text(
        "import os, pathlib, signal, sys\n"
        "first = not pathlib.Path('seen').exists()\n"
        "pathlib.Path('seen').open('a').write(' '.join(sys.argv[1:]) + '\\n')\n"
        "if first:\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        f"print('run x   mlflow run {RUN_ID} (experiment mm)')\n"
    )
    job = result_of(mm(running_head, "submit", "--json", "--", "train", "clip-tiny", "--name", "killed", folder=tmp_path))
    followed = mm(running_head, "jobs", "logs", "-f", job["job_id"], folder=tmp_path)
    assert followed.returncode == 0, followed.stdout
    assert "was killed (SIGKILL)" in followed.stdout
    assert (tmp_path / "seen").read_text() == "train clip-tiny --name killed --or-resume\n" * 2


class Listed:
    """Lists of processes, one after the other until the block ends: command lines with a word in them."""

    def __init__(self, word: str) -> None:
        self._word, self._over = word, threading.Event()
        self.lines = set[str]()
        self._thread = threading.Thread(target=self._look)

    def __enter__(self) -> Listed:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._over.wait(0.05):
            self.lines |= {line for line in self.now() if self._word in line}

    @staticmethod
    def now() -> list[str]:
        return [" ".join(process.info["cmdline"] or ()) for process in psutil.process_iter(["cmdline"])]


def in_logs(head: RunningHead, text: str) -> list[Path]:
    return [file for file in head.logs.rglob("*") if file.is_file() and text.encode() in file.read_bytes()]


def test_a_secret_is_in_no_process_list_and_in_no_log(running_head: RunningHead, tmp_path: Path) -> None:
    """But of the programs that Ray is about to make workers of, which it gives them in an argument."""
    secret = secrets.token_hex(16)
    (tmp_path / "mm.py").write_text(
        "import os, pathlib, time, ray\n"
        "ray.init(address='auto')\n"
        "found = ray.get(ray.remote(lambda: os.environ['MM_SECRET']).remote())\n"
        "pathlib.Path('seen').write_text(found)\n"
        "while not pathlib.Path('end').exists():\n"
        "    time.sleep(0.1)\n"
    )
    options = ["submit", "--json", "--wait-s", "0", "--env", "MM_SECRET", "--", "train"]
    with Listed(secret) as listed:
        submitted = mm(running_head, *options, folder=tmp_path, MM_SECRET=secret)
        job = result_of(submitted)["job_id"]
        until = time.monotonic() + 120
        while not (tmp_path / "seen").exists():
            assert time.monotonic() < until, mm(running_head, "jobs", "logs", job, folder=tmp_path).stdout
            time.sleep(0.2)
        at_last = listed.now()
    (tmp_path / "end").touch()
    assert (tmp_path / "seen").read_text() == secret
    assert not [line for line in at_last if secret in line]
    assert not [line for line in listed.lines if "ray/_private/workers/setup_worker.py" not in line]
    shown = mm(running_head, "jobs", "logs", "-f", job, folder=tmp_path)
    assert secret not in submitted.stdout + submitted.stderr + shown.stdout + shown.stderr
    assert in_logs(running_head, secret) == []


def test_a_secret_is_in_no_log_where_the_environment_cannot_be_made(running_head: RunningHead, tmp_path: Path) -> None:
    secret, program = secrets.token_hex(16), tmp_path / "submit.py"
    program.write_text(
        "import os, sys, time\n"
        "from ray.job_submission import JobSubmissionClient\n"
        "client = JobSubmissionClient(sys.argv[1])\n"
        "env = {'env_vars': {'MM_SECRET': os.environ['MM_SECRET']}, 'conda': 'no-such-environment'}\n"
        "job = client.submit_job(entrypoint='true', runtime_env=env)\n"
        "while not client.get_job_status(job).is_terminal():\n"
        "    time.sleep(0.2)\n"
        "print(client.get_job_info(job).message)\n"
    )
    environment = running_head.environment | {"MM_SECRET": secret}
    command = [sys.executable, str(program), running_head.address]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240)
    assert "runtime_env" in done.stdout, done.stderr
    assert secret not in done.stdout
    assert in_logs(running_head, secret) == []


def test_code_is_sent_to_a_head_elsewhere(running_head: RunningHead, tmp_path: Path) -> None:
    options = ["--send-code", "--python", sys.executable, "--json"]
    process = mm(running_head, "submit", *options, "--", "doctor", "--json", folder=tmp_path)
    job = result_of(process)
    assert job["status"] == "SUCCEEDED", process.stderr
    assert job["run_id"] is None
    assert '"checks": [' in process.stderr
    assert "Uploading" not in process.stderr


def test_a_failed_job_shows_its_last_lines(running_head: RunningHead, tmp_path: Path) -> None:
    process = mm(running_head, "submit", "--json", "--", "train", "--no-such-option", folder=tmp_path)
    assert process.returncode == 1
    assert "--no-such-option" in process.stderr
    assert result_of(process)["status"] == "FAILED"


def test_follow_and_stop(running_head: RunningHead, tmp_path: Path) -> None:
    (tmp_path / "mm.py").write_text("import time\nprint('begun')\ntime.sleep(600)\n")
    process = mm(running_head, "submit", "--json", "--wait-s", "0", "--", "train", folder=tmp_path)
    assert process.returncode == 0, process.stderr
    assert "follow it as above" in process.stderr
    job = result_of(process)["job_id"]
    environment = running_head.environment | {"RAY_API_SERVER_ADDRESS": running_head.address}
    command = [sys.executable, "-P", "-m", "mm", "jobs", "logs", "-f", job]
    follower = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert follower.stdout is not None
    assert any("begun" in line for line in follower.stdout)

    stopped = mm(running_head, "jobs", "stop", job, "--json", folder=tmp_path)

    assert result_of(stopped) == {"job_id": job, "stopped": True, "ended": True}
    _, shown = follower.communicate(timeout=60)
    assert follower.returncode == 1
    assert "stopped" in shown
    assert "begun" in mm(running_head, "jobs", "logs", job, folder=tmp_path).stdout
    again = mm(running_head, "jobs", "stop", job, "--json", folder=tmp_path)
    assert result_of(again) == {"job_id": job, "stopped": False, "ended": True}


def test_a_run_has_one_job_at_a_time_and_its_next_one_goes_on(running_head: RunningHead, tmp_path: Path) -> None:
    (tmp_path / "mm.py").write_text("import time\nprint('begun')\ntime.sleep(600)\n")
    options = ["--json", "--wait-s", "0", "--label", "team=vision", "--driver-cpus", "1"]

    def submit() -> dict[str, Any]:
        return result_of(mm(running_head, "submit", *options, "--", "train", "clip-tiny", "--name", "only", folder=tmp_path))

    first, second = submit(), submit()
    assert (first["job_id"], first["new"]) == ("only-1", True)
    assert (second["job_id"], second["new"]) == ("only-1", False)
    other = mm(running_head, "submit", *options, "--", "train", "clip-b32", "--name", "only", folder=tmp_path)
    assert other.returncode == 2
    assert "only-1 has not ended and trains a run of this name by another command (mm train clip-tiny --name only" in other.stderr
    (tmp_path / "other").mkdir()
    elsewhere = mm(running_head, "submit", *options, "--", "train", "clip-tiny", "--name", "only", folder=tmp_path / "other")
    assert elsewhere.returncode == 2
    assert f"in {tmp_path}" in elsewhere.stderr
    stopped = mm(running_head, "jobs", "stop", "only-1", folder=tmp_path)
    assert "only-1 has ended" in stopped.stdout
    third = submit()
    assert (third["job_id"], third["new"]) == ("only-2", True)
    jobs = result_of(mm(running_head, "jobs", "list", "--json", folder=tmp_path))["jobs"]
    assert jobs[0]["labels"] == {"team": "vision", "mm.run": "only"}
    assert jobs[0]["command"] == "mm train clip-tiny --name only --or-resume"
    mm(running_head, "jobs", "stop", "only-2", folder=tmp_path)


def test_a_job_nobody_knows_is_named(running_head: RunningHead, tmp_path: Path) -> None:
    process = mm(running_head, "jobs", "logs", "raysubmit_none", folder=tmp_path)
    assert process.returncode == 2
    assert "raysubmit_none" in process.stderr
    assert len(process.stderr.splitlines()) == 1


def test_the_given_address_wins_and_another_token_is_refused(running_head: RunningHead, tmp_path: Path) -> None:
    other = tmp_path / "token"
    other.write_text("0" * 64)
    command = ["jobs", "list", "--address", running_head.address]
    assert mm(running_head, *command, folder=tmp_path, RAY_API_SERVER_ADDRESS="http://127.0.0.1:9").returncode == 0
    refused = mm(running_head, *command, folder=tmp_path, RAY_AUTH_TOKEN_PATH=str(other))
    assert refused.returncode == 1
    assert "asks for a token" in refused.stderr
    assert len(refused.stderr.splitlines()) == 1


class Line:
    """A port in front of another one, whose connections can be cut, as proxies and tunnels do."""

    def __init__(self, port: int) -> None:
        self._behind, self._open = port, list[socket.socket]()
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = self._listening.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> int:
        """How many sockets were closed."""
        closing, self._open = self._open, []
        for each in closing:
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()
        return len(closing)

    def close(self) -> None:
        self._listening.close()
        self.cut()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                asking, _ = self._listening.accept()
                answering = socket.create_connection(("127.0.0.1", self._behind))
                self._open += [asking, answering]
                for ends in ((asking, answering), (answering, asking)):
                    threading.Thread(target=self._pass_on, args=ends, daemon=True).start()

    def _pass_on(self, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                sink.sendall(data)
        with suppress(OSError):
            sink.shutdown(socket.SHUT_WR)


def test_a_log_is_followed_on_when_the_line_is_cut(running_head: RunningHead, tmp_path: Path) -> None:
    (tmp_path / "mm.py").write_text(
        "import pathlib, time\nprint('<first>', flush=True)\nwhile not pathlib.Path('go').exists():\n    time.sleep(0.1)\nprint('<last>')\n"
    )
    job = result_of(mm(running_head, "submit", "--json", "--wait-s", "0", "--", "train", folder=tmp_path))["job_id"]
    line = Line(int(running_head.address.rpartition(":")[2]))
    command = [sys.executable, "-P", "-m", "mm", "jobs", "logs", "-f", job, "--address", f"http://127.0.0.1:{line.port}"]
    following = subprocess.Popen(
        command, cwd=tmp_path, env=running_head.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0
    )
    try:
        assert following.stdout is not None
        seen = b""
        while b"<first>" not in seen:
            seen += (read := following.stdout.readline())
            assert read, following.communicate()
        assert line.cut() >= 2
        (tmp_path / "go").touch()
        rest, said = following.communicate(timeout=60)
    finally:
        following.kill()
        line.close()
    assert following.returncode == 0, said.decode()
    assert ((seen + rest).count(b"<first>"), rest.count(b"<last>")) == (1, 1), "and the words are in no path of the log's first lines"


def test_a_head_with_a_token_refuses_who_has_none(running_head: RunningHead, tmp_path: Path) -> None:
    """Over HTTP, by the command line, and a driver that would join."""
    assert httpx.get(f"{running_head.address}/api/jobs/").status_code == 401
    variables = {"HOME": str(tmp_path), "RAY_AUTH_TOKEN_PATH": str(tmp_path / "none"), "RAY_gcs_server_request_timeout_seconds": "5"}
    refused = mm(running_head, "jobs", "list", "--address", running_head.address, folder=tmp_path, **variables)
    assert refused.returncode == 1
    assert "token" in refused.stderr
    assert len(refused.stderr.splitlines()) == 1
    join = [sys.executable, "-c", f"import ray; ray.init(address='127.0.0.1:{running_head.gcs_port}')"]
    for mode in ("token", "disabled"):
        environment = running_head.environment | variables | {"RAY_AUTH_MODE": mode}
        joined = subprocess.run(join, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
        assert joined.returncode != 0
        assert "oken" in joined.stdout + joined.stderr


def test_a_token_is_sent_although_no_variable_asks_for_it(running_head: RunningHead, tmp_path: Path) -> None:
    environment = {name: value for name, value in running_head.environment.items() if name != "RAY_AUTH_MODE"}
    command = [sys.executable, "-m", "mm", "jobs", "list", "--json", "--address", running_head.address]
    process = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert process.returncode == 0, process.stderr
    assert isinstance(result_of(process)["jobs"], list)


def test_nobody_at_the_address(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mm", "submit", "--address", "http://127.0.0.1:9", "--", "train", "clip-tiny"]
    process = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert process.returncode == 1
    assert "http://127.0.0.1:9" in process.stderr
    assert "ray start --head" in process.stderr
    assert len(process.stderr.splitlines()) == 1


def test_address_by_precedence() -> None:
    both = {"RAY_API_SERVER_ADDRESS": "http://a:8265/", "RAY_ADDRESS": "http://b:8265"}
    assert choose_address("https://given:1", both) == "https://given:1"
    assert choose_address(None, both) == "http://a:8265"
    assert choose_address(None, {"RAY_ADDRESS": "http://b:8265"}) == "http://b:8265"


def test_ports_that_drivers_join_by_are_not_the_job_service() -> None:
    with pytest.raises(ConfigError, match="http://HOST:8265"):
        choose_address("ray://head:10001", {})
    with pytest.raises(ConfigError, match="http://HOST:8265"):
        choose_address("head:6379", {})
    assert choose_address(None, {"RAY_ADDRESS": "auto"}) == "http://127.0.0.1:8265"


def test_an_address_with_a_password_is_refused_without_showing_it() -> None:
    with pytest.raises(ConfigError, match="carries a password") as error:
        choose_address("http://me:geheim@head:8265", {})
    assert "geheim" not in str(error.value)


def test_this_machine_is_told_from_others() -> None:
    assert is_this_machine("http://127.0.0.1:8265")
    assert is_this_machine("http://localhost:8265")
    assert not is_this_machine("http://198.51.100.7:8265")  # reserved for documentation: nobody's
    assert not is_this_machine("http://no-such-host.invalid:8265")


def test_what_is_sent_is_code_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkout = tmp_path / "checkout"
    for name in ("mm_core/data/tar.py", "pipelines/index.py", "serve/page/page.js", "cluster/submit.py", "mm.py", "pyproject.toml"):
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        (checkout / name).write_text("code")
    for name in (".env", "data/shard.tar", "runs/first/run.json", "cluster/compose/secrets/aws", "cluster/__pycache__/x.pyc"):
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        (checkout / name).write_text("mine")
    monkeypatch.setattr("cluster.submit._source", lambda: checkout)
    _stage(tmp_path / "staged")
    assert {file.read_text() for file in (tmp_path / "staged").rglob("*") if file.is_file()} == {"code"}


def test_entrypoint_is_quoted() -> None:
    assert entrypoint(["train", "a b"], Elsewhere(checked=False)) == "exec python -m mm train 'a b'"
    quoted = shlex.quote("train 'a b'")
    assert entrypoint(["train", "a b"], Elsewhere()) == f"{LOOK} {quoted} && exec python -m mm train 'a b'"
    assert entrypoint(["x;y"], Here(Path("/a b"))) == f"cd '/a b' && exec {sys.executable} -m mm 'x;y'"
    looked = entrypoint(["eval", "x"], Here(Path("/a"), checked=True))
    assert looked == f"cd /a && {LOOK.replace('python', sys.executable, 1)} 'eval x' && exec {sys.executable} -m mm eval x"


@pytest.mark.parametrize(("addresses", "checked"), [(("10.0.0.1", "10.0.0.1"), False), (("10.0.0.1", "10.0.0.2"), True)])
def test_a_head_of_this_machine_with_others_behind_it_is_looked_at_from_inside(addresses: tuple[str, ...], checked: bool) -> None:
    nodes = [{"state": "ALIVE", "node_ip": address} for address in addresses] + [{"state": "DEAD", "node_ip": "10.0.0.9"}]
    head = cast(Head, SimpleNamespace(address="http://127.0.0.1:8265", nodes=lambda: nodes))
    assert _place(head, None, "python", None, checked=True) == Here(Path.cwd(), checked)
    assert _place(head, None, "python", None, checked=False) == Here(Path.cwd())
    assert _place(head, True, "python3", None, checked=True) == Elsewhere("python3")


def test_a_run_is_started_again_where_its_driver_is_killed() -> None:
    run = ["train", "x", "--name", "r"]
    assert entrypoint(run, Elsewhere(checked=False)) == "exec python cluster/again.py python -m mm train x --name r"
    assert entrypoint(run, InImage("i", checked=False)) == "exec python -m cluster.again python -m mm train x --name r"
    assert entrypoint(run, Here(Path("/a"))) == f"cd /a && exec {sys.executable} {again.__file__} {sys.executable} -m mm train x --name r"


def test_a_training_command_has_a_name_and_can_be_given_again() -> None:
    now = datetime(2026, 1, 2, 3, 4, 5)
    assert named(["train", "clip-tiny"], now) == ["train", "clip-tiny", "--name", "clip-tiny-20260102-030405", "--or-resume"]
    assert named(["train", "my/clip.yaml"], now)[3] == "clip-20260102-030405"
    assert named(["train", "--data", "s3://bucket/index", "clip-tiny"], now)[5] == "clip-tiny-20260102-030405", "no option's value"
    assert named(["train", "my clip v2.yaml", "--workers", "2"], now)[5] == "my-clip-v2-20260102-030405", "what a name may have"
    assert named(["train", "--resize", "clip-tiny"], now)[4] == "run-20260102-030405", "it could be a value"
    assert named(["--debug", "train", "x", "--name", "a"], now) == ["--debug", "train", "x", "--name", "a", "--or-resume"]
    assert named(["train", "x", "--name=a"], now) == ["train", "x", "--name=a", "--or-resume"]
    with pytest.raises(ConfigError, match="--resume without --name"):
        named(["train", "x", "--resume"], now)
    for as_it_is in (["train", "x", "--name", "a", "--resume"], ["train", "x", "--dry-run"], ["doctor"], []):
        assert named(as_it_is, now) == as_it_is
    assert [run_of(["train", "x", *more]) for more in (["--name", "a"], ["--name=b"], [])] == ["a", "b", None]
    assert run_of(["train", "x", "--name", "a", "--name=b"]) == "b", "as the program takes it"
    assert len(named(["train", f"{'x' * 120}.yaml"], now)[3]) <= 100
    assert run_of(["eval", "--name", "a"]) is None
    assert submission_id("a b/c", ()) == "a-b-c-1"
    assert submission_id("a b/c", ("a-b-c-9", "a-b-c-10", "raysubmit_x")) == "a-b-c-11", "also where others were deleted"


def test_labels_have_a_form() -> None:
    assert read_labels(["a=b", "c=d=e"]) == {"a": "b", "c": "d=e"}
    with pytest.raises(ConfigError, match="not of the form KEY=VALUE"):
        read_labels(["team"])
    with pytest.raises(ConfigError, match="--name"):
        read_labels(["mm.run=x"])


def test_what_is_installed_there_is_what_is_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the index's build of a version, whatever this machine has."""
    monkeypatch.setattr("cluster.submit.version", lambda name: {"torch": "2.13.0+cpu"}.get(name, "1"))
    pins = pinned()
    assert "torch==2.13.0" in pins
    assert not [pin for pin in pins if pin.startswith("ray")]
    with _runtime_env(Request(Here(Path("/")), {"A": "1"}, install=True)) as env:
        assert env == {"env_vars": _STOP | {"A": "1"}, "pip": {"packages": pins, "pip_check": False}}
        RuntimeEnv(**env)  # as Ray looks at it


def test_an_image_brings_everything() -> None:
    place = InImage("registry/mm:1")
    assert entrypoint(["train", "x"], place) == f"{LOOK} 'train x' && exec python -m mm train x"
    with _runtime_env(Request(place)) as env:
        assert env == {"env_vars": _STOP, "image_uri": "registry/mm:1"}
        RuntimeEnv(**env)
    with pytest.raises(ConfigError, match="--env A: Ray gives variables to containers"), _runtime_env(Request(place, {"A": "1"})):
        pass
    with pytest.raises(ConfigError, match="leave out --install"), _runtime_env(Request(place, install=True)):
        pass


@pytest.mark.parametrize("form", ["postgresql://me:{}@db/x", "postgresql://db/x?user=me&password={}"])
def test_a_command_with_a_password_is_not_submitted_and_the_password_not_shown(form: str) -> None:
    nobody = Head("http://127.0.0.1:9", cast(Any, None))  # it is not asked
    with pytest.raises(ConfigError, match=r"tracking\.uri=.*\*\*\*.* carries a password.*--env NAME") as error:
        submit(nobody, ["train", "clip-tiny", "--set", f"tracking.uri={form.format('geheim')}"], Request(Here(Path("/"))))
    assert "geheim" not in str(error.value)


def test_variables_are_passed_by_name_only() -> None:
    assert passed_variables(["A"], {"A": "1", "B": "2"}) == {"A": "1"}
    with pytest.raises(ConfigError, match="--env C is not set"):
        passed_variables(["C"], {})
    with pytest.raises(ConfigError, match="give the name alone") as error:
        passed_variables(["A=geheim"], {})
    assert "geheim" not in str(error.value)
