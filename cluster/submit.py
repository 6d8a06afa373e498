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
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from cluster import again
from cluster.head import Head
from cluster.jobs import LIVE, Job, list_jobs
from cluster.machine import required
from cluster.run_names import LABEL, run_of, submission_id
from mm_core import revision as revisions
from mm_core.address import without_password
from mm_core.errors import ConfigError, ServiceError

RUN_LINE = re.compile(r"mlflow run ([0-9a-f]{32})")
"""What `mm train` prints once its tracking run exists."""
_FAILED = ("FAILED", "STOPPED")
_POLL_S = 0.5
_TRIES = 5
_TAIL_LINES = 15
_STOP = {"RAY_JOB_STOP_WAIT_TIME_S": "30"}
"""From SIGTERM to SIGKILL. In Ray's three seconds an endpoint does not end: its proxies stay, and the cluster cannot serve again."""
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
    checked: bool = False
    """Whether `mm doctor` must find nothing that fails, on any node: some are on other machines."""


@dataclass(frozen=True)
class Elsewhere:
    """The job's place is a folder of the cluster that holds the code sent along. `python` is a program there."""

    python: str = "python"
    checked: bool = True
    """Whether `mm doctor` must find nothing there that fails, on any node."""


@dataclass(frozen=True)
class InImage:
    """The job's place is a container of an image that has mm (cluster/images); nothing is sent, as Ray takes no more beside an image."""

    uri: str
    python: str = "python"
    checked: bool = True


Place = Here | Elsewhere | InImage


def entrypoint(arguments: Sequence[str], place: Place) -> str:
    """The job's shell command: `python -m mm ARGUMENTS`, quoted; of a run, started again where it is killed, since it then goes on."""
    python = sys.executable if isinstance(place, Here) else place.python
    command = [python, "-m", "mm", *arguments]
    if run_of(arguments) is not None:
        match place:  # by its file where it is known: a folder called `cluster` may lie in the job's
            case Here():
                command = [python, str(Path(again.__file__)), *command]
            case Elsewhere():
                command = [python, "cluster/again.py", *command]
            case InImage():
                command = [python, "-m", "cluster.again", *command]
    doctor = [python, "-m", "mm", "doctor", "--nodes", "--failures", "--before", shlex.join(arguments)]
    look = f"{shlex.join(doctor)} && " if place.checked else ""
    into = f"cd {shlex.quote(str(place.folder))} && " if isinstance(place, Here) else ""
    return f"{into}{look}exec {shlex.join(command)}"


def read_labels(texts: Sequence[str]) -> dict[str, str]:
    """
    Raises:
        ConfigError: one is not of the form KEY=VALUE, or is mm's own.
    """
    found = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise ConfigError(f"--label {text} is not of the form KEY=VALUE")
        if key == LABEL:
            raise ConfigError(f"--label {LABEL} is mm's own: name the run with --name")
        found[key] = value
    return found


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


@dataclass(frozen=True)
class Request:
    """What is submitted beside the command."""

    place: Place
    variables: Mapping[str, str] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)
    """Shown by `mm jobs list`."""
    driver_cpus: float = 0
    driver_memory_gb: float = 0
    """Of the command itself; its workers book their own."""
    install: bool = False
    """Install there what mm needs, in the versions that are here."""


@dataclass(frozen=True)
class Started:
    job_id: str
    new: bool
    """False: this run had a job that has not ended, and no other was started."""


def submit(head: Head, arguments: Sequence[str], request: Request) -> Started:
    """Start a job, unless one of the same run has not ended yet.

    Raises:
        ConfigError: no arguments, or one with a password in it; a run of this name is trained by another command.
        ServiceError: the head does not answer or refuses.
    """
    _refuse_passwords(arguments)
    if not arguments:
        raise ConfigError("nothing to submit: put the command behind two dashes, for example mm submit -- train clip-tiny --data INDEX")
    if (run := run_of(arguments)) is None:
        return Started(_start(head, arguments, request, dict(request.labels)), new=True)
    for _ in range(_TRIES):
        earlier = [job for job in list_jobs(head) if job.labels.get(LABEL) == run]
        if (live := next((job for job in earlier if job.status in LIVE), None)) is not None:
            _refuse_another(live, arguments, request.place)
            return Started(live.job_id, new=False)
        try:
            own_id = submission_id(run, (job.job_id for job in earlier))
            return Started(_start(head, arguments, request, dict(request.labels) | {LABEL: run}, own_id), new=True)
        except ServiceError as error:
            if "already exists" not in str(error):
                raise
            time.sleep(_POLL_S)  # somebody else submitted it at the same moment: theirs is seen now
    raise ServiceError(f"another job at {head.address} has the name {own_id!r}: give the run another --name")


