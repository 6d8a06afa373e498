"""Tampered pictures and bodies, and what the OpenAPI document lets one say: never a 5xx, no copy dies, memory stays.

The suite sends some hundreds; `make fuzz` 120,000.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import psutil
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import response_schema_conformance

from serve.fleet import application_of
from serve.run import Server
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


def fuzz(server: Server, requests: range) -> Counter[int]:
    """The first three quarters pictures, the others bodies."""
    pictures = mutate.originals()
    bodies = int(requests.start + 0.75 * len(requests))
    examples = {path: [json.loads(json.dumps(one)) for one in some] for path, some in EXAMPLES.items()}

    def make(seed: int) -> tuple[str, bytes]:
        if seed < bodies:
            data = mutate.picture(seed, pictures)
            return "/v1/embeddings", json.dumps({"input": mutate.data_uri(data)}).encode()
        path = list(examples)[seed % len(examples)]
        return path, mutate.body(seed, examples[path])

    before = replicas()
    statuses = sent(server, requests, make)
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
def test_a_hundred_thousand_tampered_requests_break_nothing(server: Server) -> None:
    print(fuzz(server, range(1000, 121_000)))


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
