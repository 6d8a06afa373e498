"""Tampered pictures and bodies, and what the OpenAPI document lets one say: never a 5xx, no copy dies, memory stays.

The suite sends some hundreds; `make long` 120,000: a tenth to the endpoint, the others to the same parts in this process, which are a
hundred times faster there.
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
import schemathesis
from fastapi import FastAPI
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import response_schema_conformance

from serve.app import create_app
from serve.config import ServeConfig
from serve.encoded import Encoded
from serve.encoder import Encoder
from serve.facts import Version
from serve.fleet import application_of
from serve.inputs import Picture
from serve.measured import Measured
from serve.prepare import Preparer, Unreadable
from serve.run import Server
from serve.searcher import Searcher
from serve.store import Folders
from serve.traffic import Share, Slot, Traffic
from serve.upstream import Part, Upstream
from tests.serve import mutate

CALLERS = 6
GROWTH_BYTES = 250 << 20
EXAMPLES: dict[str, list[dict[str, Any]]] = {
    "/v1/embeddings": [{"input": ["a", mutate.data_uri(b"x")], "dimensions": 3, "encoding_format": "base64"}, {"input": {"text": "a"}}],
    "/v1/classify": [{"image": mutate.data_uri(b"x"), "labels": ["a", "b"], "templates": ["a {c}"], "top_k": 1}, {"label_set": "shapes"}],
    "/v1/match": [{"images": [mutate.data_uri(b"x")], "texts": ["a"]}],
    "/v1/search": [
        {"text": "a", "filters": [{"field": "width", "op": ">", "value": 3}], "limit": 3, "offset": 0},
        {"item": 3, "target": "texts"},
    ],
}


def replicas() -> dict[int, int]:
    """Memory of each process of the endpoint and of the version that answers, by its id."""
    applications = tuple(f"ray::ServeReplica:{name}:" for name in ("mm", application_of("models:/tiny/1")))
    found = {}
    for process in psutil.Process().children(recursive=True):
        if " ".join(process.cmdline()).startswith(applications):
            found[process.pid] = process.memory_info().rss
    assert len(found) >= 5, "gateway, keeper, searcher, preparer, encoder"
    return found


def sent(server: Server, requests: range, make: Callable[[int], tuple[str, bytes]]) -> Counter[int]:
    """How often each status came back."""
    headers = {"content-type": "application/json"}
    limits = httpx.Limits(max_connections=CALLERS)
    with httpx.Client(base_url=server.url, timeout=60, headers=headers, limits=limits) as client, ThreadPoolExecutor(CALLERS) as threads:

        def send(seed: int) -> int:
            path, content = make(seed)
            answer = client.post(path, content=content)
            assert answer.status_code < 500, (seed, path, content[:300], answer.text)
            return answer.status_code

        return Counter(threads.map(send, requests))


def tampered(seeds: range) -> Callable[[int], tuple[str, bytes]]:
    """Path and body of each seed; of the first three quarters pictures, of the others bodies."""
    pictures = mutate.originals()
    bodies = int(seeds.start + 0.75 * len(seeds))
    examples = {path: [json.loads(json.dumps(one)) for one in some] for path, some in EXAMPLES.items()}

    def make(seed: int) -> tuple[str, bytes]:
        if seed < bodies:
            data = mutate.picture(seed, pictures)
            return "/v1/embeddings", json.dumps({"input": mutate.data_uri(data)}).encode()
        path = list(examples)[seed % len(examples)]
        return path, mutate.body(seed, examples[path])

    return make


def fuzz(server: Server, seeds: range) -> Counter[int]:
    before = replicas()
    statuses = sent(server, seeds, tampered(seeds))
    after = replicas()
    assert before.keys() <= after.keys(), "a copy died"
    grown = sum(after[pid] - before[pid] for pid in before)
    assert grown < GROWTH_BYTES, f"memory grew by {grown:,} bytes"
    assert httpx.get(f"{server.url}/readyz").status_code == 200
    return statuses


def test_some_hundred_tampered_requests_break_nothing(server: Server) -> None:
    statuses = fuzz(server, range(400))
    assert statuses[200] > 15, "some are still pictures"
    assert statuses[422] > 150, statuses


@pytest.mark.long
def test_twelve_thousand_tampered_requests_break_nothing(server: Server) -> None:
    print(fuzz(server, range(1000, 13_000)))


@pytest.mark.long
def test_a_hundred_thousand_tampered_requests_break_nothing_in_one_process(
    bundle_folder: Path, searchable: Path, serve_config: ServeConfig
) -> None:
    """An exception that nothing expects comes out here as itself."""
    seeds = range(13_000, 121_000)
    make = tampered(seeds)

    async def run() -> tuple[Counter[int], int]:
        app, statuses = await in_this_process(bundle_folder, searchable, serve_config), Counter[int]()
        process = psutil.Process()
        for seed in seeds:
            status = await asked(app, *make(seed))
            assert status < 500, seed
            statuses[status] += 1
            if seed == seeds.start + 2000:
                before = process.memory_info().rss
        return statuses, process.memory_info().rss - before

    statuses, grown = asyncio.run(run())
    print(statuses, f"memory grew by {grown:,} bytes")
    assert grown < GROWTH_BYTES


async def in_this_process(folder: Path, searchable: Path, config: ServeConfig) -> FastAPI:
    """An endpoint whose deployments are here."""
    encoder, searcher = Encoder(str(folder), config.compute, Folders()), Searcher(str(searchable), config.bounds.max_pixels)
    preparer = Preparer.__new__(Preparer)
    await preparer.__init__(handle(encoder), config.bounds.max_pixels)  # type: ignore[misc]

    async def ask(_: str, part: Part, inputs: Sequence[str | Picture]) -> Encoded | Unreadable:
        (prepared,) = await preparer.prepare([inputs])
        if isinstance(prepared, Unreadable):
            return prepared
        features = np.empty((len(inputs), 16), dtype=np.float32)
        if prepared.image_rows:
            features[prepared.image_rows] = encoder._image_vectors([prepared.images])[0]
        if prepared.text_rows:
            features[prepared.text_rows] = encoder._text_vectors([(prepared.input_ids, prepared.lengths)])[0]
        return Encoded(features, np.ones(len(inputs), np.float32), int(prepared.lengths.sum()))

    version = Version(application="here", reference="here", facts=await encoder.facts())
    upstream = Upstream(config.bounds.max_waiting_inputs, Measured(), ask)
    upstream.follow(Traffic(slots=(Slot(name="tiny", shares=(Share(version=version, percent=100),)),), searched=version))
    return create_app(config, [version.facts.task], upstream, searcher=handle(searcher))


def handle(deployment: Any) -> Any:
    """As Ray Serve's, of a deployment that is here: `handle.method.remote(…)`."""
    names = [name for name in dir(deployment) if not name.startswith("_")]
    return SimpleNamespace(**{name: SimpleNamespace(remote=getattr(deployment, name)) for name in names})


async def asked(app: FastAPI, path: str, body: bytes) -> int:
    """The status."""
    headers = [(b"host", b"localhost"), (b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    scope = {"type": "http", "method": "POST", "path": path, "raw_path": path.encode(), "query_string": b"", "headers": headers}
    scope |= {"http_version": "1.1", "scheme": "http", "root_path": "", "server": ("localhost", 80), "client": ("127.0.0.1", 9)}
    told: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: Any) -> None:
        told.append(message)

    await app(scope, receive, send)
    return int(told[0]["status"])


def test_what_the_document_allows_is_answered_as_it_says(server: Server) -> None:
    """Requests drawn from the OpenAPI document, for every operation of it."""
    document = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    operations = [found.ok() for found in document.get_all_operations()]
    assert len(operations) >= 12
    for operation in operations:

        @given(case=operation.as_strategy())
        @settings(max_examples=5, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None)
        def ask(case: schemathesis.Case) -> None:
            case.call_and_validate(checks=[not_a_server_error, response_schema_conformance], timeout=60)

        ask()
