"""The deployment that keeps versions up and aliases followed. Gateways ask it who answers; while it is gone they go on as they were."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence

from serve.config import ServeConfig
from serve.fleet import Fleet, Searched, Wanted, versions_there
from serve.store import ModelStore
from serve.traffic import NOBODY, Traffic

logger = logging.getLogger("ray.serve")


_LOST_PATIENCE_S = 20


class Keeper:
    """One process, whatever the number of gateways."""

    def __init__(self, wanted: Sequence[Wanted], config: ServeConfig, store: ModelStore, searched: Searched | None) -> None:
        self._fleet = Fleet(wanted, config, store, searched)
        self._interval_s = config.follow_interval_s
        self._obeyed, self._heard = NOBODY, threading.Event()
        threading.Thread(target=self._keep, name="keep", daemon=True).start()

    async def traffic(self, obeyed: Traffic = NOBODY) -> Traffic:
        """Who answers.

        Args:
            obeyed: whom the caller sends requests to now; it tells a keeper that comes after a lost one where to go on.
        """
        if obeyed.slots and not self._heard.is_set():
            self._obeyed = obeyed
            self._heard.set()
        return self._fleet.traffic

    def _keep(self) -> None:
        pause = threading.Event()
        if versions_there() and self._heard.wait(_LOST_PATIENCE_S):
            self._fleet.resume(self._obeyed)
        while True:
            try:
                self._fleet.step()
            except Exception:  # nothing that goes wrong once may end this: what answers goes on answering
                logger.exception("looking after the versions failed; trying again")
            pause.wait(self._interval_s)
