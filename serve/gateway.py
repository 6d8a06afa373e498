"""The deployment that speaks HTTP: it holds no model, only the ways to them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import ray.serve
from fastapi import FastAPI
from ray.serve.config import BackpressureConfig
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import LoggingConfig

from serve.app import create_app
from serve.config import ServeConfig
from serve.fleet import Searched, Wanted
from serve.keeper import Keeper
from serve.measured import Measured
from serve.problems import RETRY_AFTER_S
from serve.searcher import Searcher
from serve.store import ModelStore
from serve.traffic import Traffic
from serve.upstream import Handles, Upstream

logger = logging.getLogger("ray.serve")
_REFUSED_AT_A_TIME = 1000
"""Requests above the bound that may be in the gateway while it refuses them."""
_ASK_EVERY_S = 0.5


@ray.serve.ingress()
class Gateway:
    """One process."""

    def __init__(self, config: ServeConfig, tasks: Sequence[str], keeper: DeploymentHandle, searcher: DeploymentHandle | None) -> None:
        self._handles, self._keeper = Handles(), keeper
        measured = Measured(ray.serve.get_replica_context().replica_id.unique_id)
        self._upstream = Upstream(config.bounds.max_waiting_inputs, measured, self._handles.ask)
        self._service = create_app(config, tasks, self._upstream, searcher=searcher, lifespan=self._following)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return self._service

    @asynccontextmanager
    async def _following(self, _: FastAPI) -> AsyncIterator[None]:
        following = asyncio.create_task(self._follow())
        try:
            yield
        finally:
            following.cancel()

    async def _follow(self) -> None:
        """Obey the keeper; while it is gone, go on as it said last."""
        while True:
            try:
                traffic: Traffic = await self._keeper.traffic.remote()
                if traffic != self._upstream.traffic:
                    versions = [share.version for slot in traffic.slots for share in slot.shares]
                    versions += [traffic.searched] if traffic.searched else []
                    await self._handles.keep({version.application for version in versions})
                    self._upstream.follow(traffic)
            except Exception as error:
                logger.warning("the keeper does not answer: %s", error)
            await asyncio.sleep(_ASK_EVERY_S)


def build(
    wanted: Sequence[Wanted], config: ServeConfig, store: ModelStore, *, tasks: Sequence[str], searched: Searched | None = None
) -> ray.serve.Application:
    """The application of gateways, keeper and searcher; those of the models' versions are the keeper's to make."""
    logging_config = LoggingConfig(encoding="JSON", logs_dir=config.log_folder, enable_access_log=False)
    at_a_time = config.bounds.max_requests * config.gateways
    keeper = ray.serve.deployment(Keeper).options(ray_actor_options={"num_cpus": 0}).bind(wanted, config, store, searched)
    searcher = (
        ray.serve.deployment(Searcher)
        .options(max_ongoing_requests=at_a_time, ray_actor_options={"num_cpus": 0.1})
        .bind(config.search, config.bounds.max_pixels)
        if config.search
        else None
    )
    gateway = ray.serve.deployment(Gateway).options(
        num_replicas=config.gateways,
        max_ongoing_requests=config.bounds.max_requests + _REFUSED_AT_A_TIME,
        max_queued_requests=_REFUSED_AT_A_TIME,
        backpressure_config=BackpressureConfig(status_code=429, retry_after_s=RETRY_AFTER_S),
        ray_actor_options={"num_cpus": 0.1},
        logging_config=logging_config,
    )
    return gateway.bind(config, tasks, keeper, searcher)
