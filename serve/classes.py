"""Class vectors of label sets, computed once for each version of a model and kept."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float32

from mm_core.evaluation.zeroshot import mean_per_class, prompts
from serve.facts import Version
from serve.upstream import Upstream

_PROMPTS = 128
"""That go to the model at a time: a large set leaves room between for other requests."""
_MAX_KEPT_BYTES = 64 << 20

Classes = Float32[np.ndarray, "c d"]


class ClassVectors:
    """The least recently used go first."""

    def __init__(self, upstream: Upstream) -> None:
        self._upstream = upstream
        self._kept: OrderedDict[object, Classes] = OrderedDict()
        self._coming: dict[object, asyncio.Task[Classes]] = {}

    async def of(self, model: str, version: Version, labels: Sequence[str], templates: Sequence[str]) -> Classes:
        """Whoever asks for what is being computed waits for it, and if one gives up the others still get it.

        Raises:
            OverloadedError: too many inputs wait.
        """
        key = (version.facts.digest, tuple(labels), tuple(templates))
        if (kept := self._kept.get(key)) is not None:
            self._kept.move_to_end(key)
            return kept
        if key not in self._coming:
            self._coming[key] = asyncio.create_task(self._compute(model, version, labels, templates))
            self._coming[key].add_done_callback(lambda task: self._arrived(key, task))
        return await asyncio.shield(self._coming[key])

    async def _compute(self, model: str, version: Version, labels: Sequence[str], templates: Sequence[str]) -> Classes:
        texts = [text for label in labels for text in prompts(label, templates)]
        found = []
        for start in range(0, len(texts), _PROMPTS):
            part = texts[start : start + _PROMPTS]
            found.append((await self._upstream.encode(model, version, part, part)).features)
        classes: Classes = mean_per_class(np.concatenate(found).reshape(len(labels), len(templates), -1))
        return classes

    def _arrived(self, key: object, task: asyncio.Task[Classes]) -> None:
        del self._coming[key]
        if not task.cancelled() and task.exception() is None:
            self._kept[key] = task.result()
            while sum(classes.nbytes for classes in self._kept.values()) > _MAX_KEPT_BYTES and len(self._kept) > 1:
                self._kept.popitem(last=False)
