"""`mm serve` as a person runs it: its own process, its own Ray, until it is told to stop."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.request import Request, urlopen

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

import mm
from mm_core.errors import ConfigError
from mm_core.ports import free_port
from serve.cli import wanted_models
from serve.keys import digest, read_keys

_MM = [sys.executable, "-c", "from mm import main; main()"]


@contextmanager
def serving(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    command = [*_MM, "serve", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()


def test_a_port_in_use_is_one_line_and_exit_code_1(bundle_folder: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        done = subprocess.run([*_MM, "serve", str(bundle_folder), "--port", port], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: port {port} of 127.0.0.1 cannot be used")
    assert len(done.stderr.strip().splitlines()) == 1
    assert not done.stdout


def test_beyond_loopback_there_must_be_keys(bundle_folder: Path) -> None:
    done = subprocess.run([*_MM, "serve", str(bundle_folder), "--host", "0.0.0.0"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "mm serve-key" in done.stderr


def test_a_new_key_is_shown_once_and_its_digest_goes_to_the_file(tmp_path: Path) -> None:
    done = subprocess.run([*_MM, "serve-key", "ada"], capture_output=True, text=True, check=True)
    (tmp_path / "keys.txt").write_text(done.stdout)
    key = done.stderr.split()[-1]
    assert read_keys(tmp_path / "keys.txt") == {"ada": digest(key)}
    assert key not in done.stdout


def test_a_serve_yaml_describes_what_would_have_been_served(bundle_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, key = tmp_path / "serve.yaml", "a-key-for-this-test"
    command = [*_MM, "serve", f"small={bundle_folder}", "--host", "0.0.0.0", "--port", str(free_port()), "--set", "bounds.max_inputs=7"]
    environment = os.environ | {"MM_API_KEYS": f"ada={key}", "MM_SET__TRACKING__URI": "http://mlflow:5000"}
    subprocess.run([*command, "--write-config", str(path)], env=environment, check=True, capture_output=True)
    text = path.read_text()
    assert key not in text
    schema = ServeDeploySchema.model_validate(yaml.safe_load(text))
    (application,) = schema.applications
    assert application.import_path == "mm:serving"
    assert application.runtime_env["env_vars"] == {"MM_SET__TRACKING__URI": "http://mlflow:5000"}
    assert schema.http_options.host == "0.0.0.0"
    monkeypatch.setenv("MM_SET__TRACKING__URI", "sqlite:///nowhere.db")
    built = mm.serving(application.args)
    config = built._bound_deployment.init_args[0]
    assert config.bounds.max_inputs == 7
    assert config.keys == {"ada": digest(key)}


@pytest.mark.parametrize(
    ("models", "canaries", "words"),
    [
        (["a/x", "b/x"], [], "two models are called 'x'"),
        (["models:/a@champion", "models:/b@champion"], ["models:/c@x=5"], "belongs to none"),
        (["models:/a@champion"], ["models:/a@x"], "MODEL=PERCENT"),
        (["models:/a@champion"], ["models:/a@x=500"], "MODEL=PERCENT"),
    ],
)
def test_models_that_cannot_be_told_apart_are_refused(models: list[str], canaries: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        wanted_models(models, canaries)


def test_models_have_the_names_that_requests_use() -> None:
    found = wanted_models(["models:/a@champion", "runs/x/bundle", "mine=models:/b/3"], ["models:/a@challenger=5"])
    assert [(one.name, one.reference) for one in found] == [
        ("a@champion", "models:/a@champion"),
        ("bundle", "runs/x/bundle"),
        ("mine", "models:/b/3"),
    ]
    assert (found[0].canary, found[0].percent) == ("models:/a@challenger", 5)


@pytest.mark.slow
def test_it_answers_the_command_it_prints_and_stops_when_told(bundle_folder: Path) -> None:
    port = free_port()
    with serving(str(bundle_folder), "--port", str(port)) as process:
        assert process.stdout is not None
        printed = []
        for line in process.stdout:
            printed.append(line)
            if "curl" in line:
                break
        assert f"http://127.0.0.1:{port}" in "".join(printed), printed
        body = printed[-1].split("-d '")[1].rsplit("'", 1)[0]
        request = Request(f"http://127.0.0.1:{port}/v1/embeddings", body.encode(), {"content-type": "application/json"})
        with urlopen(request, timeout=60) as response:
            assert len(json.load(response)["data"]) == 1
        process.send_signal(signal.SIGTERM)
        rest, _ = process.communicate(timeout=90)
    assert process.returncode == 0, rest
    assert "Traceback" not in rest
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)) != 0
