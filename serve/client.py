"""Asking an endpoint from Python: `mm.Client`, and `mm.AsyncClient` for programs with an event loop.

Many inputs are sent in batches, several at a time, and pictures are read when their turn comes. What passes (an overload, a copy that was
lost, a connection that broke) is tried again, as long as the server asked to wait or a growing random time; what does not is a
`RefusedError`.
"""

from __future__ import annotations

import asyncio
import base64
import io
import random
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar

import httpx
import numpy as np
from jaxtyping import Float32

from mm_core.errors import ServiceError
from serve.schema import ClassifyResponse, Found, MatchResponse, ModelCard, ModelList, Readiness, Score, SearchResponse

if TYPE_CHECKING:
    from PIL.Image import Image as PillowImage

    Image = bytes | Path | PillowImage
    One = str | Image | tuple[Image, str]
    """Input: a text, a picture or both."""

_PASSING = (429, 502, 503, 504)
_GATEWAY_LOST = 500
"""In plain text: what Ray Serve's proxy says of requests that a gateway took with it. As a problem document it is a mistake of ours."""
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.1, 10.0
T = TypeVar("T")


class RefusedError(ServiceError):
    """The endpoint does not answer this, now or at all."""

    def __init__(self, status: int, detail: str) -> None:
        super().__init__(f"{status}: {detail}")
        self.status, self.detail = status, detail


@dataclass(frozen=True)
class _Call(Generic[T]):
    """One request, and what its answer means."""

    path: str
    body: dict[str, Any] | None
    """None for a GET."""
    read: Callable[[httpx.Response], T]


@dataclass(eq=False)
class _Asking:
    """How an endpoint is asked, with event loop or without."""

    url: str = "http://127.0.0.1:8000"
    key: str | None = field(default=None, repr=False)
    """An API key."""
    model: str | None = None
    """By default the first that is served."""
    retries: int = 6
    """After the first try, of what passes."""
    timeout_s: float = 60
    """Of one try."""
    batch_size: int = 32
    """Inputs of one request, at most."""
    batch_bytes: int = 24 << 20
    """Of one request, at most, unless one input alone has more."""
    concurrency: int = 4
    """Requests at a time, of one call with many inputs."""

    def _httpx_options(self) -> dict[str, Any]:
        headers = {"authorization": f"Bearer {self.key}"} if self.key else {}
        return {"base_url": self.url.rstrip("/") + "/", "headers": headers, "timeout": self.timeout_s, "follow_redirects": False}

    def _pause_s(self, attempt: int, answer: httpx.Response | httpx.TransportError) -> float:
        """Before the next try, after one that was no success.

        Raises:
            RefusedError: this was the last, or would not pass.
        """
        if isinstance(answer, httpx.Response):
            failed, asked_s, passes = _refused(answer), _asked_to_wait(answer), _passes(answer)
        else:
            failed, asked_s, passes = _unreached(self.url, answer), None, True
        if attempt == self.retries or not passes:
            raise failed
        return _wait_s(attempt, asked_s)

    def _batches(self, inputs: Sequence[One]) -> Iterator[Sequence[One]]:
        return (inputs[i : i + self.batch_size] for i in range(0, len(inputs), self.batch_size))

    def _embed_calls(self, inputs: Sequence[One], dimensions: int | None) -> Iterator[_Call[Float32[np.ndarray, "n d"]]]:
        """Of one batch: usually one."""
        more = {"model": self.model, "encoding_format": "base64", "dimensions": dimensions}
        given, size = list[dict[str, str]](), 0
        for one in inputs:
            spelled = _spelled(one)
            length = sum(map(len, spelled.values()))
            if given and size + length > self.batch_bytes:
                yield _Call("v1/embeddings", {"input": given} | more, _vectors)
                given, size = [], 0
            given.append(spelled)
            size += length
        yield _Call("v1/embeddings", {"input": given} | more, _vectors)

    def _classify_call(
        self, image: Image, labels: Sequence[str] | None, templates: Sequence[str] | None, label_set: str | None, top_k: int | None
    ) -> _Call[list[Score]]:
        body = {"image": data_uri(image), "labels": _list(labels), "templates": _list(templates), "label_set": label_set, "top_k": top_k}
        return _Call("v1/classify", body | {"model": self.model}, lambda r: ClassifyResponse.model_validate_json(r.content).scores)

    def _match_call(self, images: Sequence[Image], texts: Sequence[str]) -> _Call[Float32[np.ndarray, "n m"]]:
        body = {"images": [data_uri(image) for image in images], "texts": list(texts), "model": self.model}
        return _Call("v1/match", body, lambda r: np.array(MatchResponse.model_validate_json(r.content).scores, dtype=np.float32))

    def _thumbnail_call(self, found: Found, side: int) -> _Call[PillowImage]:
        if found.thumbnail is None:
            raise ValueError(f"item {found.item} has no picture")
        return _Call(f"{found.thumbnail}?side={side}", None, _picture)

    def _search_call(self, image: Image | None, query: dict[str, Any]) -> _Call[SearchResponse]:
        body = query | ({"image": data_uri(image)} if image is not None else {})
        return _Call("v1/search", body, lambda r: SearchResponse.model_validate_json(r.content))


