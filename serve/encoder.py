"""The deployment that holds the model: inputs of many requests are joined into batches.

torch and the model's library are imported only by the copy that holds a model.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import ray.serve
from jaxtyping import Float32, Int32, UInt8

from mm_core.errors import BundleError
from serve.config import Compute, Precision
from serve.encoded import Encoded, Matched
from serve.facts import Facts
from serve.prepare import Preparation, Prepared, Unreadable
from serve.store import ModelStore

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

    from mm_core.bundle import Bundle
    from mm_core.models.fused import Fused

_PARTS = 4
"""A batch is made of so many parts at least, so that requests of many inputs fill it well."""
_BUCKET = 8
"""Tokens. Texts whose lengths round up to the same number of them are computed together; on a GPU, where another call costs more than
tokens do, each bucket is twice as long as the one before."""
_CARD = "README.md"
_STREAMS = 4
"""On a processor threads that each compute a batch of their own wait for nobody, where those that share one wait for the slowest at every
layer: as soon as the machine does something else beside, that is most of the time."""

Texts = tuple[Int32[np.ndarray, "n l"], Int32[np.ndarray, " n"]]
"""Token ids, and how many of each text's are no padding."""
Pairs = tuple[UInt8[np.ndarray, "n h w 3"], Texts]
"""Pictures, each with the text at its place."""


def _image_count(parts: list[UInt8[np.ndarray, "n h w 3"]]) -> int:
    return sum(len(part) for part in parts)


def _text_count(parts: list[Texts]) -> int:
    return sum(len(lengths) for _, lengths in parts)


def _pair_count(parts: list[Pairs]) -> int:
    return sum(len(images) for images, _ in parts)


