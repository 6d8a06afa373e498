"""Requests that wait for others go on together; each gets its own answer, a failure is told to all, and nobody waits for what hangs."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

from serve.joined import Joined


class Upstream:
    """Answers with each request's sum, once it is let go."""

    def __init__(self) -> None:
        self.groups: list[list[Sequence[int]]] = []
        self.open = asyncio.Event()

    async def __call__(self, requests: list[Sequence[int]]) -> list[int]:
        self.groups.append(requests)
        await self.open.wait()
        if any(13 in one for one in requests):
            raise LookupError("13")
        return [sum(one) for one in requests]


def joined(upstream: Upstream, timeout_s: float = 5) -> Joined[int]:
    return Joined(upstream, max_inputs=4, at_a_time=1, timeout_s=timeout_s)


def ask_all(requests: Sequence[Sequence[int]]) -> tuple[list[Any], list[list[Sequence[int]]]]:
    """All at once: answers, and what was sent together."""

    async def run() -> tuple[list[Any], list[list[Sequence[int]]]]:
        upstream = Upstream()
        one = joined(upstream)
        asking = [asyncio.create_task(one.ask(inputs)) for inputs in requests]
        await asyncio.sleep(0)
        upstream.open.set()
        return await asyncio.gather(*asking, return_exceptions=True), upstream.groups

    return asyncio.run(run())


def test_who_waits_goes_together_up_to_the_bound() -> None:
    answers, groups = ask_all([[1], [2], [3, 4], [5], [6, 7, 8, 9, 10], [11]])
    assert answers == [1, 2, 7, 5, 40, 11]
    assert groups == [[[1]], [[2], [3, 4], [5]], [[6, 7, 8, 9, 10]], [[11]]]


def test_a_failure_is_told_to_those_that_went_together() -> None:
    answers, _ = ask_all([[1], [2], [13], [4, 5, 6], [7]])
    assert [type(one) for one in answers] == [int, LookupError, LookupError, int, int]


def test_who_gives_up_is_not_sent() -> None:
    async def run() -> list[list[Sequence[int]]]:
        upstream = Upstream()
        one = joined(upstream)
        asking = [asyncio.create_task(one.ask([i])) for i in range(3)]
        await asyncio.sleep(0)
        asking[1].cancel()
        await asyncio.sleep(0)
        upstream.open.set()
        assert await asking[2] == 2
        return upstream.groups

    assert asyncio.run(run()) == [[[0]], [[2]]]


def test_what_hangs_is_given_up_and_others_go_on() -> None:
    async def run() -> int:
        upstream = Upstream()
        one = joined(upstream, timeout_s=0.05)
        hanging, next_one = asyncio.create_task(one.ask([1])), asyncio.create_task(one.ask([2]))
        with pytest.raises(TimeoutError):
            await hanging
        upstream.open.set()
        return await next_one

    assert asyncio.run(run()) == 2
