"""The application of gateways, keeper and searcher. Those of the models' versions are the keeper's to make."""

from __future__ import annotations

from collections.abc import Sequence

import ray.serve
from ray.serve.config import BackpressureConfig
from ray.serve.schema import LoggingConfig

from serve.config import ServeConfig
from serve.fleet import Searched, Wanted
from serve.gateway import Gateway
from serve.keeper import Keeper
from serve.problems import RETRY_AFTER_S
from serve.searcher import Searcher
from serve.store import ModelStore

_REFUSED_AT_A_TIME = 128
"""Requests above the bound that may be in the gateway while it refuses them."""


def build(
    wanted: Sequence[Wanted], config: ServeConfig, store: ModelStore, *, tasks: Sequence[str], searched: Searched | None = None
) -> ray.serve.Application:
    """As `ray.serve.run` and a serve.yaml take it."""
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
