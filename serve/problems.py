"""Errors as RFC 9457 problem documents: what was wrong, and the bound it broke. Bad input never becomes a 5xx."""

from __future__ import annotations

import logging
from http import HTTPStatus

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from ray.serve.exceptions import BackPressureError
from starlette.exceptions import HTTPException

from serve.schema import Problem

logger = logging.getLogger(__name__)
RETRY_AFTER_S = 1
RESPONSES = {status: {"model": Problem} for status in (400, 413, 422, 429)}
"""For the OpenAPI document."""


class BadInput(Exception):
    """The caller can mend this."""

    def __init__(self, detail: str, status: int = 400) -> None:
        super().__init__(detail)
        self.detail, self.status = detail, status


def problem(status: int, detail: str, headers: dict[str, str] | None = None) -> JSONResponse:
    body = Problem(title=HTTPStatus(status).phrase, status=status, detail=detail)
    return JSONResponse(body.model_dump(), status_code=status, media_type="application/problem+json", headers=headers)


def install(app: FastAPI) -> None:
    """Make every error of `app` a problem document."""

    @app.exception_handler(BadInput)
    async def bad_input(_: Request, error: BadInput) -> Response:
        return problem(error.status, error.detail)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if part != "body")
        return problem(422, f"{where or 'body'}: {first['msg']}")

    @app.exception_handler(HTTPException)
    async def http(_: Request, error: HTTPException) -> Response:
        return problem(error.status_code, str(error.detail), dict(error.headers or {}))

    @app.exception_handler(BackPressureError)
    async def overload(_: Request, error: BackPressureError) -> Response:
        return problem(429, "too many requests are waiting; try again shortly", {"Retry-After": str(RETRY_AFTER_S)})

    @app.exception_handler(Exception)
    async def internal(_: Request, error: Exception) -> Response:
        logger.exception("a request failed")
        return problem(500, "the request failed inside the server; it is logged there")