@dataclass(eq=False)
class Client(_Asking):
    """
    >>> with Client("http://127.0.0.1:8000") as client:
    ...     vectors = client.embed(["a red circle", Path("photo.jpg")])
    """

    def __post_init__(self) -> None:
        self._http = httpx.Client(**self._httpx_options())

    def __enter__(self) -> Client:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def embed(self, inputs: str | Image | Sequence[str | Image], *, dimensions: int | None = None) -> Float32[np.ndarray, "n d"]:
        """Vectors of texts and pictures, L2-normalised, in their order; of one alone too [1, d].

        Raises:
            RefusedError: an input is refused, or the endpoint is not there.
        """
        return self._embedded(_several(inputs), dimensions)

    def embed_pairs(self, pairs: Sequence[tuple[Image, str]], *, dimensions: int | None = None) -> Float32[np.ndarray, "n e"]:
        """Vectors of pictures, each read with its text by a model with a fusion (FLAVA): L2-normalised, of another width than `embed`'s and
        not in their space.

        Raises:
            RefusedError: the model has no fusion, an input is refused, or the endpoint is not there.
        """
        return self._embedded(_several(pairs), dimensions)

    def _embedded(self, inputs: Sequence[One], dimensions: int | None) -> Float32[np.ndarray, "n d"]:
        def one(batch: Sequence[One]) -> Float32[np.ndarray, "n d"]:
            return np.concatenate([self._send(call) for call in self._embed_calls(batch, dimensions)])

        if len(inputs) <= self.batch_size:
            return one(inputs)
        with ThreadPoolExecutor(self.concurrency) as threads:
            return np.concatenate(list(threads.map(one, self._batches(inputs))))

    def classify(
        self,
        image: Image,
        labels: Sequence[str] | None = None,
        *,
        templates: Sequence[str] | None = None,
        label_set: str | None = None,
        top_k: int | None = None,
    ) -> list[Score]:
        """Which of the labels a picture shows, best first."""
        return self._send(self._classify_call(image, labels, templates, label_set, top_k))

    def match(self, images: Sequence[Image], texts: Sequence[str]) -> Float32[np.ndarray, "n m"]:
        """How well each picture fits each text."""
        return self._send(self._match_call(images, texts))

    def search(
        self,
        text: str | None = None,
        *,
        image: Image | None = None,
        item: int | None = None,
        target: Literal["images", "texts"] = "images",
        filters: Sequence[dict[str, Any]] = (),
        text_weight: float = 0.5,
        limit: int = 20,
        offset: int = 0,
    ) -> SearchResponse:
        """The nearest to a text, a picture, both together, or an item of the index: one page."""
        query = _query(text, item, target, filters, text_weight) | {"limit": limit, "offset": offset}
        return self._send(self._search_call(image, query))

    def search_all(self, text: str | None = None, *, limit: int = 100, **query: Any) -> Iterator[Found]:
        """Page after page, as `search`."""
        offset: int | None = 0
        while offset is not None:
            page = self.search(text, limit=limit, offset=offset, **query)
            yield from page.results
            offset = page.next_offset

    def thumbnail(self, found: Found, side: int = 256) -> PillowImage:
        """The picture of a result, its longer side at most `side` pixels."""
        return self._send(self._thumbnail_call(found, side))

    def models(self) -> list[ModelCard]:
        return self._send(_MODELS)

    def ready(self) -> Readiness:
        """Raises RefusedError 503 while it is not."""
        return self._send(_READY)

    def _send(self, call: _Call[T]) -> T:
        attempt = 0
        while True:
            answer: httpx.Response | httpx.TransportError
            try:
                answer = self._http.request("GET" if call.body is None else "POST", call.path, json=_given(call.body))
            except httpx.TransportError as error:
                answer = error
            if isinstance(answer, httpx.Response) and answer.is_success:
                return call.read(answer)
            time.sleep(self._pause_s(attempt, answer))
            attempt += 1


