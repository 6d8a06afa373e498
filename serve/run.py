"""Starting and stopping an endpoint on the Ray that the caller has connected to."""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import httpx
import ray
import ray.serve
from ray.serve.config import HTTPOptions

from mm_core.bundle import look_into
from mm_core.errors import BundleError, ConfigError, ServiceError
from mm_core.search.embeddings import read_search_summary
from serve.address import check_address
from serve.application import build
from serve.config import ServeConfig
from serve.fleet import APPLICATION, Searched, Wanted
from serve.store import ModelStore
from serve.tasks import ENDPOINTS

_PROXY_MARGIN_S = 10
"""That Serve's own limit on a request, which answers in plain text, lies above ours."""
_ENDPOINT_START_S = 120
"""Of what holds no model."""


@dataclass(frozen=True)
class Plan:
    """An endpoint that nothing is known to stand in the way of."""

    wanted: tuple[Wanted, ...]
    config: ServeConfig
    store: ModelStore
    tasks: tuple[str, ...]
    searched: Searched | None

    @property
    def versions(self) -> int:
        """That are up at a time, without what the search index was made with."""
        return sum(len(one.references) for one in self.wanted)


@dataclass(frozen=True)
class Server:
    """A running endpoint."""

    url: str
    models: tuple[str, ...]

    def wait(self, watch: Callable[[], None] = lambda: None) -> None:
        """Until Ctrl-C or SIGTERM, looking now and then."""
        stop = threading.Event()
        previous = {number: signal.signal(number, lambda *_: stop.set()) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            while not stop.wait(0.5):
                watch()
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def stop(self) -> None:
        """Take the endpoint down, letting running requests end; Ray stays."""
        applications = list(ray.serve.status().applications)
        for name in [APPLICATION, *(name for name in applications if name != APPLICATION)]:  # who could bring others up first
            ray.serve.delete(name)
        ray.serve.shutdown()


def look_at(wanted: Sequence[Wanted], config: ServeConfig, store: ModelStore) -> Plan:
    """What stands in the way of serving these models here, found before Ray is needed.

    Raises:
        ServiceError: the address cannot be used.
        BundleError, DataError: as `plan_of`.
    """
    check_address(config.host, config.port)
    return plan_of(wanted, config, store)


def plan_of(wanted: Sequence[Wanted], config: ServeConfig, store: ModelStore) -> Plan:
    """To serve these models, here or elsewhere: the gateway's routes follow from the models' tasks and the search index.

    Raises:
        BundleError: a model is not there, damaged, or of a kind that answers nothing.
        DataError: the search index is not there.
    """
    tasks = [_task_of(reference, store) for one in wanted for reference in one.references]
    searched = None
    if config.search is not None:
        summary = read_search_summary(config.search)
        searched = Searched(summary.model, summary.model_digest)
    return Plan(tuple(wanted), config, store, tuple(dict.fromkeys(tasks)), searched)


def _task_of(reference: str, store: ModelStore) -> str:
    task = look_into(store.fetch(store.pin(reference)))
    if task not in ENDPOINTS:
        raise BundleError(f"{reference} has the task {task}, for which there is no endpoint; those that have one: {', '.join(ENDPOINTS)}")
    return task


def application(plan: Plan) -> ray.serve.Application:
    return build(plan.wanted, plan.config, plan.store, tasks=plan.tasks, searched=plan.searched)


def start(plan: Plan) -> Server:
    """Deploy what was looked at and wait until every model answers.

    Raises:
        ConfigError: this Ray has fewer GPUs than the copies ask for.
        ServiceError: it serves something already; nothing was started. Or a model did not come up.
    """
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    if ray.is_initialized() and ray.serve.status().proxies:
        raise ServiceError("this Ray cluster serves applications already: stop them first (serve shutdown), or use another cluster")
    config = plan.config
    check_gpus(plan, ray.cluster_resources().get("GPU", 0))
    server = Server(config.url, tuple(one.name for one in plan.wanted))
    try:
        timeout_s = config.bounds.request_timeout_s + _PROXY_MARGIN_S
        ray.serve.start(http_options=HTTPOptions(host=config.host, port=config.port, request_timeout_s=timeout_s))
        ray.serve.run(application(plan), name=APPLICATION, route_prefix="/")
        _await_models(plan)
        _await_gateways(config)
    except (RuntimeError, ServiceError) as error:
        server.stop()
        raise ServiceError(f"the endpoint did not come up: {error}") from None
    except BaseException:
        server.stop()
        raise
    return server


def check_gpus(plan: Plan, there: float) -> None:
    """
    Raises:
        ConfigError: `there` are too few.
    """
    compute = plan.config.compute
    wanted = compute.gpus_per_replica * compute.replicas * plan.versions
    if wanted > there:
        raise ConfigError(
            f"{wanted:g} GPUs are asked for ({plan.versions} models × {compute.replicas} copies × {compute.gpus_per_replica:g} each), and"
            f" this Ray has {there:g}: give fewer --replicas, a part of a GPU each with --gpus 0.5, or --gpus 0 to compute on the processor"
        )


def states() -> dict[str, str]:
    """Of each model in a line: who answers, and what is refused."""
    traffic = ray.serve.get_deployment_handle("Keeper", APPLICATION).traffic.remote().result()
    found = {}
    for slot in traffic.slots:
        answers = ", ".join(f"{share.version.reference} ({share.percent:g} %)" for share in slot.shares) or "nobody"
        found[slot.name] = f"{answers} answers" + (f"; refused: {slot.refused}" if slot.refused else "")
    return found


def _await_models(plan: Plan) -> None:
    """Until every model has a version that answers. One after the other is brought up.

    Raises:
        ServiceError: one has none, and why.
    """
    keeper = ray.serve.get_deployment_handle("Keeper", APPLICATION)
    longest_s = plan.config.compute.start_timeout_s * (plan.versions + 1) + _ENDPOINT_START_S
    give_up = time.monotonic() + longest_s
    while time.monotonic() < give_up:
        traffic = keeper.traffic.remote().result()
        if traffic.is_ready:
            return
        if refused := [slot.refused for slot in traffic.slots if slot.refused and not slot.shares]:
            raise ServiceError(refused[0])
        time.sleep(0.1)
    raise ServiceError(f"no answer after {longest_s:g} s")


def _await_gateways(config: ServeConfig) -> None:
    """Until the gateways, which hear of it from the keeper, know too. Which of them answers is the proxy's choice, so several are asked.

    Raises:
        ServiceError: they do not come to.
    """
    give_up, agreed = time.monotonic() + _ENDPOINT_START_S, 0
    while agreed < 3 * config.gateways:
        if time.monotonic() >= give_up:
            raise ServiceError(f"{config.url}/readyz does not answer")
        try:
            ready = httpx.get(f"{config.url}/readyz", timeout=10).status_code == 200
        except httpx.HTTPError:
            ready = False
        agreed = agreed + 1 if ready else 0
        if not ready:
            time.sleep(0.1)
