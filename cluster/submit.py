"""Runs an `mm` command as a job of a Ray cluster.

On a head of this machine the job runs with this Python in the caller's working folder, so relative paths mean the same.
On another machine the code is sent along (Python and the packages must be there), and paths are those of the cluster.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from cluster.head import Head
from mm_core import revision as revisions
from mm_core.errors import ConfigError

RUN_LINE = re.compile(r"mlflow run ([0-9a-f]{32})")
"""What `mm train` prints once its tracking run exists."""
_FAILED = ("FAILED", "STOPPED")
_POLL_S = 0.5
_TAIL_LINES = 15
_PACKAGES = ("mm_core", "pipelines", "serve", "cluster")


@dataclass(frozen=True)
class Submitted:
    """A job, how far it was when last looked at, and its tracking run where it has named one."""

    job_id: str
    status: str
    run_id: str | None
    log_tail: str = ""
    """The last lines it wrote."""

    @property
    def failed(self) -> bool:
        return self.status in _FAILED


@dataclass(frozen=True)
class Here:
    """The job's place is this machine: this Python, in `folder`."""

    folder: Path


@dataclass(frozen=True)
class Elsewhere:
    """The job's place is a folder of the cluster that holds the code sent along. `python` is a program there."""

    python: str = "python"
    checked: bool = True
    """Whether `mm doctor` must find nothing there that fails."""


Place = Here | Elsewhere


def entrypoint(arguments: Sequence[str], place: Place) -> str:
    """The job's shell command: `python -m mm ARGUMENTS`, quoted."""
    match place:
        case Here(folder):
            return f"cd {shlex.quote(str(folder))} && exec {shlex.join([sys.executable, '-m', 'mm', *arguments])}"
        case Elsewhere(python, checked):
            look = f"{shlex.join([python, '-m', 'mm', 'doctor', '--failures'])} && " if checked else ""
            return f"{look}exec {shlex.join([python, '-m', 'mm', *arguments])}"


def passed_variables(names: Sequence[str], environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """The named variables with their values.

    Raises:
        ConfigError: one is not set, or is given with a value, which the shell's history would keep.
    """
    env = os.environ if environment is None else environment
    for name in names:
        if "=" in name:
            raise ConfigError(f"--env {name.partition('=')[0]}=… carries a value: export it and give the name alone")
        if name not in env:
            raise ConfigError(f"--env {name} is not set here: export it, or drop the option")
    return {name: env[name] for name in names}


def submit(head: Head, arguments: Sequence[str], place: Place, *, variables: Mapping[str, str]) -> str:
    """Start a job; its id.

    Raises:
        ConfigError: no arguments.
        ServiceError: the head does not answer or refuses.
    """
    if not arguments:
        raise ConfigError("nothing to submit: put the command behind two dashes, for example mm submit -- train clip-tiny --data INDEX")
    with _runtime_env(place, variables) as runtime_env, head.asked():
        job_id: str = head.client.submit_job(entrypoint=entrypoint(arguments, place), runtime_env=runtime_env)
    return job_id


def wait_for_run(head: Head, job_id: str, *, wait_s: float) -> Submitted:
    """Look at the job until it has named its tracking run, has ended, or `wait_s` seconds have passed.

    Raises:
        ServiceError: the head went away.
    """
    until = time.monotonic() + wait_s
    while True:
        with head.asked():
            # Status before log: a job that is seen to have ended has written all it had to say.
            details = head.client.get_job_info(job_id)
            text: str = head.client.get_job_logs(job_id)
        status, found = details.status.value, RUN_LINE.search(text)
        if found or details.status.is_terminal() or time.monotonic() >= until:
            return Submitted(job_id, status, found.group(1) if found else None, _tail(text, details.message))
        time.sleep(min(_POLL_S, max(until - time.monotonic(), 0)))


def _tail(text: str, message: str | None) -> str:
    lines = text.rstrip().splitlines() or (message or "it wrote no log").splitlines()
    return "\n".join(lines[-_TAIL_LINES:])


@contextmanager
def _runtime_env(place: Place, variables: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    env: dict[str, Any] = {"env_vars": dict(variables)} if variables else {}
    match place:
        case Here():
            yield env
        case Elsewhere():
            with TemporaryDirectory() as staged:
                _stage(Path(staged))
                revision = {revisions.VARIABLE: revisions.code_revision()}
                yield env | {"env_vars": dict(variables) | revision, "working_dir": staged}


def _stage(folder: Path) -> None:
    """Copy mm's own code: a checkout's root also holds data, runs and environments, which no cluster wants."""
    for package in _PACKAGES:
        shutil.copytree(_source() / package, folder / package, ignore=shutil.ignore_patterns("__pycache__", "*.pyc", "secrets"))
    for name in ("mm.py", "pyproject.toml"):
        shutil.copy2(_source() / name, folder)


def _source() -> Path:
    return Path(__file__).resolve().parents[1]
