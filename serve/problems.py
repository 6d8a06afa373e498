"""Errors as RFC 9457 problem documents: what was wrong, and the bound it broke. Bad input never becomes a 5xx."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from ray.exceptions import ObjectLostError, RayActorError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RayServeException
from starlette.exceptions import HTTPException

from serve.schema import OpenAIError, Problem

logger = logging.getLogger("ray.serve")
RETRY_AFTER_S = 1
MEDIA_TYPE = "application/problem+json"
_MAX_DETAIL_CHARACTERS = 500
_MAX_SHOWN = 3

RESPONSES: dict[int | str, dict[str, Any]] = {
    status: {"description": description, "content": {MEDIA_TYPE: {"schema": Problem.model_json_schema()}}}
    for status, description in {
        400: "The body is no JSON, or no form.",
        401: "No API key, or one that is not known.",
        404: "No such model, label set or item.",
        413: "Too many inputs, or one that is too large.",
        415: "The body is neither JSON nor a form.",
        421: "The endpoint was called by a name that is not this machine's.",
        422: "A field is missing, unknown or wrong, or a picture cannot be read.",
        429: "Too many requests at a time; `Retry-After` says when to try again.",
        503: "No copy of the model answers now; `Retry-After` says when to try again.",
        504: "Not answered in time.",
    }.items()
}
"""For the OpenAPI document."""

LOST = (RayActorError, ObjectLostError, DeploymentUnavailableError)
"""What a copy of a model that dies, or has gone, leaves its callers with; its node takes along what it had made for another copy."""


class InputError(Exception):
    """The caller can mend this."""

    def __init__(self, detail: str, status: int = 422) -> None:
        super().__init__(detail)
        self.detail, self.status = detail, status


class OverloadedError(Exception):
    """Time mends this: 429."""


class UnavailableError(Exception):
    """Nobody answers now: 503."""


def problem(status: int, detail: str, headers: dict[str, str] | None = None) -> JSONResponse:
    """`detail` may repeat what the caller sent: it is cut, and what UTF-8 cannot say is replaced."""
    if len(detail) > _MAX_DETAIL_CHARACTERS:
        detail = f"{detail[:_MAX_DETAIL_CHARACTERS]}…"
    sayable = detail.encode("utf-8", "replace").decode("utf-8")
    body = Problem(title=HTTPStatus(status).phrase, status=status, detail=sayable, error=OpenAIError(message=sayable))
    return JSONResponse(body.model_dump(), status_code=status, media_type=MEDIA_TYPE, headers=headers)


def full(what: str) -> HTTPException:
    """429, from where a body is read: what else is raised there FastAPI takes for a body that is wrong."""
    return HTTPException(429, f"{what}, no more are taken now; try again shortly", {"Retry-After": str(RETRY_AFTER_S)})


def overloaded(what: str) -> JSONResponse:
    error = full(what)
    return problem(error.status_code, error.detail, dict(error.headers or {}))


def install(app: FastAPI) -> None:
    """Make every error of `app` a problem document."""

    @app.exception_handler(InputError)
    async def bad_input(_: Request, error: InputError) -> Response:
        return problem(error.status, error.detail)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        errors = error.errors()
        if errors[0]["type"] == "json_invalid":
            return problem(400, f"the body is not JSON: {errors[0]['ctx']['error']} at character {errors[0]['loc'][-1]}")
        return problem(422, _explained(errors))

    @app.exception_handler(HTTPException)
    async def http(_: Request, error: HTTPException) -> Response:
        return problem(error.status_code, str(error.detail), dict(error.headers or {}))

    @app.exception_handler(OverloadedError)
    @app.exception_handler(BackPressureError)
    async def full(_: Request, error: Exception) -> Response:
        return overloaded(str(error) if isinstance(error, OverloadedError) else "the model's queue is full")

    @app.exception_handler(UnavailableError)
    async def unavailable(_: Request, error: UnavailableError) -> Response:
        return problem(503, str(error), {"Retry-After": str(RETRY_AFTER_S)})

    @app.exception_handler(RayActorError)
    @app.exception_handler(ObjectLostError)
    @app.exception_handler(DeploymentUnavailableError)
    async def lost(_: Request, error: Exception) -> Response:
        logger.warning("no copy of the model answered", exc_info=error)
        detail = "the copy of the model that took this request was lost; another is started, try again shortly"
        return problem(503, detail, {"Retry-After": str(RETRY_AFTER_S)})

    @app.exception_handler(Exception)
    async def internal(request: Request, error: Exception) -> Response:
        if is_lost(error):
            return await lost(request, error)
        logger.error("a request failed", exc_info=error)
        return problem(500, "the request failed inside the server; it is logged there")


def is_lost(error: BaseException) -> bool:
    """Whether a copy of a model died or has gone, also where it was one that another copy waited for."""
    waited_for = error.cause if isinstance(error, RayTaskError) else error.__cause__ if isinstance(error, RayServeException) else None
    return isinstance(error, LOST) or isinstance(waited_for, LOST)


def _explained(errors: Sequence[Any]) -> str:
    """Each field with what is wrong; a field of several types has an error for each."""
    lines = []
    for error in errors[:_MAX_SHOWN]:
        where = ".".join(str(part) for part in error["loc"] if part != "body")
        lines.append(f"{where or 'body'}: {error['msg']}")
    return "; ".join(lines)
