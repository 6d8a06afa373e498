"""Callers of an endpoint, in one process that does little else: so many at a time, or at a rate, whatever comes back."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import numpy as np

_PATIENCE_S = 120
_UNANSWERED = 0
"""In place of a status: the connection broke, or no answer came in that time."""


@dataclass
class Load:
    """What came back within the time that counts."""

    inputs: int
    """Of each request."""
    seconds: float
    answered_ms: list[float] = field(default_factory=list)
    refused_ms: list[float] = field(default_factory=list)
    statuses: Counter[int] = field(default_factory=Counter)
    client_cpu_s: float = 0
    """Of this process."""

    @property
    def rate(self) -> float:
        """Inputs/s."""
        return self.statuses[200] * self.inputs / self.seconds

    def answered(self, percent: float) -> float:
        """Milliseconds."""
        return _percentile(self.answered_ms, percent)

    def refused(self, percent: float) -> float:
        return _percentile(self.refused_ms, percent)


def closed(url: str, bodies: Sequence[bytes], inputs: int, *, callers: int, seconds: float, warm_s: float = 3) -> Load:
    """Callers of whom each asks again as soon as it is answered."""
    return asyncio.run(_closed(url, bodies, Load(inputs, seconds), callers, warm_s))


def paced(url: str, bodies: Sequence[bytes], inputs: int, *, per_s: float, seconds: float, warm_s: float = 3) -> Load:
    """So many requests a second on average, at random, whether or not those before are answered."""
    return asyncio.run(_paced(url, bodies, Load(inputs, seconds), per_s, warm_s))


async def _closed(url: str, bodies: Sequence[bytes], load: Load, callers: int, warm_s: float) -> Load:
    end = time.perf_counter() + warm_s + load.seconds

    async def again(ask: Ask, first: int) -> None:
        for number in itertools.count(first, callers):
            if time.perf_counter() >= end:
                return
            if await ask(bodies[number % len(bodies)]) != 200:
                await asyncio.sleep(0.05)

    async def all_of_them(ask: Ask) -> None:
        await asyncio.gather(*(again(ask, caller) for caller in range(callers)))

    return await _measured(url, load, warm_s, all_of_them)


async def _paced(url: str, bodies: Sequence[bytes], load: Load, per_s: float, warm_s: float) -> Load:
    gaps = np.random.default_rng(0).exponential(1 / per_s, int(per_s * (warm_s + load.seconds)))

    async def all_of_them(ask: Ask) -> None:
        due, under_way = time.perf_counter(), set[asyncio.Task[int]]()
        for number, gap in enumerate(gaps):
            due += gap
            await asyncio.sleep(max(0, due - time.perf_counter()))
            task = asyncio.create_task(ask(bodies[number % len(bodies)]))
            under_way.add(task)
            task.add_done_callback(under_way.discard)
        await asyncio.gather(*under_way)

    return await _measured(url, load, warm_s, all_of_them)


Ask = Callable[[bytes], Coroutine[Any, Any, int]]


async def _measured(url: str, load: Load, warm_s: float, send_all: Callable[[Ask], Awaitable[None]]) -> Load:
    """Let `send_all` send, and note what comes back after `warm_s`, for the load's seconds."""
    begin = time.perf_counter() + warm_s
    timeout = aiohttp.ClientTimeout(total=_PATIENCE_S)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as session:

        async def ask(body: bytes) -> int:
            started = time.perf_counter()
            try:
                async with session.post(f"{url}/v1/embeddings", data=body, headers={"content-type": "application/json"}) as answer:
                    await answer.read()
                    status = answer.status
            except (aiohttp.ClientError, TimeoutError):
                status = _UNANSWERED
            ended = time.perf_counter()
            if begin <= ended <= begin + load.seconds:
                load.statuses[status] += 1
                (load.answered_ms if status == 200 else load.refused_ms).append((ended - started) * 1e3)
            return status

        async def clock() -> None:
            await asyncio.sleep(max(0, begin - time.perf_counter()))
            before = time.process_time()
            await asyncio.sleep(load.seconds)
            load.client_cpu_s = time.process_time() - before

        await asyncio.gather(clock(), send_all(ask))
    return load


def _percentile(values: Sequence[float], percent: float) -> float:
    return round(float(np.percentile(values, percent)), 1) if values else float("nan")