class Encoder:
    """One copy of the model."""

    def __init__(self, reference: str, compute: Compute, store: ModelStore) -> None:
        """
        Raises:
            BundleError: it cannot be loaded, or is damaged.
        """
        source = store.fetch(reference)  # before the imports, which take seconds: what is damaged is told at once

        import torch

        from mm_core.bundle import load_bundle

        threads = compute.threads_per_replica or max(1, (os.cpu_count() or 1) // compute.replicas)
        streams = compute.streams or (1 if compute.gpus_per_replica else min(threads, _STREAMS))
        torch.set_num_threads(max(1, threads // streams))
        bundle = load_bundle(source, device="cuda" if compute.gpus_per_replica else "cpu")
        self._compute, self._bundle = compute, bundle
        self._facts = facts_of(source, bundle)
        self._trims = not bundle.towers.sees_padding
        if compute.precision is Precision.BF16:
            cast_products(bundle.model)
        self._image_tower, self._text_tower = bundle.towers.image_vectors, bundle.towers.text_vectors
        if compute.compile:
            self._image_tower = torch.compile(self._image_tower, dynamic=True)
            self._text_tower = torch.compile(self._text_tower, dynamic=True)
        self._model = ThreadPoolExecutor(streams, thread_name_prefix="model")
        self._batch_size = max(1, compute.max_batch_size // streams)
        batched = partial(
            ray.serve.batch,
            max_batch_size=self._batch_size,
            batch_wait_timeout_s=compute.batch_wait_timeout_s,
            max_concurrent_batches=streams,
        )
        self._images = batched(self._image_batch, batch_size_fn=_image_count)
        self._texts = batched(self._text_batch, batch_size_fn=_text_count)
        self._pairs = batched(self._pair_batch, batch_size_fn=_pair_count)

    async def preparation(self) -> Preparation:
        return Preparation(self._bundle.image_size, self._bundle.tokenise)

    async def facts(self) -> Facts:
        return self._facts

    async def encode(self, requests: list[Prepared | Unreadable]) -> list[Encoded | Unreadable]:
        """Of each request, features of its inputs, in order."""
        return await asyncio.gather(*map(self._encoded, requests))

    async def _encoded(self, prepared: Prepared | Unreadable) -> Encoded | Unreadable:
        if isinstance(prepared, Unreadable):
            return prepared
        size = max(1, self._batch_size // _PARTS)
        images = [self._images(prepared.images[i : i + size]) for i in range(0, len(prepared.images), size)]
        texts = [
            self._texts((prepared.input_ids[i : i + size], prepared.lengths[i : i + size])) for i in range(0, len(prepared.lengths), size)
        ]
        vectors = np.concatenate(await asyncio.gather(*images, *texts))
        ordered = np.empty_like(vectors)
        ordered[[*prepared.image_rows, *prepared.text_rows]] = vectors
        return _normalised(ordered, prepared)

    async def fuse(self, requests: list[Prepared | Unreadable]) -> list[Encoded | Unreadable]:
        """Of each request, features of its first picture with its first text, and so on, by a model with a fusion."""
        return await asyncio.gather(*map(self._fused, requests))

    async def _fused(self, prepared: Prepared | Unreadable) -> Encoded | Unreadable:
        if isinstance(prepared, Unreadable):
            return prepared
        size = max(1, self._batch_size // _PARTS)
        parts = [slice(i, i + size) for i in range(0, len(prepared.images), size)]
        pairs = [self._pairs((prepared.images[part], (prepared.input_ids[part], prepared.lengths[part]))) for part in parts]
        return _normalised(np.concatenate(await asyncio.gather(*pairs)), prepared)

    async def match(self, requests: list[Prepared | Unreadable]) -> list[Matched | Unreadable]:
        """Of each request, every picture with every text, of a model with a fusion. Not computed together: pairs are many."""
        loop = asyncio.get_running_loop()
        return await asyncio.gather(*(loop.run_in_executor(self._model, self._matched, prepared) for prepared in requests))

    def _matched(self, prepared: Prepared | Unreadable) -> Matched | Unreadable:
        if isinstance(prepared, Unreadable):
            return prepared

        import torch

        model, device = self._fusion(), self._bundle.device
        length = int(prepared.lengths.max())
        images, ids = torch.from_numpy(prepared.images).to(device), torch.from_numpy(prepared.input_ids[:, :length]).to(device).long()
        with torch.inference_mode(), self._autocast():
            scores = model.match_all(images, ids, at_a_time=self._batch_size)
        return Matched(scores.float().cpu().numpy())

    def _fusion(self) -> Fused:
        from mm_core.models.fused import Fused

        assert isinstance(self._bundle.towers, Fused), "the gateway knows the task"
        return self._bundle.towers

    async def _image_batch(self, parts: list[UInt8[np.ndarray, "n h w 3"]]) -> list[Float32[np.ndarray, "n d"]]:
        return await asyncio.get_running_loop().run_in_executor(self._model, self._image_vectors, parts)

    async def _text_batch(self, parts: list[Texts]) -> list[Float32[np.ndarray, "n d"]]:
        return await asyncio.get_running_loop().run_in_executor(self._model, self._text_vectors, parts)

    async def _pair_batch(self, parts: list[Pairs]) -> list[Float32[np.ndarray, "n e"]]:
        return await asyncio.get_running_loop().run_in_executor(self._model, self._pair_vectors, parts)

    def _image_vectors(self, parts: list[UInt8[np.ndarray, "n h w 3"]]) -> list[Float32[np.ndarray, "n d"]]:
        import torch

        pixels = torch.from_numpy(np.concatenate(parts)).to(self._bundle.device)
        return _split(self._computed(self._image_tower, pixels), [len(part) for part in parts])

    def _text_vectors(self, parts: list[Texts]) -> list[Float32[np.ndarray, "n d"]]:
        """Texts of about one length together, without the padding that none of them needs."""
        import torch

        input_ids, lengths = np.concatenate([ids for ids, _ in parts]), np.concatenate([n for _, n in parts])
        vectors = np.empty((len(lengths), self._facts.embed_dim), dtype=np.float32)
        longest, on_gpu = input_ids.shape[1], self._bundle.device.type != "cpu"
        for length, rows in buckets(lengths, longest, doubling=on_gpu) if self._trims else [(longest, np.arange(len(lengths)))]:
            ids = torch.from_numpy(input_ids[rows, :length]).to(self._bundle.device).long()
            vectors[rows] = self._computed(self._text_tower, ids)
        return _split(vectors, [len(n) for _, n in parts])

    def _pair_vectors(self, parts: list[Pairs]) -> list[Float32[np.ndarray, "n e"]]:
        """All at the length of the longest text: padding is masked."""
        import torch

        images, input_ids = np.concatenate([one for one, _ in parts]), np.concatenate([ids for _, (ids, _) in parts])
        longest = max(int(lengths.max()) for _, (_, lengths) in parts)
        pixels, ids = (torch.from_numpy(one).to(self._bundle.device) for one in (images, input_ids[:, :longest]))
        return _split(self._computed(self._fusion().multimodal_vectors, pixels, ids.long()), [len(one) for one, _ in parts])

    def _computed(self, part: object, *inputs: Tensor) -> Float32[np.ndarray, "n d"]:
        import torch

        with torch.inference_mode(), self._autocast():
            vectors: Float32[np.ndarray, "n d"] = part(*inputs).float().cpu().numpy()  # type: ignore[operator]
        return vectors

    def _autocast(self) -> AbstractContextManager[object]:
        import torch

        return torch.autocast(self._bundle.device.type, dtype=torch.bfloat16, enabled=self._compute.precision is Precision.BF16)


def cast_products(model: Module) -> None:
    """Make the weights of matrix products bfloat16 once: autocast, which then finds nothing to do, would at every call."""
    import torch

    for module in model.modules():
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)):
            module.to(torch.bfloat16)


def buckets(lengths: Int32[np.ndarray, " n"], longest: int, *, doubling: bool) -> Iterator[tuple[int, Int32[np.ndarray, " m"]]]:
    """Rows of texts by the length they are computed at: 8, 16, 24 … tokens, or 8, 16, 32 …, up to `longest`."""
    edges = [_BUCKET << i for i in range(longest.bit_length())] if doubling else list(range(_BUCKET, longest, _BUCKET))
    edges = [*(edge for edge in edges if edge < longest), longest]
    places = np.searchsorted(edges, lengths)
    for place in np.unique(places):
        yield edges[place], np.flatnonzero(places == place)


def facts_of(source: str, bundle: Bundle) -> Facts:
    """
    Raises:
        BundleError: which model it is cannot be known.
    """
    from mm_core.model_digest import model_digest

    manifest, card = bundle.manifest, Path(source) / _CARD
    try:
        text = card.read_text(encoding="utf-8") if card.is_file() else ""
    except (OSError, UnicodeDecodeError) as error:
        raise BundleError(f"{card} cannot be read: {error}") from None
    return Facts(
        digest=model_digest(source),
        task=bundle.task,
        embed_dim=bundle.embed_dim,
        fused_dim=bundle.fused_dim,
        image_size=bundle.image_size,
        context_length=bundle.context_length,
        parameters=sum(parameter.numel() for parameter in bundle.model.parameters()),
        logit_scale=bundle.logit_scale,
        logit_bias=bundle.towers.logit_bias,
        recipe=manifest.recipe if manifest else None,
        data_fingerprint=manifest.data_fingerprint if manifest else None,
        metrics=manifest.metrics if manifest else {},
        card=text,
    )


def _normalised(vectors: Float32[np.ndarray, "n d"], prepared: Prepared) -> Encoded:
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    features = vectors / np.maximum(norms, np.finfo(np.float32).tiny)
    return Encoded(features, norms[:, 0], int(prepared.lengths.sum()))


def _split(vectors: Float32[np.ndarray, "n d"], sizes: list[int]) -> list[Float32[np.ndarray, "m d"]]:
    return np.split(vectors, np.cumsum(sizes)[:-1])
