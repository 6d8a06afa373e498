"""The HTTP interface: checks a request against the bounds, asks a model, shapes the answer.

The application is built in the gateway from what is served: which routes there are follows from the models' tasks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass

import numpy as np
from fastapi import FastAPI, Request, Response
from jaxtyping import Float32
from ray.serve.handle import DeploymentHandle

from mm_core.data.text import TEMPLATE_MARK
from serve.access import Access
from serve.bounds import Bounds
from serve.classes import ClassVectors
from serve.config import ServeConfig
from serve.facts import Facts, Version
from serve.fetch import Fetcher
from serve.form import FILE, FILES, STRING, STRINGS, FormRoute, form_too
from serve.inputs import Checker, encoded, shortened
from serve.keys import Door
from serve.problems import RESPONSES, InputError, install
from serve.schema import (
    ClassifyRequest,
    ClassifyResponse,
    Embedding,
    EmbeddingRequest,
    EmbeddingResponse,
    ImageInput,
    Input,
    MatchRequest,
    MatchResponse,
    PairInput,
    Score,
    TextInput,
    Usage,
)
from serve.search import attach_search
from serve.status import attach_status
from serve.tasks import FUSED, endpoints_of
from serve.upstream import Upstream
from serve.web import attach_page

_SESSION = "x-session-id"
_VERSION = "x-mm-version"


@dataclass(frozen=True)
class Desk:
    """What every route needs."""

    config: ServeConfig
    upstream: Upstream
    checker: Checker

    def choose(self, request: Request, model: str | None, response: Response) -> tuple[str, Version]:
        """The model that is asked for, and the version of it for this caller: of one session, else of one key, always the same.

        Raises:
            InputError: it is not served.
            UnavailableError: no version of it is up yet.
        """
        state = request.state
        session = request.headers.get(_SESSION) or getattr(state, "key", None) or state.request_id
        name, version = self.upstream.choose(model, session)
        state.model, state.version = name, version.reference
        response.headers[_VERSION] = version.reference
        return name, version


def create_app(
    config: ServeConfig,
    tasks: Sequence[str],
    upstream: Upstream,
    *,
    searcher: DeploymentHandle | None = None,
    lifespan: Callable[[FastAPI], AbstractAsyncContextManager[None]] | None = None,
) -> FastAPI:
    """The routes of models with these tasks."""
    app = FastAPI(
        title="mm",
        summary="Embeddings, zero-shot classification and search of images and texts",
        version="1",
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
    )
    app.add_middleware(Bounds, bounds=config.bounds)
    app.add_middleware(Door, keys=config.keys, needs_key=config.needs_key)
    app.add_middleware(Access, measured=upstream.measured)
    app.router.route_class = FormRoute
    install(app)
    desk = Desk(config, upstream, Checker(config.bounds, Fetcher(config.fetching, config.bounds.max_image_bytes)))
    there = endpoints_of(tasks)
    attach: dict[str, Callable[[FastAPI, Desk], None]] = {
        "embeddings": _attach_embeddings,
        "classify": _attach_classify,
        "match": _attach_match,
    }
    for name in there:
        if name in attach:
            attach[name](app, desk)
    if "search" in there and searcher is not None:
        attach_search(app, desk, searcher)
    attach_status(app, desk, searchable=searcher is not None)
    attach_page(app)
    return app


def _attach_embeddings(app: FastAPI, desk: Desk) -> None:
    fields = {"input": FILES, "model": STRING, "encoding_format": {"enum": ["float", "base64"]}}

    @app.post("/v1/embeddings", responses=RESPONSES, openapi_extra=form_too(fields))
    async def embeddings(request: Request, response: Response, body: EmbeddingRequest) -> EmbeddingResponse:
        """Vectors of texts and images in one space, L2-normalised: their dot product is the cosine. Vectors of pairs, of models with a
        fusion, are in another: they compare with each other alone."""
        name, version = desk.choose(request, body.model, response)
        given = body.input if isinstance(body.input, list) else [body.input]
        alone = {i: one for i, one in enumerate(given) if not isinstance(one, PairInput)}
        pairs = {i: one for i, one in enumerate(given) if isinstance(one, PairInput)}
        _check_widths(version.facts, alone, pairs, body.dimensions)
        spelled = [
            *alone.values(),
            *(ImageInput(image=pair.image) for pair in pairs.values()),
            *(TextInput(text=pair.text) for pair in pairs.values()),
        ]
        names = [*(f"input.{i}" for i in alone), *(f"input.{i}.{side}" for side in ("image", "text") for i in pairs)]
        inputs = await desk.checker.inputs(spelled, names, request.state.hold)
        request.state.inputs = len(inputs)
        data, tokens, count = list[Embedding](), 0, len(alone)
        for rows, ask, part in (
            (list(alone), desk.upstream.encode, slice(count)),
            (list(pairs), desk.upstream.fuse, slice(count, None)),
        ):
            if rows:
                result = await ask(name, version, inputs[part], names[part])
                vectors = shortened(result.features, body.dimensions)
                data += [Embedding(index=i, embedding=encoded(v, body.encoding_format)) for i, v in zip(rows, vectors, strict=True)]
                tokens += result.tokens
        data.sort(key=lambda one: one.index)
        return EmbeddingResponse(data=data, model=name, usage=Usage(prompt_tokens=tokens, total_tokens=tokens))


def _check_widths(facts: Facts, alone: Iterable[int], pairs: Iterable[int], dimensions: int | None) -> None:
    """
    Args:
        alone, pairs: places of the inputs of each kind.

    Raises:
        InputError: pairs for a model without a fusion, or more dimensions than vectors of a kind have.
    """
    for rows, width, kind in ((alone, facts.embed_dim, ""), (pairs, facts.fused_dim, " of a pair")):
        for row in rows:
            if width is None:
                raise InputError(
                    f"input.{row}: an image and a text together are read by a model with a fusion (FLAVA), and this one has none:"
                    " give them as two inputs, or serve a FLAVA model and name it as `model`"
                )
            if dimensions is not None and dimensions > width:
                raise InputError(f"dimensions: this model has {width}{kind}, {dimensions:,} were asked for")


def _attach_classify(app: FastAPI, desk: Desk) -> None:
    classes, config = ClassVectors(desk.upstream), desk.config
    fields = {"image": FILE, "labels": STRINGS, "templates": STRINGS, "label_set": STRING, "model": STRING}

    def wanted(body: ClassifyRequest) -> tuple[Sequence[str], Sequence[str]]:
        """Labels and templates."""
        if body.label_set is not None:
            if body.labels is not None or body.templates is not None:
                raise InputError("label_set: brings its own labels and templates; leave those out")
            if body.label_set not in config.label_sets:
                known = ", ".join(sorted(config.label_sets)) or "none"
                raise InputError(f"label_set: {body.label_set[:100]!r} is not known here; known: {known}", 404)
            return config.label_sets[body.label_set].labels, config.label_sets[body.label_set].templates
        if not body.labels:
            raise InputError("labels: give at least one, or a label_set")
        templates = body.templates or [TEMPLATE_MARK]
        desk.checker.classes(body.labels, templates)
        return body.labels, templates

    @app.post("/v1/classify", responses=RESPONSES, openapi_extra=form_too(fields))
    async def classify(request: Request, response: Response, body: ClassifyRequest) -> ClassifyResponse:
        """Zero-shot: which of the labels an image shows."""
        name, version = desk.choose(request, body.model, response)
        labels, templates = wanted(body)
        image = await desk.checker.image(body.image, "image", request.state.hold)
        result = await desk.upstream.encode(name, version, [image], ["image"])
        found = await classes.of(name, version, labels, templates)
        probabilities = softmax(version.facts.logit_scale * (found @ result.features[0]))
        desk.upstream.measured.top_score(name, version.reference, "classify", float(probabilities.max()))
        best = np.argsort(-probabilities, kind="stable")[: body.top_k]
        return ClassifyResponse(model=name, scores=[Score(label=labels[i], score=float(probabilities[i])) for i in best])


def _attach_match(app: FastAPI, desk: Desk) -> None:
    fields = {"images": FILES, "texts": STRINGS, "model": STRING}

    @app.post("/v1/match", responses=RESPONSES, openapi_extra=form_too(fields))
    async def match(request: Request, response: Response, body: MatchRequest) -> MatchResponse:
        """How well each image fits each text."""
        name, version = desk.choose(request, body.model, response)
        images, texts = body.images, body.texts
        given: list[Input] = [*(ImageInput(image=image) for image in images), *(TextInput(text=text) for text in texts)]
        names = [*(f"images.{i}" for i in range(len(images))), *(f"texts.{i}" for i in range(len(texts)))]
        inputs = await desk.checker.inputs(given, names, request.state.hold, "images and texts")
        request.state.inputs = len(inputs)
        if version.facts.task in FUSED:
            if (pairs := len(images) * len(texts)) > desk.config.bounds.max_inputs:
                raise InputError(
                    f"images and texts: {pairs:,} pairs, each of which is read by itself; at most {desk.config.bounds.max_inputs:,}", 413
                )
            scores = (await desk.upstream.match(name, version, inputs, names)).scores
            desk.upstream.measured.top_score(name, version.reference, "match", float(scores.max()))
            return MatchResponse(model=name, kind="matching", scores=scores.tolist())
        features = (await desk.upstream.encode(name, version, inputs, names)).features
        cosines = features[: len(images)] @ features[len(images) :].T
        desk.upstream.measured.top_score(name, version.reference, "match", float(cosines.max()))
        facts = version.facts
        if facts.logit_bias is None:
            return MatchResponse(model=name, kind="cosine", scores=cosines.tolist())
        fits = 1 / (1 + np.exp(-(facts.logit_scale * cosines + facts.logit_bias)))
        return MatchResponse(model=name, kind="sigmoid", scores=fits.tolist())


def softmax(logits: Float32[np.ndarray, " c"]) -> Float32[np.ndarray, " c"]:
    weights = np.exp(logits - logits.max())
    probabilities: Float32[np.ndarray, " c"] = weights / weights.sum()
    return probabilities
