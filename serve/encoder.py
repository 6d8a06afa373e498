"""The deployment that holds the model. Inputs of many requests are joined into batches; decoding runs off the event loop.

The gateway knows the types here: torch and the model's library are imported only by the copy that holds a model.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import ray.serve
from jaxtyping import Float32, UInt8

from mm_core.data.image import decode_centre
from mm_core.data.problems import SampleProblem
from serve.config import ServeConfig

_DECODERS = 4


@dataclass(frozen=True)
class Encoded:
    """The features of one request's inputs, in order, L2-normalised."""

    features: Float32[np.ndarray, "n d"]
    tokens: int
    """That the model read: texts cut to its context, begin and end marks included."""


@dataclass(frozen=True)
class Unreadable:
    """An image of the request that cannot be decoded."""

    position: int
    problem: SampleProblem


class Encoder:
    """One copy of the model."""

    def __init__(self, model: str, config: ServeConfig) -> None:
        import torch

        from mm_core.bundle import load_bundle

        torch.set_num_threads(config.threads_per_replica or max(1, (os.cpu_count() or 1) // config.replicas))
        self._config = config
        self._bundle = load_bundle(model, device="cuda" if config.gpus_per_replica else "cpu")
        self._decoders = ThreadPoolExecutor(_DECODERS, thread_name_prefix="decode")
        self._model = ThreadPoolExecutor(1, thread_name_prefix="model")
        for batch in (self._image_features, self._text_features):
            batch.set_max_batch_size(config.max_batch_size)
            batch.set_batch_wait_timeout_s(config.batch_wait_timeout_s)

    async def ping(self) -> None:
        """Answers when the model is loaded."""

    async def encode(self, inputs: Sequence[str | bytes]) -> Encoded | Unreadable:
        """Features of texts and of encoded images. Every image is decoded before any is computed."""
        texts = [value for value in inputs if isinstance(value, str)]
        try:
            ready = await asyncio.gather(*(self._decoded(i, value) for i, value in enumerate(inputs)))
        except _UndecodableError as error:
            return error.unreadable
        features = await asyncio.gather(
            *(self._text_features(value) if isinstance(value, str) else self._image_features(value) for value in ready)
        )
        return Encoded(np.stack(features), await asyncio.get_running_loop().run_in_executor(self._model, self._tokens, texts))

    async def _decoded(self, position: int, value: str | bytes) -> str | UInt8[np.ndarray, "h w 3"]:
        if isinstance(value, str):
            return value
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(self._decoders, self._decode, value)
        except SampleProblem as problem:
            raise _UndecodableError(Unreadable(position, problem)) from None

    def _decode(self, data: bytes) -> UInt8[np.ndarray, "h w 3"]:
        return decode_centre(data, self._bundle.image_size, max_pixels=self._config.max_pixels)

    def _tokens(self, texts: list[str]) -> int:
        tokenizer, context = self._bundle.tokenizer, self._bundle.context_length
        return sum(len(ids) for ids in tokenizer(texts, truncation=True, max_length=context)["input_ids"]) if texts else 0

    @ray.serve.batch  # type: ignore[untyped-decorator]
    async def _image_features(self, images: list[UInt8[np.ndarray, "h w 3"]]) -> list[Float32[np.ndarray, " d"]]:
        loop = asyncio.get_running_loop()
        return list(await loop.run_in_executor(self._model, self._bundle.image_features, np.stack(images)))

    @ray.serve.batch  # type: ignore[untyped-decorator]
    async def _text_features(self, texts: list[str]) -> list[Float32[np.ndarray, " d"]]:
        loop = asyncio.get_running_loop()
        return list(await loop.run_in_executor(self._model, self._bundle.text_features, texts))


class _UndecodableError(Exception):
    def __init__(self, unreadable: Unreadable) -> None:
        super().__init__(str(unreadable.problem))
        self.unreadable = unreadable
