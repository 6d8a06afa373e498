"""The deployment that keeps versions up and aliases followed. Gateways ask it who answers; while it is gone they go on as they were."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence

from serve.config import ServeConfig
from serve.fleet import Fleet, Searched, Wanted
from serve.store import ModelStore
from serve.traffic import Traffic

logger = logging.getLogger("ray.serve")


class Keeper:
    """One process, whatever the number of gateways."""

    def __init__(self, wanted: Sequence[Wanted], config: ServeConfig, store: ModelStore, searched: Searched | None) -> None:
        self._fleet = Fleet(wanted, config, store, searched)
        self._interval_s = config.follow_interval_s
        threading.Thread(target=self._keep, name="keep", daemon=True).start()

    async def traffic(self) -> Traffic:
        return self._fleet.traffic

    def _keep(self) -> None:
        pause = threading.Event()
        while True:
            try:
                self._fleet.step()
            except Exception:  # nothing that goes wrong once may end this: what answers goes on answering
                logger.exception("looking after the versions failed; trying again")
            pause.wait(self._interval_s)
