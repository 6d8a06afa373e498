"""`/v1/search`: the query becomes a vector of the model that the index was made with, which the searcher looks up."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from fastapi import FastAPI, Query, Request, Response
from ray.serve.handle import DeploymentHandle

from serve.facts import Version
from serve.form import FILE, STRING, form_too
from serve.hits import Hits, Refused, Vector
from serve.inputs import Picture
from serve.problems import RESPONSES, InputError, UnavailableError
from serve.schema import Found, SearchRequest, SearchResponse

if TYPE_CHECKING:
    from serve.app import Desk

_FOREVER = "private, max-age=86400, immutable"
_MODEL = "search"
Asked = Callable[..., Awaitable[Any]]
"""A method of the searcher, by name, with what it takes."""


def attach_search(app: FastAPI, desk: Desk, searcher: DeploymentHandle) -> None:
    bounds = desk.config.bounds

    async def asked(method: str, *about: Any) -> Any:
        return await desk.upstream.again_if_lost(_MODEL, lambda: getattr(searcher, method).remote(*about))

    def version() -> Version:
        found = desk.upstream.traffic.searched
        if found is None:
            raise UnavailableError("the model that the search index was made with is not up; /readyz says why")
        return found

    @app.post("/v1/search", responses=RESPONSES, openapi_extra=form_too({"text": STRING, "image": FILE}))
    async def search(request: Request, response: Response, body: SearchRequest) -> SearchResponse:
        """What is nearest to a text, a picture, both together, or an item of the index."""
        started = time.perf_counter()
        if body.offset + body.limit > bounds.max_results:
            raise InputError(f"offset and limit reach {body.offset + body.limit:,} results, at most {bounds.max_results:,}")
        chosen = version()
        request.state.version = response.headers["x-mm-version"] = chosen.reference
        query = await _vector_of(request, body, chosen, desk, asked)
        hits: Hits = _answered(await asked("search", query, body.target, body.filters, body.offset, body.limit), 422)
        if hits.rows:
            desk.upstream.measured.top_score(_MODEL, chosen.reference, "search", hits.rows[0].score)
        results = [
            Found(
                item=row.item,
                uid=row.uid,
                score=row.score,
                caption=row.caption,
                metadata=row.metadata,
                thumbnail=f"v1/search/items/{row.item}/thumbnail" if row.has_picture else None,
            )
            for row in hits.rows
        ]
        following = body.offset + len(results) if hits.more and body.offset + body.limit < bounds.max_results else None
        took_ms = round((time.perf_counter() - started) * 1e3, 2)
        return SearchResponse(model=chosen.reference, results=results, offset=body.offset, next_offset=following, took_ms=took_ms)

    @app.get("/v1/search", responses=RESPONSES)
    async def about() -> dict[str, Any]:
        """What is searched: how much, by which model, with which recall, and the fields that filters can name."""
        found: dict[str, Any] = await asked("about")
        return found

    @app.get("/v1/search/map", responses=RESPONSES)
    async def embedding_map() -> dict[str, Any]:
        """Some of the pictures on a plane, near to what they are like: `x` and `y` from 0 to 1."""
        found: dict[str, Any] = await asked("map")
        return found

    picture: dict[int | str, dict[str, Any]] = {200: {"content": {"image/jpeg": {}}, "description": "A JPEG."}}

    @app.get("/v1/search/items/{item}/thumbnail", response_class=Response, responses=RESPONSES | picture)
    async def thumbnail(item: int, side: int = Query(default=256, ge=16, le=1024, description="Of the longer side, pixels.")) -> Response:
        """A picture of the index, read from the shard it lies in."""
        data: bytes = _answered(await asked("thumbnail", item, side), 404)
        return Response(data, media_type="image/jpeg", headers={"Cache-Control": _FOREVER})


async def _vector_of(request: Request, body: SearchRequest, chosen: Version, desk: Desk, asked: Asked) -> Vector:
    """The query: of text, picture or both their weighted mean."""
    given = [name for name in ("text", "image", "item") if getattr(body, name) is not None]
    if not given:
        raise InputError("give a text, an image, both, or an item of the index")
    if "item" in given and len(given) > 1:
        raise InputError("item: comes alone, without text and image")
    if body.item is not None:
        return _answered(await asked("vector", body.item), 404)
    inputs: list[str | Picture] = []
    if body.text is not None:
        inputs.append(desk.checker.text(body.text, "text"))
    if body.image is not None:
        inputs.append(await desk.checker.image(body.image, "image", request.state.hold))
    request.state.inputs = len(inputs)
    features = (await desk.upstream.encode(_MODEL, chosen, inputs, [name for name in given if name != "item"])).features
    return composed(features, body.text_weight)


def composed(features: Vector, text_weight: float) -> Vector:
    """One vector of length 1: of a text and a picture their weighted mean."""
    mean = features[0] if len(features) == 1 else text_weight * features[0] + (1 - text_weight) * features[1]
    vector: Vector = (mean / max(float(np.linalg.norm(mean)), 1e-12)).astype(np.float32)
    return vector


def _answered(answer: Any, status: int) -> Any:
    """What the searcher gave, or why it gave nothing."""
    if isinstance(answer, Refused):
        raise InputError(answer.reason, status)
    return answer
