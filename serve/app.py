"""The HTTP interface: checks a request against the bounds, asks the encoder, shapes the answer.

No `from __future__ import annotations` here: FastAPI reads the annotations of methods that Ray Serve has moved elsewhere.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence

import numpy as np
import ray.serve
from fastapi import FastAPI, Request
from fastapi.responses import Response
from numpy.typing import NDArray
from ray.serve.handle import DeploymentHandle

from mm_core.data.problems import SampleProblem
from serve.config import ServeConfig
from serve.encoder import Encoder
from serve.inputs import checked, encoded, is_image
from serve.problems import RESPONSES, BadInput, install, problem
from serve.schema import (
    ClassifyRequest,
    ClassifyResponse,
    Embedding,
    EmbeddingRequest,
    EmbeddingResponse,
    Health,
    Score,
    Usage,
)

api = FastAPI(title="mm", summary="Embeddings and zero-shot classification of images and texts", version="1")
install(api)
MAX_REQUEST_BYTES = 64 << 20
Vector = NDArray[np.float32]


@api.middleware("http")
async def bounded(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
    """Refuse a body above the bound before it is read."""
    length = request.headers.get("content-length", "0")
    if not length.isdigit() or int(length) > MAX_REQUEST_BYTES:
        return problem(413, f"a body of {length} bytes, at most {MAX_REQUEST_BYTES:,}")
    return await call_next(request)


@ray.serve.deployment(name="Gateway")
@ray.serve.ingress(api)
class Gateway:
    """Stateless but for a handle to the encoder."""

    def __init__(self, name: str, config: ServeConfig, encoder: DeploymentHandle) -> None:
        self._name, self._config, self._encoder = name, config, encoder
        self._facts: dict[str, float] = {}

    @api.get("/healthz")
    async def healthz(self) -> Health:
        await self._described()
        return Health(model=self._name)

    @api.post("/v1/embeddings", responses=RESPONSES)  # type: ignore[arg-type]
    async def embeddings(self, request: EmbeddingRequest) -> EmbeddingResponse:
        inputs = [request.input] if isinstance(request.input, str) else request.input
        if not inputs:
            raise BadInput("input: the list is empty; give at least one text or image", 422)
        own = int((await self._described())["dimensions"])
        if request.dimensions not in (None, own):
            raise BadInput(f"dimensions: this model has {own}, other sizes are not offered", 422)
        vectors = await self._encode(inputs, "input")
        texts = [text for text in inputs if not is_image(text)]
        tokens = await self._encoder.tokens.remote(texts)
        data = [Embedding(index=i, embedding=encoded(v, request.encoding_format)) for i, v in enumerate(vectors)]
        return EmbeddingResponse(data=data, model=self._name, usage=Usage(prompt_tokens=tokens, total_tokens=tokens))

    @api.post("/v1/classify", responses=RESPONSES)  # type: ignore[arg-type]
    async def classify(self, request: ClassifyRequest) -> ClassifyResponse:
        if not is_image(request.image):
            raise BadInput("image: not a data URI; send data:image/jpeg;base64,…", 422)
        templates = request.templates or ["{c}"]
        for template in templates:
            if "{c}" not in template:
                raise BadInput(f"templates: {template!r} has no {{c}} where the label goes", 422)
        prompts = [template.replace("{c}", label) for label in request.labels for template in templates]
        image, *texts = await self._encode([request.image, *prompts], "labels", named={0: "image"})
        classes = np.stack(texts).reshape(len(request.labels), len(templates), -1).mean(axis=1)
        classes /= np.linalg.norm(classes, axis=1, keepdims=True)
        logits = (await self._described())["logit_scale"] * (classes @ image)
        weights = np.exp(logits - logits.max())
        scores = [Score(label=label, score=float(w)) for label, w in zip(request.labels, weights / weights.sum(), strict=True)]
        return ClassifyResponse(model=self._name, scores=sorted(scores, key=lambda s: -s.score))

    async def _encode(self, inputs: Sequence[str], where: str, named: dict[int, str] | None = None) -> list[Vector]:
        """Features of texts and images, in order. All of a call are checked before any is computed."""
        if len(inputs) > self._config.max_inputs:
            raise BadInput(f"{where}: {len(inputs)} inputs in one call, at most {self._config.max_inputs}", 413)
        names = [(named or {}).get(i, f"{where}.{i}") for i in range(len(inputs))]
        values = [checked(value, name, self._config) for value, name in zip(inputs, names, strict=True)]
        calls = [self._encoder.image.remote(v) if isinstance(v, bytes) else self._encoder.text.remote(v) for v in values]
        vectors = []
        for name, result in zip(names, await asyncio.gather(*calls), strict=True):
            if isinstance(result, SampleProblem):
                raise BadInput(f"{name}: {result}", 422)
            vectors.append(result)
        return vectors

    async def _described(self) -> dict[str, float]:
        if not self._facts:
            self._facts = await self._encoder.describe.remote()
        return self._facts


def build(model: str, name: str, config: ServeConfig) -> ray.serve.Application:
    """The application: a gateway before the replicas of the model."""
    concurrent = config.max_batch_size * 4
    encoder = Encoder.options(
        num_replicas=config.replicas,
        max_ongoing_requests=concurrent,
        ray_actor_options={"num_cpus": 0.5, "num_gpus": config.gpus_per_replica},
    ).bind(model, config)
    gateway = Gateway.options(
        max_ongoing_requests=concurrent,
        max_queued_requests=config.max_queued_requests,
        ray_actor_options={"num_cpus": 0.1},
    )
    return gateway.bind(name, config, encoder)
