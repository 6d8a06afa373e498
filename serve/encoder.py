"""The deployment that holds the model. Calls from many requests are joined into batches; decoding runs off the event loop."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import ray.serve
from numpy.typing import NDArray

from mm_core.bundle import load_bundle
from mm_core.data.image import decode_centre
from mm_core.data.problems import SampleProblem
from serve.config import ServeConfig

_THREADS = 4
Vector = NDArray[np.float32]


@ray.serve.deployment(name="Encoder")
class Encoder:
    """One replica of the model."""

    def __init__(self, model: str, config: ServeConfig) -> None:
        self._config = config
        self._bundle = load_bundle(model, device="cuda" if config.gpus_per_replica else "cpu")
        self._decoders = ThreadPoolExecutor(_THREADS, thread_name_prefix="decode")
        self._model = ThreadPoolExecutor(1, thread_name_prefix="model")
        for batch in (self._images, self._texts):
            batch.set_max_batch_size(config.max_batch_size)  # type: ignore[attr-defined]
            batch.set_batch_wait_timeout_s(config.batch_wait_timeout_s)  # type: ignore[attr-defined]

    async def describe(self) -> dict[str, Any]:
        return {"dimensions": self._bundle.embed_dim, "logit_scale": self._bundle.logit_scale}

    async def image(self, data: bytes) -> Vector | SampleProblem:
        """The features of one picture, or why it has none."""
        loop = asyncio.get_running_loop()
        try:
            pixels = await loop.run_in_executor(self._decoders, self._decode, data)
        except SampleProblem as problem:
            return problem
        vector: Vector = await self._images(pixels)
        return vector

    async def text(self, text: str) -> Vector:
        """The features of one text."""
        vector: Vector = await self._texts(text)
        return vector

    async def tokens(self, texts: list[str]) -> int:
        """How many tokens the texts have."""
        return sum(len(ids) for ids in self._bundle.tokenizer(texts)["input_ids"]) if texts else 0

    @ray.serve.batch
    async def _images(self, pixels: list[NDArray[np.uint8]]) -> list[Vector]:
        loop = asyncio.get_running_loop()
        return list(await loop.run_in_executor(self._model, self._bundle.image_features, np.stack(pixels)))

    @ray.serve.batch
    async def _texts(self, texts: list[str]) -> list[Vector]:
        loop = asyncio.get_running_loop()
        return list(await loop.run_in_executor(self._model, self._bundle.text_features, texts))

    def _decode(self, data: bytes) -> NDArray[np.uint8]:
        return decode_centre(data, self._bundle.image_size, max_pixels=self._config.max_pixels)