def _refuse_passwords(arguments: Sequence[str]) -> None:
    for argument in arguments:
        if (shown := without_password(argument)) != argument:
            raise ConfigError(
                f"{shown} carries a password, which Ray keeps with the job and every list of processes shows: take it out, and pass it on"
                " in a variable with --env NAME (MLFLOW_TRACKING_PASSWORD, PGPASSWORD, AWS_SECRET_ACCESS_KEY)"
            )


def _refuse_another(live: Job, arguments: Sequence[str], place: Place) -> None:
    """A run that has a job is not given a second one, but who asks for another run is not told that it is theirs."""
    folder = str(place.folder) if isinstance(place, Here) else ""
    if (live.command, live.folder) != (f"mm {shlex.join(arguments)}", folder):
        where = f", in {live.folder}" if live.folder else ""
        raise ConfigError(
            f"job {live.job_id} has not ended and trains a run of this name by another command ({live.command}{where}): nothing was"
            f" started; give this one another --name, or end that one with mm jobs stop {live.job_id}"
        )


def _start(head: Head, arguments: Sequence[str], request: Request, labels: dict[str, str], job_id: str | None = None) -> str:
    with _runtime_env(request) as runtime_env, head.asked():
        started: str = head.client.submit_job(
            entrypoint=entrypoint(arguments, request.place),
            runtime_env=runtime_env,
            metadata=labels,
            submission_id=job_id,
            entrypoint_num_cpus=request.driver_cpus or None,
            entrypoint_memory=round(request.driver_memory_gb * 1e9) or None,
        )
    return started


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
def _runtime_env(request: Request) -> Iterator[dict[str, Any]]:
    env: dict[str, Any] = {"env_vars": _STOP | dict(request.variables)}
    env |= {"pip": {"packages": pinned(), "pip_check": False}} if request.install else {}
    match request.place:
        case Here():
            yield env
        case InImage(uri) if request.install:
            raise ConfigError(f"--image {uri} brings its packages: leave out --install, or build an image with others (cluster/images)")
        case InImage(uri) if request.variables:
            raise ConfigError(
                f"--image {uri} with --env {next(iter(request.variables))}: Ray gives variables to containers among podman's arguments,"
                " where every list of processes shows them: put roles, profiles or files on the nodes, or take a cluster of that image"
            )
        case InImage(uri):
            yield env | {"image_uri": uri}
        case Elsewhere():
            with TemporaryDirectory() as staged:
                _stage(Path(staged))
                revision = {revisions.VARIABLE: revisions.code_revision()}
                yield env | {"env_vars": env["env_vars"] | revision, "working_dir": staged}


def pinned() -> list[str]:
    """What mm needs, in the versions that are installed here; without Ray, which must be the cluster's, and without what a version says of
    its build: `2.13.0+cpu` of this machine is no package of the index, and not the one for a cluster with GPUs."""
    return [f"{name}=={version(name).partition('+')[0]}" for name in required() if name != "ray"]


def _stage(folder: Path) -> None:
    """Copy mm's own code: a checkout's root also holds data, runs and environments, which no cluster wants."""
    for package in _PACKAGES:
        shutil.copytree(_source() / package, folder / package, ignore=shutil.ignore_patterns("__pycache__", "*.pyc", "secrets"))
    for name in ("mm.py", "pyproject.toml"):
        shutil.copy2(_source() / name, folder)


def _source() -> Path:
    return Path(__file__).resolve().parents[1]
