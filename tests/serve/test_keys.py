"""Beyond loopback nobody is let in without a key, whose digest alone is kept; health is open."""

from __future__ import annotations

import asyncio
import base64
from pathlib import Path

import httpx
import pytest

from mm_core.errors import ConfigError
from serve.app import create_app
from serve.config import ServeConfig
from serve.keys import digest, new_key, parse_keys, read_keys
from serve.measured import Measured
from serve.upstream import Upstream
from tests.serve.test_lost import TRAFFIC

KEY = "mm-a-key-for-this-test"


def ask(config: ServeConfig, path: str, headers: dict[str, str] | None = None) -> httpx.Response:
    upstream = Upstream(10, Measured(), lambda *_: asyncio.sleep(0))  # type: ignore[arg-type, return-value]
    upstream.follow(TRAFFIC)
    app = create_app(config, ["contrastive"], upstream)

    async def request() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://example.org") as client:
            return await client.get(path, headers=headers)

    return asyncio.run(request())


def basic(password: str) -> dict[str, str]:
    return {"authorization": f"Basic {base64.b64encode(f'me:{password}'.encode()).decode()}"}


@pytest.mark.parametrize("keys", [{}, {"ada": digest(KEY)}])
@pytest.mark.parametrize("path", ["/", "/page.js", "/v1/models", "/metrics", "/openapi.json", "/nothing"])
def test_every_route_but_health_is_closed(keys: dict[str, str], path: str) -> None:
    answer = ask(ServeConfig(host="0.0.0.0", keys=keys), path)
    assert answer.status_code == 401
    assert answer.headers["content-type"] == "application/problem+json"
    assert "Basic" in answer.headers["www-authenticate"]


@pytest.mark.parametrize("path", ["/healthz", "/readyz"])
def test_health_is_open(path: str) -> None:
    assert ask(ServeConfig(host="0.0.0.0"), path).status_code == 200


@pytest.mark.parametrize("path", ["/", "/v1/models", "/metrics"])
def test_a_key_opens_as_bearer_and_as_a_browsers_password(path: str) -> None:
    config = ServeConfig(host="0.0.0.0", keys={"bo": digest("another-key-of-bo"), "ada": digest(KEY)})
    assert ask(config, path, {"authorization": f"Bearer {KEY}"}).status_code == 200
    assert ask(config, path, basic(KEY)).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"authorization": "Bearer wrong"},
        {"authorization": "Bearer"},
        {"authorization": KEY},
        {"authorization": "Basic %%%"},
        {"authorization": f"Bearer {digest(KEY)}"},
        basic("wrong"),
        {"x-api-key": KEY},
    ],
)
def test_anything_else_does_not(headers: dict[str, str]) -> None:
    assert ask(ServeConfig(host="127.0.0.1", keys={"ada": digest(KEY)}), "/v1/models", headers).status_code == 401


def test_on_loopback_without_keys_only_this_machines_names_are_answered() -> None:
    for host, status in {
        "localhost": 200,
        "127.0.0.1:8000": 200,
        "[::1]:80": 200,
        "[::1]": 200,
        "evil.example": 421,
        "127.0.0.1.nip.io": 421,
    }.items():
        assert ask(ServeConfig(), "/v1/models", {"host": host}).status_code == status, host


def test_a_file_of_keys(tmp_path: Path) -> None:
    path = tmp_path / "keys.txt"
    path.write_text(f"# ours\nada {digest(KEY)}\n\nbo {digest('x' * 20)}  # leaves in May\n")
    assert read_keys(path) == {"ada": digest(KEY), "bo": digest("x" * 20)}
    for text, words in {"ada secret\n": "line 1.*serve-key", "": "no key", f"ada {'g' * 64}": "line 1"}.items():
        path.write_text(text)
        with pytest.raises(ConfigError, match=words):
            read_keys(path)
    with pytest.raises(ConfigError, match="cannot read"):
        read_keys(tmp_path / "absent")


def test_keys_of_the_environment() -> None:
    key = new_key()
    assert parse_keys(f"ada={key}, {KEY}") == {"ada": digest(key), "key2": digest(KEY)}
    assert parse_keys("") == {}
    assert new_key() != key
    with pytest.raises(ConfigError, match="under 16"):
        parse_keys("ada=short")
