"""Whatever a caller sends, the answer is a problem document (RFC 9457) that names the field and the bound; never a 5xx."""

from __future__ import annotations

import base64
import io
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from serve.app import create_app
from serve.config import ServeConfig
from serve.measured import Measured
from serve.upstream import Upstream


def picture(kind: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (40, 40), "red").save(buffer, kind)
    return buffer.getvalue()


def bomb(side: int) -> bytes:
    """A PNG of a few bytes whose header promises side × side pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")


def uri(data: bytes) -> str:
    return f"data:image/jpeg;base64,{base64.b64encode(data).decode()}"


def refused(response: httpx.Response, status: int, *words: str) -> None:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    body = response.json()
    assert body["status"] == status
    assert body["title"]
    assert body["type"] == "about:blank"
    for word in words:
        assert word in body["detail"]


EMBEDDINGS: dict[str, tuple[Any, int, tuple[str, ...]]] = {
    "no input": ({"model": "tiny"}, 422, ("input",)),
    "an empty list": ({"input": []}, 422, ("input", "empty")),
    "an empty text": ({"input": ["fine", ""]}, 422, ("input.1", "empty")),
    "blanks": ({"input": " \n"}, 422, ("input.0", "empty")),
    "an unknown field": ({"input": "x", "temperature": 1}, 422, ("temperature",)),
    "token ids": ({"input": [1, 2, 3]}, 422, ("input",)),
    "a number": ({"input": 3.5}, 422, ("input",)),
    "an unknown encoding": ({"input": "x", "encoding_format": "int8"}, 422, ("encoding_format", "float", "base64")),
    "too many dimensions": ({"input": "x", "dimensions": 17}, 422, ("dimensions", "16")),
    "no dimensions": ({"input": "x", "dimensions": 0}, 422, ("dimensions",)),
    "another model": ({"input": "x", "model": "tinny"}, 404, ("tinny", "tiny")),
    "a URL": ({"input": {"image": "https://example.org/x.png"}}, 422, ("input.0", "data URI")),
    "an object of neither": ({"input": {"video": "x"}}, 422, ("input",)),
    "too many inputs": ({"input": ["x"] * 13}, 413, ("input", "13", "12")),
    "a long text": ({"input": "x" * 201}, 413, ("input.0", "201", "200")),
    "wrong base64": ({"input": ["x", "data:image/png;base64,%%%%"]}, 422, ("input.1", "base64")),
    "a URI that is not base64": ({"input": "data:image/png,abc"}, 422, ("input.0", "base64")),
    "a URI without a body": ({"input": "data:image/png;base64,"}, 422, ("input.0", "empty_image")),
    "not a picture": ({"input": uri(b"GIF89a, or so it says")}, 422, ("input.0", "not_an_image")),
    "half a picture": ({"input": uri(picture("PNG")[:-30])}, 422, ("input.0", "undecodable")),
    "a pixel bomb": ({"input": uri(bomb(8_000))}, 422, ("input.0", "too_many_pixels", "1,000,000")),
    "a pixel bomb that Pillow will not open": ({"input": uri(bomb(32_000))}, 422, ("input.0",)),
    "too many bytes": ({"input": uri(b"\xff\xd8" + bytes(60_000))}, 413, ("input.0", "50,000")),
    "a list for a body": ([1, 2], 422, ("body",)),
    "null": (None, 422, ("body",)),
}


@pytest.mark.parametrize("case", EMBEDDINGS)
def test_embeddings_refuses(client: httpx.Client, case: str) -> None:
    body, status, words = EMBEDDINGS[case]
    refused(client.post("/v1/embeddings", json=body), status, *words)


def test_a_jpeg_cut_in_its_header_is_refused(client: httpx.Client) -> None:
    refused(client.post("/v1/embeddings", json={"input": uri(picture()[:30])}), 422, "input.0")


CLASSIFY: dict[str, tuple[dict[str, Any], int, tuple[str, ...]]] = {
    "nothing to choose from": ({"image": uri(picture())}, 422, ("labels",)),
    "an unknown set": ({"image": uri(picture()), "label_set": "nope"}, 404, ("nope", "shapes")),
    "a set and labels": ({"image": uri(picture()), "label_set": "shapes", "labels": ["x"]}, 422, ("label_set",)),
    "no labels": ({"image": uri(picture()), "labels": []}, 422, ("labels",)),
    "an empty label": ({"image": uri(picture()), "labels": ["x", " "], "templates": ["a {c}"]}, 422, ("labels.1", "empty")),
    "a text for an image": ({"image": "a red circle", "labels": ["x"]}, 422, ("image",)),
    "a bad image": ({"image": uri(b"nothing"), "labels": ["x"]}, 422, ("image", "not_an_image")),
    "a label that is an image": ({"image": uri(picture()), "labels": [uri(picture())]}, 422, ("labels.0", "text")),
    "a template without a place": ({"image": uri(picture()), "labels": ["x"], "templates": ["a {}"]}, 422, ("templates.0", "{c}")),
    "too many prompts": ({"image": uri(picture()), "labels": ["x"] * 5, "templates": ["{c}!"] * 3}, 413, ("15", "12")),
    "a long prompt": ({"image": uri(picture()), "labels": ["ok", "x" * 150], "templates": ["{c} {c}"]}, 413, ("labels.1", "200")),
}


@pytest.mark.parametrize("case", CLASSIFY)
def test_classify_refuses(client: httpx.Client, case: str) -> None:
    body, status, words = CLASSIFY[case]
    refused(client.post("/v1/classify", json=body), status, *words)


MATCH: dict[str, tuple[dict[str, Any], int, tuple[str, ...]]] = {
    "no images": ({"images": [], "texts": ["x"]}, 422, ("images",)),
    "no texts": ({"images": [uri(picture())]}, 422, ("texts",)),
    "a bad image": ({"images": [uri(picture()), uri(b"no")], "texts": ["x"]}, 422, ("images.1", "not_an_image")),
    "too many": ({"images": [uri(picture())] * 6, "texts": ["x"] * 7}, 413, ("13", "12")),
}


@pytest.mark.parametrize("case", MATCH)
def test_match_refuses(client: httpx.Client, case: str) -> None:
    body, status, words = MATCH[case]
    refused(client.post("/v1/match", json=body), status, *words)


def test_a_body_of_another_kind_is_refused(client: httpx.Client) -> None:
    refused(client.post("/v1/embeddings", content=b"<x/>", headers={"content-type": "text/xml"}), 415, "text/xml", "json")
    broken = b"--x\r\nContent-Disposition: form-data\r\n"
    refused(client.post("/v1/embeddings", content=broken, headers={"content-type": "multipart/form-data"}), 400)
    refused(client.post("/v1/embeddings", content=broken, headers={"content-type": "multipart/form-data; boundary=x"}), 422)


def test_a_page_of_another_name_that_leads_here_may_not_ask(client: httpx.Client) -> None:
    refused(client.get("/v1/models", headers={"host": "evil.example"}), 421, "evil.example")
    assert client.get("/healthz", headers={"host": "evil.example"}).status_code == 200


RAW: dict[str, tuple[bytes, int, str]] = {
    "no JSON": (b"input=x", 400, "JSON"),
    "an unfinished body": (b'{"input": "x', 400, "JSON"),
    "nothing": (b"", 422, "body"),
    "no UTF-8": (b'{"input": "\xff\xfe"}', 400, ""),
    "a lone surrogate": (rb'{"input": "\ud800"}', 422, "input"),
    "a lone surrogate as a key": (rb'{"input": "x", "\ud800": 1}', 422, ""),
    "not a number": (b'{"input": "x", "dimensions": NaN}', 422, "dimensions"),
    "deep nesting": (b'{"input": ' + b"[" * 50_000 + b"]" * 50_000 + b"}", 400, ""),
}


@pytest.mark.parametrize("case", RAW)
def test_a_body_that_is_no_request_is_refused(client: httpx.Client, case: str) -> None:
    content, status, word = RAW[case]
    refused(client.post("/v1/embeddings", content=content, headers={"content-type": "application/json"}), status, word)


def test_a_body_above_the_bound_is_refused_by_its_length(client: httpx.Client, serve_config: ServeConfig) -> None:
    body = b" " * (serve_config.bounds.max_request_bytes + 1)
    refused(client.post("/v1/embeddings", content=body), 413, f"{serve_config.bounds.max_request_bytes:,}")


def test_a_body_above_the_bound_is_refused_without_a_length(client: httpx.Client, serve_config: ServeConfig) -> None:
    chunks = (b" " * 100_000 for _ in range(serve_config.bounds.max_request_bytes // 100_000 + 1))
    refused(client.post("/v1/embeddings", content=chunks), 413, f"{serve_config.bounds.max_request_bytes:,}")


def test_another_path_or_method_is_a_problem_document(client: httpx.Client) -> None:
    refused(client.get("/v1/nothing"), 404)
    refused(client.get("/v1/embeddings"), 405)


ROUTES = {
    "GET /",
    "GET /healthz",
    "GET /metrics",
    "GET /openapi.json",
    "GET /page.css",
    "GET /page.js",
    "GET /readyz",
    "GET /v1/models",
    "GET /v1/models/{name:path}",
    "GET /v1/search",
    "GET /v1/search/items/{item}/thumbnail",
    "GET /v1/search/map",
    "POST /v1/classify",
    "POST /v1/embeddings",
    "POST /v1/match",
    "POST /v1/search",
}


def test_an_endpoint_has_these_routes_and_no_others() -> None:
    """Each takes texts, pictures and numbers: a new one has to be looked at for what else a caller could make it do."""

    async def nothing(*_: Any) -> Any:
        raise AssertionError("no request is sent")

    config = ServeConfig()
    upstream = Upstream(config.bounds.max_waiting_inputs, Measured(), nothing)
    app = create_app(config, ["contrastive"], upstream, searcher=object())  # type: ignore[arg-type]
    found = {f"{method} {route.path}" for route in app.routes for method in getattr(route, "methods", ())}  # type: ignore[attr-defined]
    assert {route for route in found if not route.startswith("HEAD ")} == ROUTES


def test_ray_serve_answers_two_routes_before_the_endpoint_does(client: httpx.Client) -> None:
    """And says no more in them than the application's name."""
    assert client.get("/-/healthz").text == "success"
    assert client.get("/-/routes").json() == {"/": "mm"}


