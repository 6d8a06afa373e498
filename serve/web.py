"""The page: three files, which ask nobody but the endpoint they come from."""

from __future__ import annotations

from importlib.resources import files

from fastapi import FastAPI, Response

_TYPES = {"index.html": "text/html; charset=utf-8", "page.css": "text/css; charset=utf-8", "page.js": "text/javascript; charset=utf-8"}


def attach_page(app: FastAPI) -> None:
    folder = files("serve") / "page"
    for name, kind in _TYPES.items():
        _attach(app, "/" if name == "index.html" else f"/{name}", (folder / name).read_bytes(), kind)


def _attach(app: FastAPI, path: str, content: bytes, kind: str) -> None:
    @app.get(path, include_in_schema=False)
    async def file() -> Response:
        return Response(content, media_type=kind, headers={"Cache-Control": "no-cache"})
