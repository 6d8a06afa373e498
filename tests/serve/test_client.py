"""`mm.Client` against the endpoint: vectors as the bundle's, in order; pages; and what passes is tried again."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import mm
from mm_core.bundle import Bundle
from mm_core.ports import free_port
from serve.client import RefusedError, data_uri
from serve.run import Server
from tests.serve.test_endpoints import TEXTS, expected, picture


@pytest.fixture(scope="module")
def ours(server: Server) -> Iterator[Any]:
    with mm.Client(server.url, batch_size=5) as client:
        yield client


def test_many_inputs_go_in_batches_and_come_back_in_order(ours: Any, bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(picture(1, "PNG"))
    inputs = [*(f"text {i}" for i in range(11)), picture(2), tmp_path / "a.png", Image.open(tmp_path / "a.png"), "data:image/png;base64,"]
    vectors = ours.embed(inputs)
    values = [*inputs[:12], picture(1, "PNG"), picture(1, "PNG"), inputs[-1]]
    np.testing.assert_allclose(vectors, np.stack([expected(bundle, value) for value in values]), atol=1e-5)
    assert vectors.dtype == np.float32
    assert ours.embed("x", dimensions=4).shape == (1, 4)


def test_pictures_that_are_much_together_go_in_several_requests(server: Server, bundle: Bundle) -> None:
    inputs = [*(picture(seed) for seed in range(6)), "x" * 100, picture(6, "PNG")]
    with mm.Client(server.url, batch_bytes=7000) as client:
        sent = [call.body["input"] for call in client._embed_calls(inputs, None) if call.body]
        vectors = client.embed(inputs)
    sizes = [sum(len(value) for one in some for value in one.values()) for some in sent]
    assert len(sent) > 2
    assert all(size <= 7000 or len(some) == 1 for size, some in zip(sizes, sent, strict=True))
    assert [one for some in sent for one in some] == [{"text": i} if isinstance(i, str) else {"image": data_uri(i)} for i in inputs]
    np.testing.assert_allclose(vectors, np.stack([expected(bundle, value) for value in inputs]), atol=1e-5)


def test_a_client_tells_its_settings_but_for_the_key() -> None:
    with mm.Client("http://127.0.0.1:1", key="secret", retries=2) as client:
        assert "retries=2" in repr(client)
        assert "secret" not in repr(client)
    with pytest.raises(TypeError, match="retry"):
        mm.Client(retry=2)  # type: ignore[call-arg]


def test_the_other_questions(ours: Any, bundle: Bundle) -> None:
    scores = ours.classify(picture(1), ["red circle", "star"])
    assert sum(score.score for score in scores) == pytest.approx(1, abs=1e-6)
    assert ours.classify(picture(1), label_set="shapes", top_k=1)[0].label in ("red circle", "blue square", "star")
    matrix = ours.match([picture(1), picture(2)], TEXTS)
    np.testing.assert_allclose(matrix[1, 2], expected(bundle, picture(2)) @ expected(bundle, TEXTS[2]), atol=1e-5)
    everything = [found.item for found in ours.search_all("a star", limit=25)]
    assert len(everything) == len(set(everything)) == 60
    assert ours.search(image=picture(1), target="texts", limit=2).results[0].caption
    assert ours.thumbnail(ours.search("a star", limit=1).results[0], side=20).size == (20, 20)
    assert ours.models()[0].id == "tiny"
    assert ours.ready().status == "ready"


def test_the_async_client_answers_the_same(server: Server, ours: Any) -> None:
    async def ask() -> tuple[np.ndarray, list[int], str]:
        async with mm.AsyncClient(server.url, batch_size=2) as client:
            vectors, scores = await asyncio.gather(client.embed(TEXTS), client.classify(picture(1), ["a", "b"]))
            assert len(scores) == 2
            items = [found.item async for found in client.search_all("a star", limit=40)]
            return vectors, items, (await client.models())[0].id

    vectors, items, name = asyncio.run(ask())
    np.testing.assert_allclose(vectors, ours.embed(TEXTS), atol=1e-6)
    assert (len(items), name) == (60, "tiny")


def test_what_is_refused_is_told_with_its_reason(ours: Any) -> None:
    with pytest.raises(RefusedError, match=r"input\.0.*not_an_image") as refused:
        ours.embed(b"no picture")
    assert refused.value.status == 422
    with pytest.raises(RefusedError, match=r"input\.0: .*two inputs"):
        ours.embed_pairs([(picture(1), "x")])
    with pytest.raises(ValueError, match="nothing to embed"):
        ours.embed([])


def test_nobody_there_is_told() -> None:
    with mm.Client(f"http://127.0.0.1:{free_port()}", retries=1) as client, pytest.raises(RefusedError, match="is `mm serve` running"):
        client.models()


@contextmanager
def failing(*statuses: int, kind: str = "application/problem+json") -> Iterator[tuple[str, list[float]]]:
    """A server that answers with these statuses, then well; and when it was asked."""
    left, asked = list(statuses), list[float]()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(time.monotonic())
            status = left.pop(0) if left else 200
            body = b'{"object":"list","data":[]}' if status == 200 else b'{"detail": "later"}'
            self.send_response(status)
            if status == 429:
                self.send_header("retry-after", "1")
            self.send_header("content-type", "application/json" if status == 200 else kind)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()


def test_an_overload_is_waited_for_as_long_as_was_asked() -> None:
    with failing(503, 429) as (url, asked), mm.Client(url) as client:
        assert client.models() == []
    assert len(asked) == 3
    assert asked[2] - asked[1] >= 1


def test_a_lost_gateway_is_asked_again() -> None:
    """Ray Serve's proxy then says so in plain text."""
    with failing(500, kind="text/plain") as (url, asked), mm.Client(url) as client:
        assert client.models() == []
    assert len(asked) == 2


def test_what_does_not_pass_is_not_tried_again() -> None:
    with failing(500, 500) as (url, asked), mm.Client(url) as client, pytest.raises(RefusedError, match="500: later"):
        client.models()
    assert len(asked) == 1


def test_after_the_last_try_it_is_told() -> None:
    async def ask(url: str) -> None:
        async with mm.AsyncClient(url, retries=2) as client:
            await client.models()

    with failing(*[503] * 9) as (url, asked), pytest.raises(RefusedError, match="503"):
        asyncio.run(ask(url))
    assert len(asked) == 3


def test_a_picture_is_named_by_its_bytes() -> None:
    assert data_uri(b"xyz") == "data:image/*;base64,eHl6"
