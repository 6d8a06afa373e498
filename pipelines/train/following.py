"""What a person sees of a run while its workers train: how far it is, what they say, and what it waits for where nothing moves."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress

import ray

from mm_core.console import Console, Tracker
from pipelines.train.board import SHARE, News
from pipelines.train.run_folder import RunFolder

_LOOK_S, _KEEP_S = 0.5, 30.0
_PATIENCE_S = 60.0


@contextmanager
def followed(board: ray.actor.ActorHandle, folder: RunFolder, workers: int, console: Console, tracker: Tracker) -> Iterator[None]:
    """Show the board of a run on `workers` workers until the block ends, and keep its account of the time in the run's folder."""
    stop = threading.Event()

    def show() -> None:
        waiting = Waiting(workers, time.monotonic())
        kept = time.monotonic()
        ended = False
        while not ended:
            ended = stop.wait(_LOOK_S)
            news: News | None = None
            with suppress(Exception):  # the display must not end a run
                news = ray.get(board.news.remote(), timeout=5)
            if not ended and (text := waiting.look(news, time.monotonic())) is not None:
                console.note(text)
            if news is None:
                continue
            for text in news.said:
                console.note(text)
            if news.step is not None:
                tracker.update(news.step, headline(news.metrics))
            if ended or time.monotonic() - kept > _KEEP_S:
                kept = time.monotonic()
                with suppress(Exception):  # nor must a store that fails for a moment
                    folder.write_goodput(news.goodput)

    thread = threading.Thread(target=show, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(timeout=10)


class Waiting:
    """What to say while no worker begins a step: after a minute, then each time that it has become twice as long."""

    def __init__(self, workers: int, now: float) -> None:
        self._workers, self._trains, self._answered = workers, False, False
        self._since, self._after_s = now, _PATIENCE_S

    def look(self, news: News | None, now: float) -> str | None:
        """`news`: None where the board does not answer."""
        if news is None and self._answered:  # a busy machine
            return None
        self._answered = news is not None
        trained, self._trains = self._trains, news is not None and news.step is not None
        if trained or self._trains:
            self._since, self._after_s = now, _PATIENCE_S
            return None
        if now - self._since < self._after_s:
            return None
        waited, self._after_s = f"no step for {now - self._since:,.0f} s: ", 2 * self._after_s
        if news is None:
            return waited + "Ray has not started the first process yet, on a machine that is busy or a cluster that is full (`ray status`)"
        if news.workers == 0:
            return (
                f"{waited}none of {self._workers} workers has begun; they wait for resources (`ray status` shows what the cluster lacks),"
                " start, or look for each other"
            )
        return f"{waited}all {news.workers} workers have begun, and load the model and the checkpoint"


def headline(metrics: Mapping[str, float]) -> str:
    """The figures that a person follows, as far as they are known."""
    shown = {
        "loss": "loss {:.3f}",
        "lr": "lr {:.1e}",
        "samples_per_s": "{:,.0f} samples/s",
        "mfu": "MFU {:.0%}",
        f"{SHARE}data_wait": "data wait {:.0%}",
        "memory/gpu_peak_gb": "GPU {:.1f} GB",
    }
    return "  ".join(text.format(metrics[name]) for name, text in shown.items() if name in metrics)
