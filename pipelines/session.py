"""The Ray a command runs on: the cluster it was started in or pointed at, else an embedded one that nobody else's machine reaches.

Ray is imported when a session is made, so that programs which only name one start quickly.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mm_core.address import without_password
from mm_core.errors import ServiceError

_ENVIRONMENT = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "30",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "TOKENIZERS_PARALLELISM": "false",
}
"""Set for the whole job, unless the user set them: processes of one environment are used again, by other tasks and other runs."""

_ALONE = {"RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0"}
"""On one machine: nobody takes its node away, and the actor that watches for it takes seconds of a processor at every start."""


@contextmanager
def ray_session(*, cpus: int | None = None) -> Iterator[None]:
    """Connect for the time of a command, and leave as it was what was there before.

    Raises:
        ServiceError: `RAY_ADDRESS` names a cluster that does not answer, or a job service.
    """
    import ray

    if ray.is_initialized():
        yield
        return
    connect(cpus=cpus)
    try:
        yield
    finally:
        ray.shutdown()


def may_grow() -> bool:
    """Whether nodes may join while a command runs: a cluster that was there before may have an autoscaler, an embedded Ray has none."""
    return os.environ.get("RAY_ADDRESS", "local") not in ("", "local")


def connect(*, cpus: int | None = None) -> None:
    """`ray.init`: `address="local"` unless `RAY_ADDRESS` says otherwise, as a stale cluster file makes a bare init join or fail."""
    import ray

    address = os.environ.get("RAY_ADDRESS")
    if address and address.startswith(("http://", "https://")):
        raise ServiceError(
            f"RAY_ADDRESS={without_password(address)} is a job service: `mm submit -- COMMAND` runs the command there; unset it to run here"
        )
    environment = _ENVIRONMENT if address else _ENVIRONMENT | _ALONE
    for name, value in environment.items():
        os.environ.setdefault(name, value)
    logging.getLogger("ray._private.authentication.authentication_token_setup").setLevel(logging.ERROR)
    of_job = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")).get("runtime_env", {}).get("env_vars", {})
    runtime_env = {"env_vars": {name: os.environ[name] for name in environment if name not in of_job}}  # Ray refuses one that is in both
    try:
        if address:
            ray.init(address=address, runtime_env=runtime_env, log_to_driver=False, logging_level=logging.WARNING)
        else:
            with _on_loopback():
                ray.init(
                    address="local",
                    num_cpus=cpus,
                    include_dashboard=False,
                    runtime_env=runtime_env,
                    log_to_driver=False,
                    logging_level=logging.WARNING,
                )
    except (ConnectionError, RuntimeError, ray.exceptions.AuthenticationError) as error:
        where = f"at RAY_ADDRESS={address}" if address else "on this machine"
        raise ServiceError(f"Ray {where} does not start or answer ({error}); `mm doctor` says what to fix") from None
    _quieten()


@contextmanager
def _on_loopback() -> Iterator[None]:
    """Ray's processes listen where the node's address is, and on all interfaces unless that is loopback. It takes no such address
    from `ray.init` (2.60), only from this constant, which it sets on systems where it does not make clusters."""
    from ray._private import ray_constants

    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


def _quieten() -> None:
    """Leave on the terminal what mm says itself; Ray's own log files keep everything."""
    importlib.import_module("ray.data")  # sets its handlers up now, not over what follows

    for name in ("ray.data", "ray.train", "ray.tune", "ray.serve"):
        logger = logging.getLogger(name)
        for handler in logger.handlers:
            if getattr(handler, "stream", None) in (sys.stdout, sys.stderr):
                handler.setLevel(logging.ERROR)
        if not logger.handlers:
            logger.setLevel(logging.ERROR)
    _filter_messages()


_NOISE = ("ServeController.graceful_shutdown failed", "ServeController.listen_for_change failed", "worker processes have been started")
"""What Ray tells the terminal of every endpoint that stops, and of every small machine that trains."""


def _filter_messages() -> None:
    """Ray has no setting for what its nodes print into the driver's terminal: only the function that prints it."""
    from ray._private import worker

    show = worker.print_to_stdstream
    if show.__module__ == __name__:
        return

    def show_unless_noise(data: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        if not any(noise in line for line in data["lines"] for noise in _NOISE):
            show(data, *args, **kwargs)

    worker.print_to_stdstream = show_unless_noise
