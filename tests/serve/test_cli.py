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

from serve.address import free_port

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
