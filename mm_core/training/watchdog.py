"""A rank that makes no progress is ended, after it has told where it stands; the others would wait for it in a collective for ever."""

from __future__ import annotations

import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from mm_core.training.clock import Phase

EXIT_CODE = 87
"""Of a process that its watchdog has ended."""
_GRACE_S = 10.0


@dataclass(frozen=True)
class Standstill:
    """Where a rank stood when its time was up."""

    rank: int
    step: int
    seconds: float
    """Since its last step."""
    phase: Phase
    """A rank in `collective` waits for others; one in another phase is what they wait for."""
    stack: str
    """Of the thread that trains."""

    def __str__(self) -> str:
        where = self.stack.strip().splitlines()
        return (
            f"rank {self.rank} has made no progress for {self.seconds:.0f} s at step {self.step:,}, in {self.phase}: {' '.join(where[-2:])}"
        )


class Watchdog:
    """Watches the thread that made it, from another one."""

    def __init__(
        self,
        timeout_s: float,
        *,
        rank: int,
        phase: Callable[[], Phase],
        tell: Callable[[Standstill], None],
        end: Callable[[], None] = lambda: os._exit(EXIT_CODE),
    ) -> None:
        """
        Args:
            timeout_s: longest time between two calls of `step_done`.
            phase: of the thread that trains, now.
            tell: is given what was found, for at most ten seconds, before `end` ends the process.
        """
        self._timeout_s, self._rank, self._phase, self._tell, self._end = timeout_s, rank, phase, tell, end
        self._step, self._at = 0, time.monotonic()
        self._watched = threading.get_ident()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def step_done(self, step: int) -> None:
        """`step` is the next one to take. Costs nothing."""
        self._step, self._at = step, time.monotonic()

    def close(self) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(min(1.0, self._timeout_s / 4)):
            since = time.monotonic() - self._at
            if since > self._timeout_s:
                self._report(since)
                self._end()
                return

    def _report(self, since: float) -> None:
        frame = sys._current_frames().get(self._watched)
        stack = "".join(traceback.format_stack(frame)) if frame else ""
        found = Standstill(self._rank, self._step, since, self._phase(), stack)

        def tell() -> None:
            with suppress(Exception):  # whatever hinders it, the process has to end
                self._tell(found)

        telling = threading.Thread(target=tell, daemon=True)
        telling.start()
        telling.join(_GRACE_S)
