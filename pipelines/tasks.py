"""The same function over many items, as Ray tasks: for jobs whose tasks read and write by themselves and return little.

Ray Data moves rows between stages; where there are none to move, plain tasks take half the time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import TypeVar

import ray

from mm_core.errors import MMError
from pipelines.session import may_grow

_GROWN = 32
Item = TypeVar("Item")
Result = TypeVar("Result")


def run_tasks(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[tuple[int, Result]]:
    """Number of the item and result, in the order in which they end. Twice as many tasks as `processors` are handed out at a time, so
    that none waits for the next; those not done when the caller stops are cancelled.

    Raises:
        MMError: what the function raised first.
    """
    task, waiting = ray.remote(_returned), iter(enumerate(items))
    stored = ray.put(function)  # once, however many items: it may bring a long list of terms
    running: dict[ray.ObjectRef, int] = {}
    try:
        while running := running | {task.remote(stored, item): n for n, item in islice(waiting, max(0, 2 * processors() - len(running)))}:
            (first,), _ = ray.wait(list(running))
            result = ray.get(first)
            number = running.pop(first)
            if isinstance(result, MMError):
                raise result
            yield number, result
    finally:
        for ref in running:
            ray.cancel(ref)


def processors() -> int:
    """Of the cluster, now. One that may grow counts as so large that what waits for room makes it grow: an autoscaler looks at nothing
    else, and may have taken all nodes but the head away."""
    return max(_GROWN if may_grow() else 1, int(ray.cluster_resources().get("CPU", 1)))


def _returned(function: Callable[[Item], Result], item: Item) -> Result | MMError:
    """An error goes back as a value: Ray's wrapping would bury it."""
    try:
        return function(item)
    except MMError as error:
        return error
