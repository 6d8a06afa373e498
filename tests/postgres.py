"""A PostgreSQL server for tests: the real one, with a folder and a password of its own, on a port of loopback.

It refuses to run as root; where the tests do, it runs as `nobody`.
"""

from __future__ import annotations

import os
import pwd
import secrets
import shutil
import subprocess
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mm_core.ports import free_port

_START_S = 60
_PROGRAMS = ("initdb", "postgres", "pg_isready", "createdb", "psql")
_DEBIAN = Path("/usr/lib/postgresql")


def find_postgres() -> Path | None:
    """The folder of the server's programs, of the newest where there are several: Debian does not put it into PATH."""
    folders = [Path(folder) for folder in os.get_exec_path()]
    folders += sorted(_DEBIAN.glob("*/bin"), key=lambda folder: int(folder.parent.name), reverse=True)
    return next((folder for folder in folders if all((folder / program).exists() for program in _PROGRAMS)), None)


class Postgres:
    """The server, until the block ends. `uri` names an empty database; who has `variables` knows the password."""

    def __init__(self, programs: Path) -> None:
        self._programs, self.port = programs, free_port()
        self._folder = Path(tempfile.mkdtemp(prefix="mmp"))  # pytest's own folders are closed to others than their user
        self.uri = f"postgresql+psycopg2://mlflow@127.0.0.1:{self.port}/mlflow"
        password = secrets.token_hex(16)
        self._write("password", password)
        self.variables: Mapping[str, str] = {"PGPASSFILE": str(self._folder / "pgpass")}
        self._write("pgpass", f"127.0.0.1:{self.port}:*:mlflow:{password}\n")
        self._user = self._unprivileged()

    def __enter__(self) -> Postgres:
        data = f"{self._folder}/data"
        auth = ["--username=mlflow", "--auth=scram-sha-256", f"--pwfile={self._folder}/password", "--encoding=UTF8", "--no-sync"]
        self._run("initdb", f"--pgdata={data}", *auth)
        command = [self._programs / "postgres", "-D", data, "-h", "127.0.0.1", "-p", str(self.port), "-k", self._folder, "-c", "fsync=off"]
        with (self._folder / "log").open("wb") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log, cwd=self._folder, **self._user)
        until = time.monotonic() + _START_S
        while subprocess.run([self._programs / "pg_isready", "-q", "-h", "127.0.0.1", "-p", str(self.port)]).returncode:
            if self._process.poll() is not None or time.monotonic() > until:
                said = (self._folder / "log").read_text()
                self.__exit__()
                raise AssertionError(said)
            time.sleep(0.2)
        self._run("createdb", "--host=127.0.0.1", f"--port={self.port}", "--username=mlflow", "--no-password", "mlflow")
        return self

    def __exit__(self, *error: object) -> None:
        self._process.send_signal(2)  # "fast": who is connected is let go
        self._process.wait(30)
        shutil.rmtree(self._folder)

    def query(self, text: str) -> str:
        """What psql prints, without headings."""
        return self._run(
            "psql", "--host=127.0.0.1", f"--port={self.port}", "--username=mlflow", "--no-password", "-At", "-c", text, "mlflow"
        )

    def _run(self, program: str, *arguments: str) -> str:
        command = [self._programs / program, *arguments]
        done = subprocess.run(command, env={**os.environ, **self.variables}, cwd=self._folder, capture_output=True, text=True, **self._user)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def _write(self, name: str, text: str) -> None:
        (self._folder / name).touch(0o600)
        (self._folder / name).write_text(text)

    def _unprivileged(self) -> dict[str, Any]:
        if os.getuid():
            return {}
        nobody = pwd.getpwnam("nobody")
        for path in (self._folder, *self._folder.iterdir()):
            os.chown(path, nobody.pw_uid, nobody.pw_gid)
        return {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
