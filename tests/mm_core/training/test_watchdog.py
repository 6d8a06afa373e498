"""A thread that stands still is told of, with its stack, and ended; one that goes on is left alone."""

from __future__ import annotations

import threading
import time

from mm_core.training.clock import Phase
from mm_core.training.watchdog import Standstill, Watchdog


def test_a_standstill_is_told_with_the_stack_of_the_thread_that_trains() -> None:
    told: list[Standstill] = []
    ended = threading.Event()
    watchdog = Watchdog(0.3, rank=2, phase=lambda: Phase.FORWARD, tell=told.append, end=ended.set)
    watchdog.step_done(7)

    def stuck_in_here() -> bool:
        return ended.wait(60)

    assert stuck_in_here()
    watchdog.close()
    (found,) = told
    assert (found.rank, found.step, found.phase) == (2, 7, Phase.FORWARD)
    assert "stuck_in_here" in found.stack
    assert str(found).startswith("rank 2 has made no progress for 0 s at step 7, in forward: ")
    assert "\n" not in str(found)


def test_steps_keep_it_quiet() -> None:
    ended = threading.Event()
    watchdog = Watchdog(2.0, rank=0, phase=lambda: Phase.OTHER, tell=lambda found: None, end=ended.set)
    for step in range(25):
        watchdog.step_done(step)
        time.sleep(0.1)
    watchdog.close()
    assert not ended.is_set()


def test_one_who_cannot_be_told_hinders_nothing() -> None:
    ended = threading.Event()

    def tell(found: Standstill) -> None:
        raise OSError("the store is away")

    watchdog = Watchdog(0.1, rank=0, phase=lambda: Phase.OTHER, tell=tell, end=ended.set)
    assert ended.wait(60)
    watchdog.close()