@dataclass(eq=False)
class AsyncClient(_Asking):
    """As `Client`, awaited."""

    def __post_init__(self) -> None:
        self._http = httpx.AsyncClient(**self._httpx_options())

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.close()

    async def close(self) -> None:
        await self._http.aclose()

    async def embed(self, inputs: str | Image | Sequence[str | Image], *, dimensions: int | None = None) -> Float32[np.ndarray, "n d"]:
        """As `Client.embed`."""
        return await self._embedded(_several(inputs), dimensions)

    async def embed_pairs(self, pairs: Sequence[tuple[Image, str]], *, dimensions: int | None = None) -> Float32[np.ndarray, "n e"]:
        """As `Client.embed_pairs`."""
        return await self._embedded(_several(pairs), dimensions)

    async def _embedded(self, inputs: Sequence[One], dimensions: int | None) -> Float32[np.ndarray, "n d"]:
        at_a_time = asyncio.Semaphore(self.concurrency)

        async def one(batch: Sequence[One]) -> Float32[np.ndarray, "n d"]:
            async with at_a_time:
                return np.concatenate([await self._send(call) for call in self._embed_calls(batch, dimensions)])

        return np.concatenate(await asyncio.gather(*map(one, self._batches(inputs))))

    async def classify(
        self,
        image: Image,
        labels: Sequence[str] | None = None,
        *,
        templates: Sequence[str] | None = None,
        label_set: str | None = None,
        top_k: int | None = None,
    ) -> list[Score]:
        """As `Client.classify`."""
        return await self._send(self._classify_call(image, labels, templates, label_set, top_k))

    async def match(self, images: Sequence[Image], texts: Sequence[str]) -> Float32[np.ndarray, "n m"]:
        """As `Client.match`."""
        return await self._send(self._match_call(images, texts))

    async def search(
        self,
        text: str | None = None,
        *,
        image: Image | None = None,
        item: int | None = None,
        target: Literal["images", "texts"] = "images",
        filters: Sequence[dict[str, Any]] = (),
        text_weight: float = 0.5,
        limit: int = 20,
        offset: int = 0,
    ) -> SearchResponse:
        """As `Client.search`."""
        query = _query(text, item, target, filters, text_weight) | {"limit": limit, "offset": offset}
        return await self._send(self._search_call(image, query))

    async def search_all(self, text: str | None = None, *, limit: int = 100, **query: Any) -> AsyncIterator[Found]:
        """As `Client.search_all`."""
        offset: int | None = 0
        while offset is not None:
            page = await self.search(text, limit=limit, offset=offset, **query)
            for found in page.results:
                yield found
            offset = page.next_offset

    async def thumbnail(self, found: Found, side: int = 256) -> PillowImage:
        """As `Client.thumbnail`."""
        return await self._send(self._thumbnail_call(found, side))

    async def models(self) -> list[ModelCard]:
        return await self._send(_MODELS)

    async def ready(self) -> Readiness:
        """As `Client.ready`."""
        return await self._send(_READY)

    async def _send(self, call: _Call[T]) -> T:
        attempt = 0
        while True:
            answer: httpx.Response | httpx.TransportError
            try:
                answer = await self._http.request("GET" if call.body is None else "POST", call.path, json=_given(call.body))
            except httpx.TransportError as error:
                answer = error
            if isinstance(answer, httpx.Response) and answer.is_success:
                return call.read(answer)
            await asyncio.sleep(self._pause_s(attempt, answer))
            attempt += 1


