"""Multipart forms as another spelling of the same JSON: a part is a field, a file becomes a data URI, a field that comes again a list."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from starlette.datastructures import UploadFile

from serve.problems import InputError

_FORM = "multipart/form-data"
STRING: dict[str, Any] = {"type": "string"}
STRINGS: dict[str, Any] = {"type": "array", "items": STRING}
FILE: dict[str, Any] = {"type": "string", "format": "binary"}
FILES: dict[str, Any] = {"type": "array", "items": FILE}
_LISTS = {"input", "labels", "templates", "images", "texts"}
"""Fields that are lists also where one alone comes."""
_JSON = {"filters"}
"""Fields that are written as JSON."""
_MAX_PARTS = 1000


class FormRoute(APIRoute):
    """A route that takes forms too."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def either(request: Request) -> Response:
            kind = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
            if kind == _FORM:
                await _as_json(request)
            elif request.method == "POST" and kind != "application/json" and not kind.endswith("+json"):
                raise InputError(f"content-type {kind[:100]!r}: send application/json or {_FORM}", 415)
            return await handle(request)

        return either


async def _as_json(request: Request) -> None:
    values: dict[str, list[Any]] = {}
    async with request.form(max_files=_MAX_PARTS, max_fields=_MAX_PARTS) as form:
        for name, value in form.multi_items():
            values.setdefault(name, []).append(await _data_uri(value) if isinstance(value, UploadFile) else _value(name, value))
    body = {name: found if name in _LISTS or len(found) > 1 else found[0] for name, found in values.items()}
    request._body = json.dumps(body).encode()  # where Starlette keeps a body that was read
    request._json = body
    headers = [(name, value) for name, value in request.scope["headers"] if name != b"content-type"]
    request.scope["headers"] = [*headers, (b"content-type", b"application/json")]
    del request._headers


async def _data_uri(file: UploadFile) -> str:
    """What kind of picture it is its bytes say."""
    return f"data:image/*;base64,{base64.b64encode(await file.read()).decode()}"


def _value(name: str, text: str) -> Any:
    if name not in _JSON:
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{name}: not JSON: {error}") from None


def form_too(fields: dict[str, Any]) -> dict[str, Any]:
    """For the OpenAPI document: what a form may hold."""
    return {"requestBody": {"content": {_FORM: {"schema": {"type": "object", "properties": fields}}}}}