def test_a_path_that_a_caller_names_is_not_read(client: httpx.Client, tmp_path: Path) -> None:
    """A picture of this machine, that the endpoint's processes could read."""
    file = tmp_path / "picture.jpg"
    file.write_bytes(picture())
    (expected,) = client.post("/v1/embeddings", json={"input": uri(picture())}).json()["data"]
    for named in (str(file), f"file://{file}", f"../../..{file}"):
        answer = client.post("/v1/embeddings", json={"input": named})
        assert answer.status_code < 500
        if answer.status_code == 200:  # a text like any other
            assert answer.json()["data"][0]["embedding"] != expected["embedding"]
        assert client.get(f"/v1/models/{named}").status_code == 404
        assert client.post("/v1/embeddings", json={"model": named, "input": "x"}).status_code in (404, 422)


def test_above_its_bound_the_endpoint_answers_429_and_goes_on(client: httpx.Client, serve_config: ServeConfig) -> None:
    """Twelve times more callers than it takes, each asking for as much as one call may."""
    body = {"input": [f"text {i}" for i in range(serve_config.bounds.max_inputs)]}
    callers = 12 * serve_config.bounds.max_requests
    with ThreadPoolExecutor(callers) as threads:
        answers = list(threads.map(lambda _: client.post("/v1/embeddings", json=body), range(callers)))
    assert {answer.status_code for answer in answers} == {200, 429}
    for answer in answers:
        if answer.status_code == 429:
            refused(answer, 429, "requests")
            assert int(answer.headers["retry-after"]) >= 1
    assert client.post("/v1/embeddings", json=body).status_code == 200
