"""The deployment that speaks HTTP: it holds no model, only the ways to them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import ray.serve
from fastapi import FastAPI
from ray.serve.handle import DeploymentHandle

from serve.app import create_app
from serve.config import ServeConfig
from serve.measured import Measured
from serve.traffic import NOBODY, Traffic
from serve.upstream import Handles, Upstream

logger = logging.getLogger("ray.serve")
_ASK_EVERY_S = 0.5


@ray.serve.ingress()
class Gateway:
    """One process."""

    def __init__(self, config: ServeConfig, tasks: Sequence[str], keeper: DeploymentHandle, searcher: DeploymentHandle | None) -> None:
        self._handles, self._keeper = Handles(config), keeper
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
                traffic: Traffic = await self._keeper.traffic.remote(self._upstream.traffic)
                if traffic not in (NOBODY, self._upstream.traffic):
                    versions = [share.version for slot in traffic.slots for share in slot.shares]
                    versions += [traffic.searched] if traffic.searched else []
                    await self._handles.keep({version.application for version in versions})
                    self._upstream.follow(traffic)
            except Exception as error:
                logger.warning("the keeper does not answer: %s", error)
            await asyncio.sleep(_ASK_EVERY_S)
