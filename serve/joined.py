"""Requests that come while others are under way, sent on together: a call of another process costs milliseconds of processor time, which
many share. Who comes alone is sent on at once."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

T = TypeVar("T")
Send = Callable[[list[Sequence[Any]]], Awaitable[Sequence[T]]]
"""All requests' inputs to all their results."""


@dataclass
class Joined(Generic[T]):
    """For one event loop."""

    send: Send[T]
    max_inputs: int
    """Of requests that are sent together; one alone may have more."""
    at_a_time: int
    """Groups under way; who comes meanwhile waits for the next."""
    timeout_s: float
    """Of a group: one that never ends must not keep others waiting."""
    _waiting: deque[tuple[Sequence[Any], asyncio.Future[T]]] = field(default_factory=deque)
    _under_way: set[asyncio.Task[None]] = field(default_factory=set)

    async def ask(self, inputs: Sequence[Any]) -> T:
        """
        Raises:
            TimeoutError: no answer in time. And whatever `send` raises, to all who were sent together.
        """
        answer: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._waiting.append((inputs, answer))
        self._go_on()
        return await answer

    def _go_on(self) -> None:
        while len(self._under_way) < self.at_a_time and (group := self._next()):
            task = asyncio.create_task(self._sent(group))
            self._under_way.add(task)
            task.add_done_callback(self._ended)

    def _next(self) -> list[tuple[Sequence[Any], asyncio.Future[T]]]:
        """Who waits, but for those that have given up."""
        group, count = list[tuple[Sequence[Any], asyncio.Future[T]]](), 0
        while self._waiting and (not group or count + len(self._waiting[0][0]) <= self.max_inputs):
            inputs, answer = self._waiting.popleft()
            if not answer.done():
                group.append((inputs, answer))
                count += len(inputs)
        return group

    async def _sent(self, group: list[tuple[Sequence[Any], asyncio.Future[T]]]) -> None:
        try:
            async with asyncio.timeout(self.timeout_s):
                results = await self.send([inputs for inputs, _ in group])
        except Exception as error:
            for _, answer in group:
                if not answer.done():
                    answer.set_exception(error)
        else:
            for (_, answer), result in zip(group, results, strict=True):
                if not answer.done():
                    answer.set_result(result)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._under_way.discard(task)
        self._go_on()
