"""An MLflow server on loopback that can be killed and started again on its port."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from mm_core.ports import free_port
from pipelines.tracking import TrackingConfig, outage

_START_S = 300


class TrackingServer:
    """Its logs, and what else it writes, lie in `folder`. `store` is where it keeps runs, `artifacts` where it keeps files."""

    def __init__(self, folder: Path, store: str, artifacts: str = "artifacts", variables: Mapping[str, str] | None = None) -> None:
        port = free_port()
        self.folder, self.config = folder, TrackingConfig(uri=f"http://127.0.0.1:{port}")
        # The store in a variable, as cluster/compose has it: no list of processes shows a password in it.
        own = {"MLFLOW_BACKEND_STORE_URI": store, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}  # else nine processes of 240 MB for jobs
        self._environment = os.environ | own | dict(variables or {})
        self._command = [
            sys.executable,
            "-m",
            "mlflow",
            "server",
            "--port",
            str(port),
            "--workers",
            "1",
            "--artifacts-destination",
            artifacts,
        ]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with (self.folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                self._command, cwd=self.folder, env=self._environment, stdout=log, stderr=log, start_new_session=True
            )
        until = time.monotonic() + _START_S
        while outage(self.config.uri) is not None:
            if self._process.poll() is not None or time.monotonic() > until:
                self.kill()
                raise AssertionError((self.folder / "server.log").read_text()[-2000:])
            time.sleep(0.1)

    def kill(self) -> None:
        if self._process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, 9)
            self._process.wait()
            self._process = None
