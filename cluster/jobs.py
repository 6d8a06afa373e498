"""The jobs of a Ray head: list, read, follow, stop. What was passed to them in variables is never shown."""

from __future__ import annotations

import shlex
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from cluster.head import Head
from mm_core.errors import ConfigError, ServiceError

if TYPE_CHECKING:
    from ray.job_submission import JobDetails

LIVE = ("PENDING", "RUNNING")
_TRIES = 5
_AGAIN_S = 1.0


@dataclass(frozen=True)
class Job:
    """A submitted job. Times are ISO 8601, UTC, to the second."""

    job_id: str
    status: str
    started: str
    ended: str
    command: str
    folder: str
    """Of this machine, in which it runs; empty where its code was sent or is an image's."""
    labels: dict[str, str]
    """As they were given to `mm submit`; `mm.run` is the training run's name."""


def list_jobs(head: Head) -> list[Job]:
    """Submitted jobs, the newest first; drivers that joined the cluster themselves are not among them."""
    with head.asked():
        found = [job for job in head.client.list_jobs() if job.submission_id]
    found.sort(key=lambda job: job.start_time or 0, reverse=True)
    return [_job(details) for details in found]


def _job(details: JobDetails) -> Job:
    times = (_time(details.start_time), _time(details.end_time))
    place = (_command(details.entrypoint), _folder(details.entrypoint))
    return Job(details.submission_id, details.status.value, *times, *place, dict(details.metadata or {}))


def read_log(head: Head, job_id: str) -> str:
    """Everything the job has written."""
    _known(head, job_id)
    with head.asked():
        return str(head.client.get_job_logs(job_id))


def follow_log(head: Head, job_id: str) -> Iterator[str]:
    """What the job wrote and writes, in pieces, until it has ended; where the line is cut meanwhile, from there on again."""
    import asyncio

    import aiohttp

    _known(head, job_id)
    shown, tries = 0, _TRIES
    while True:
        ended, cut, passed = not _lives(head, job_id), False, 0
        with head.asked(), asyncio.Runner() as runner:
            pieces = head.client.tail_job_logs(job_id)
            try:
                while (piece := runner.run(_next(pieces))) is not None:
                    if fresh := piece[max(0, shown - passed) :]:
                        yield fresh
                    passed += len(piece)
                    shown = max(shown, passed)
            except (RuntimeError, aiohttp.ClientError):  # the client's, of a connection that broke or did not come about
                cut = True
        if not cut and (ended or not _lives(head, job_id)):
            return
        tries = tries - 1 if cut and passed == 0 else _TRIES
        if tries == 0:
            raise ServiceError(f"{head.address} does not send what job {job_id} writes: look at what stands between")
        time.sleep(_AGAIN_S)


def _lives(head: Head, job_id: str) -> bool:
    """Asked a few times where the head does not answer at once."""
    for _ in range(_TRIES - 1):
        with suppress(ServiceError):
            return job_status(head, job_id) in LIVE
        time.sleep(_AGAIN_S)
    return job_status(head, job_id) in LIVE


def stop(head: Head, job_id: str) -> bool:
    """Ask the job to end (SIGTERM, half a minute later SIGKILL). False: it had ended before."""
    _known(head, job_id)
    with head.asked():
        return bool(head.client.stop_job(job_id))


def wait_for_end(head: Head, job_id: str, *, wait_s: float) -> bool:
    """Whether the job has ended, at the latest after `wait_s` seconds."""
    until = time.monotonic() + wait_s
    while alive := _lives(head, job_id):
        if time.monotonic() >= until:
            break
        time.sleep(_AGAIN_S)
    return not alive


def job_status(head: Head, job_id: str) -> str:
    """PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED."""
    with head.asked():
        return str(head.client.get_job_status(job_id).value)


def _known(head: Head, job_id: str) -> None:
    known = [job.job_id for job in list_jobs(head)]
    if job_id not in known:
        raise ConfigError(f"{head.address} has no job {job_id!r}; `mm jobs list` shows the {len(known)} it has")


async def _next(pieces: AsyncIterator[str]) -> str | None:
    return await anext(pieces, None)


def _time(milliseconds: int | None) -> str:
    return datetime.fromtimestamp(milliseconds / 1000, UTC).isoformat(timespec="seconds") if milliseconds else ""


def _command(entrypoint: str) -> str:
    """The mm command in an entrypoint of ours; other entrypoints as they are."""
    return "mm " + entrypoint.rpartition(" -m mm ")[2] if " -m mm " in entrypoint else entrypoint


def _folder(entrypoint: str) -> str:
    """In which one of ours begins; what others begin in may be written in any way."""
    if not (entrypoint.startswith("cd ") and " -m mm " in entrypoint):
        return ""
    with suppress(ValueError):  # of quotes that a comment leaves open
        words = shlex.split(entrypoint)
        return words[1] if words[2:3] == ["&&"] else ""
    return ""
