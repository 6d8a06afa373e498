"""The HTTP interface: checks a request against the bounds, asks the encoder, shapes the answer.

The application is built in the gateway from what is served, so that later tasks can bring other routes.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import numpy as np
import ray.serve
from fastapi import FastAPI
from jaxtyping import Float32
from ray.serve.config import BackpressureConfig
from ray.serve.handle import DeploymentHandle

from serve.bounds import Bounds
from serve.config import ServeConfig
from serve.encoder import Encoded, Encoder, Unreadable
from serve.inputs import LABEL_PLACE, checked_image, checked_inputs, checked_prompts, encoded
from serve.problems import RESPONSES, RETRY_AFTER_S, InputError, install
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

_REFUSED_AT_A_TIME = 1000
"""Requests above the bound that may be in the gateway while it refuses them."""

Encode = Callable[[Sequence[str | bytes]], Awaitable[Encoded | Unreadable]]


@dataclass(frozen=True)
class Served:
    """What the gateway knows of the model behind it."""

    source: str
    """A bundle's folder, or a hub id."""
    name: str
    embed_dim: int
    logit_scale: float


def create_app(served: Served, config: ServeConfig, encode: Encode, ping: Callable[[], Awaitable[None]]) -> FastAPI:
    """The routes of a contrastive model."""
    app = FastAPI(title="mm", summary="Embeddings and zero-shot classification of images and texts", version="1")
    app.add_middleware(Bounds, max_requests=config.max_requests, max_request_bytes=config.max_request_bytes)
    install(app)

    @app.get("/healthz")
    async def healthz() -> Health:
        """Answers when the model does."""
        await ping()
        return Health(model=served.name)

    @app.post("/v1/embeddings", responses=RESPONSES)
    async def embeddings(request: EmbeddingRequest) -> EmbeddingResponse:
        """Vectors of texts and images in one space, L2-normalised: their dot product is the cosine."""
        if request.dimensions not in (None, served.embed_dim):
            raise InputError(f"dimensions: this model has {served.embed_dim}, other sizes are not offered")
        inputs = checked_inputs([request.input] if isinstance(request.input, str) else request.input, config)
        result = _readable(await encode(inputs), [f"input.{i}" for i in range(len(inputs))])
        data = [Embedding(index=i, embedding=encoded(v, request.encoding_format)) for i, v in enumerate(result.features)]
        usage = Usage(prompt_tokens=result.tokens, total_tokens=result.tokens)
        return EmbeddingResponse(data=data, model=served.name, usage=usage)

    @app.post("/v1/classify", responses=RESPONSES)
    async def classify(request: ClassifyRequest) -> ClassifyResponse:
        """Zero-shot: which of the labels an image shows."""
        image = checked_image(request.image, "image", config)
        templates = request.templates or [LABEL_PLACE]
        prompts = checked_prompts(request.labels, templates, config)
        features = _readable(await encode([image, *prompts]), ["image"]).features
        by_label = features[1:].reshape(len(request.labels), len(templates), -1)
        probabilities = zero_shot(features[0], by_label, served.logit_scale)
        scores = [Score(label=label, score=float(p)) for label, p in zip(request.labels, probabilities, strict=True)]
        return ClassifyResponse(model=served.name, scores=sorted(scores, key=lambda score: -score.score))

    return app


def zero_shot(image: Float32[np.ndarray, " d"], prompts: Float32[np.ndarray, "c t d"], logit_scale: float) -> Float32[np.ndarray, " c"]:
    """Softmax over classes of the scaled cosine with each class's mean prompt (Radford et al. 2021, section 3.1.4)."""
    classes = prompts.mean(axis=1)
    classes /= np.linalg.norm(classes, axis=1, keepdims=True)
    logits = logit_scale * (classes @ image)
    weights = np.exp(logits - logits.max())
    probabilities: Float32[np.ndarray, " c"] = weights / weights.sum()
    return probabilities


def _readable(result: Encoded | Unreadable, names: Sequence[str]) -> Encoded:
    if isinstance(result, Unreadable):
        raise InputError(f"{names[result.position]}: {result.problem}")
    return result


@ray.serve.ingress()
class Gateway:
    """The one door: it holds no model, only a handle to the encoder."""

    def __init__(self, served: Served, config: ServeConfig, encoder: DeploymentHandle) -> None:
        self._service = create_app(served, config, encoder.encode.remote, encoder.ping.remote)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return self._service


def build(served: Served, config: ServeConfig) -> ray.serve.Application:
    """The application: a gateway before the copies of the model."""
    encoder = (
        ray.serve.deployment(Encoder)
        .options(
            num_replicas=config.replicas,
            max_ongoing_requests=max(config.max_requests, config.max_batch_size),
            ray_actor_options={"num_cpus": 0.5, "num_gpus": config.gpus_per_replica},
        )
        .bind(served.source, config)
    )
    gateway = ray.serve.deployment(Gateway).options(
        max_ongoing_requests=config.max_requests + _REFUSED_AT_A_TIME,
        max_queued_requests=_REFUSED_AT_A_TIME,
        backpressure_config=BackpressureConfig(status_code=429, retry_after_s=RETRY_AFTER_S),
        ray_actor_options={"num_cpus": 0.1},
    )
    return gateway.bind(served, config, encoder)
