"""The deployment that makes of what callers send what a model takes: pictures are decoded, texts tokenised, off the event loop and away
from the model, in as many processes as that needs."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int32, UInt8
from ray.serve.handle import DeploymentHandle

from mm_core.data.image import decode_centre
from mm_core.data.problems import SampleProblem
from mm_core.data.text import CaptionTokenizer
from serve.canned import canned_inputs, judge
from serve.facts import Facts
from serve.inputs import Picture

_THREADS = 4


@dataclass(frozen=True)
class Preparation:
    """What a model takes."""

    image_size: int
    tokenizer: CaptionTokenizer


@dataclass(frozen=True)
class Prepared:
    """The inputs of one request."""

    images: UInt8[np.ndarray, "n size size 3"]
    image_rows: list[int]
    """Which of the request's inputs they are."""
    input_ids: Int32[np.ndarray, "m l"]
    lengths: Int32[np.ndarray, " m"]
    """Tokens that are no padding."""
    text_rows: list[int]


@dataclass(frozen=True)
class Unreadable:
    """A picture of the request that cannot be decoded."""

    position: int
    problem: str


class Preparer:
    """One process. What the model takes it asks the model."""

    async def __init__(self, encoder: DeploymentHandle, max_pixels: int) -> None:  # type: ignore[misc]  # Serve awaits it
        self._encoder, self._max_pixels = encoder, max_pixels
        self._preparation: Preparation = await encoder.preparation.remote()
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="prepare")
        await self.prepare([canned_inputs()])  # what the first picture would wait seconds for is imported now

    async def prepare(self, requests: Sequence[Sequence[str | Picture]]) -> list[Prepared | Unreadable]:
        """Of each request, texts cut or padded to the model's context, pictures at its size."""
        return await asyncio.gather(*map(self._prepared, requests))

    async def _prepared(self, inputs: Sequence[str | Picture]) -> Prepared | Unreadable:
        loop = asyncio.get_running_loop()
        text_rows = [i for i, value in enumerate(inputs) if isinstance(value, str)]
        image_rows = [i for i, value in enumerate(inputs) if not isinstance(value, str)]
        texts = loop.run_in_executor(self._threads, self._preparation.tokenizer.with_lengths, [str(inputs[i]) for i in text_rows])
        pictures = [value for value in inputs if isinstance(value, Picture)]
        decoded = await asyncio.gather(*(loop.run_in_executor(self._threads, self._decoded, picture) for picture in pictures))
        input_ids, lengths = await texts
        size = self._preparation.image_size
        images = np.empty((len(pictures), size, size, 3), dtype=np.uint8)
        for place, row, pixels in zip(images, image_rows, decoded, strict=True):
            if isinstance(pixels, str):
                return Unreadable(row, pixels)
            place[:] = pixels
        return Prepared(images, image_rows, input_ids, lengths, text_rows)

    async def probe(self) -> Facts:
        """Send the canned query the way every request goes.

        Raises:
            BundleError: the model's answer is none.
        """
        facts: Facts = await self._encoder.facts.remote()
        (answer,) = await self._encoder.encode.remote(await self.prepare([canned_inputs()]))
        judge(answer, facts)
        return facts

    def _decoded(self, picture: Picture) -> UInt8[np.ndarray, "size size 3"] | str:
        """The pixels, or what is wrong."""
        try:
            return decode_centre(picture.content, self._preparation.image_size, max_pixels=self._max_pixels)
        except (SampleProblem, ValueError) as problem:
            return str(problem)