_MODELS: _Call[list[ModelCard]] = _Call("v1/models", None, lambda r: ModelList.model_validate_json(r.content).data)
_READY: _Call[Readiness] = _Call("readyz", None, lambda r: Readiness.model_validate_json(r.content))


def data_uri(image: Image) -> str:
    """What kind of picture it is its bytes say."""
    if isinstance(image, Path):
        image = image.read_bytes()
    if not isinstance(image, bytes):
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        image = buffer.getvalue()
    return f"data:image/*;base64,{base64.b64encode(image).decode()}"


def _spelled(one: One) -> dict[str, str]:
    match one:
        case str():
            return {"text": one}
        case (image, text):
            return {"image": data_uri(image), "text": text}
        case _:
            return {"image": data_uri(one)}


def _several(inputs: str | Image | Sequence[One]) -> Sequence[One]:
    several = list(inputs) if isinstance(inputs, list | tuple) else [inputs]
    if not several:
        raise ValueError("nothing to embed: give at least one text or image")
    return several  # type: ignore[return-value]


def _vectors(answer: httpx.Response) -> Float32[np.ndarray, "n d"]:
    rows = answer.json()["data"]
    return np.stack([np.frombuffer(base64.b64decode(row["embedding"]), dtype="<f4") for row in rows])


def _picture(answer: httpx.Response) -> PillowImage:
    from PIL import Image

    picture = Image.open(io.BytesIO(answer.content))
    picture.load()
    return picture


def _query(text: str | None, item: int | None, target: str, filters: Sequence[dict[str, Any]], text_weight: float) -> dict[str, Any]:
    return {"text": text, "item": item, "target": target, "filters": list(filters), "text_weight": text_weight}


def _list(values: Sequence[str] | None) -> list[str] | None:
    return None if values is None else list(values)


def _given(body: dict[str, Any] | None) -> dict[str, Any] | None:
    return None if body is None else {name: value for name, value in body.items() if value is not None}


def _unreached(url: str, error: httpx.TransportError) -> RefusedError:
    return RefusedError(0, f"{url} does not answer ({type(error).__name__}: {error}): is `mm serve` running there?")


def _refused(answer: httpx.Response) -> RefusedError:
    try:
        detail = str(answer.json()["detail"])
    except (ValueError, KeyError, TypeError):
        detail = answer.text[:200]
    return RefusedError(answer.status_code, detail)


def _passes(answer: httpx.Response) -> bool:
    lost = answer.status_code == _GATEWAY_LOST and "json" not in answer.headers.get("content-type", "")
    return lost or answer.status_code in _PASSING


def _asked_to_wait(answer: httpx.Response) -> float | None:
    value = answer.headers.get("retry-after", "")
    return float(value) if value.isdigit() else None


def _wait_s(attempt: int, asked_s: float | None) -> float:
    """At least what was asked, and at random up to a bound that doubles: who was refused together does not come back together."""
    drawn = random.uniform(0, min(_LONGEST_WAIT_S, _FIRST_WAIT_S * 2.0**attempt))
    return drawn if asked_s is None else min(_LONGEST_WAIT_S, asked_s) + drawn
