"""Pictures by URL: only where hosts are named, only from public addresses, over TLS, without redirects, within time and size."""

from __future__ import annotations

import asyncio
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from starlette.exceptions import HTTPException

from serve.bounds import Hold
from serve.config import Fetching
from serve.fetch import Fetcher, is_public
from serve.problems import InputError, full
from tests.serve.test_endpoints import picture

LIMIT = 20_000


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tls") / "pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    command += ["-addext", "subjectAltName=DNS:localhost", "-keyout", f"{path}", "-out", f"{path}.crt"]
    subprocess.run(command, check=True, capture_output=True)
    path.write_text(path.read_text() + Path(f"{path}.crt").read_text())
    return path


@pytest.fixture(scope="module")
def site(certificate: Path) -> Iterator[int]:
    """Its port."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            match self.path:
                case "/picture":
                    self._answer(200, picture(1))
                case "/large":
                    self._answer(200, bytes(LIMIT + 1))
                case "/elsewhere":
                    self._answer(302, b"", location="https://169.254.169.254/latest/meta-data")
                case "/slow":
                    self.send_response(200)
                    self.end_headers()
                    for _ in range(20):
                        self.wfile.write(b"x")
                        time.sleep(0.1)
                case _:
                    self._answer(404, b"")

        def _answer(self, status: int, body: bytes, **headers: str) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        def handle_error(self, *_: Any) -> None:
            """A caller that hangs up is what is tested."""

    with Server(("127.0.0.1", 0), Handler) as server:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        server.socket = context.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()


def fetched(url: str, *hosts: str, hold: Hold = lambda size: None, **options: Any) -> bytes:
    return asyncio.run(Fetcher(Fetching(hosts=hosts, timeout_s=1), LIMIT, **options).fetch(url, "image", hold))


def refuses(words: str, url: str, *hosts: str, **options: Any) -> None:
    with pytest.raises(InputError, match=words):
        fetched(url, *hosts, **options)


def lenient(port: int, certificate: Path) -> dict[str, Any]:
    """Lets the test's own server pass for a public one."""
    return {"port": port, "allowed": lambda _: True, "trust": ssl.create_default_context(cafile=f"{certificate}.crt")}


def test_a_picture_is_fetched(site: int, certificate: Path) -> None:
    assert fetched(f"https://localhost:{site}/picture", "localhost", **lenient(site, certificate)) == picture(1)


def test_its_bytes_are_counted_while_they_arrive(site: int, certificate: Path) -> None:
    counted: list[int] = []
    data = fetched(f"https://localhost:{site}/picture", "localhost", hold=counted.append, **lenient(site, certificate))
    assert sum(counted) == len(data)

    def no_more(size: int) -> None:
        raise full(f"{size} bytes")

    with pytest.raises(HTTPException, match="429"):
        fetched(f"https://localhost:{site}/picture", "localhost", hold=no_more, **lenient(site, certificate))


@pytest.mark.parametrize(
    ("path", "words"), [("large", "above 20,000"), ("elsewhere", "302; redirects"), ("slow", "within 1 s"), ("absent", "404")]
)
def test_what_is_no_picture_is_refused(site: int, certificate: Path, path: str, words: str) -> None:
    refuses(words, f"https://localhost:{site}/{path}", "localhost", **lenient(site, certificate))


def test_a_private_address_is_never_connected_to(site: int, certificate: Path) -> None:
    """localhost is allowed by name, and leads to 127.0.0.1."""
    refuses("no public address", f"https://localhost:{site}/picture", "localhost", port=site)


def test_a_certificate_that_nobody_vouches_for_is_refused(site: int) -> None:
    refuses("certificate", f"https://localhost:{site}/picture", "localhost", port=site, allowed=lambda _: True)


@pytest.mark.parametrize(
    ("url", "hosts", "words"),
    [
        ("https://example.org/x", (), "not fetched from URLs here"),
        ("http://example.org/x", ("example.org",), "https://HOST"),
        ("https://example.org:8443/x", ("example.org",), "without a port"),
        ("https://me:you@example.org/x", ("example.org",), "password"),
        ("https://example.org.evil.net/x", ("example.org",), "not fetched from"),
        ("https://evilexample.org/x", ("*.example.org",), "not fetched from"),
        ("https://example.org/x", ("*.example.org",), "not fetched from"),
        ("https://127.0.0.1/x", ("example.org",), "not fetched from"),
        ("https://127.0.0.1/x", ("127.0.0.1",), "no public address"),
        ("https://[::1]/x", ("::1",), "no public address"),
        ("https://0x7f.1/x", ("0x7f.1",), "no public address|could not be fetched"),
        ("https://[::/x", ("example.org",), "no URL"),
    ],
)
def test_urls_that_are_not_allowed(url: str, hosts: tuple[str, ...], words: str) -> None:
    refuses(words, url, *hosts)


@pytest.mark.parametrize(
    "address",
    [
        "10.0.0.1",
        "127.0.0.1",
        "169.254.169.254",
        "192.168.1.1",
        "100.64.0.1",
        "0.0.0.0",
        "224.0.0.1",
        "::1",
        "fe80::1",
        "fd00::1",
        "::ffff:10.0.0.1",
        "2002:a00:1::",
        "64:ff9b::a00:1",
    ],
)
def test_addresses_that_are_not_public(address: str) -> None:
    assert not is_public(address)


def test_addresses_that_are() -> None:
    assert is_public("93.184.216.34")
    assert is_public("2606:2800:220:1::1")
    assert is_public("64:ff9b::5db8:d822")


def test_urls_of_one_call_are_counted() -> None:
    fetcher = Fetcher(Fetching(hosts=("example.org",), max_urls=2), LIMIT)
    fetcher.check_count(["https://example.org/1", "data:image/png;base64,x", "https://example.org/2"], "input")
    with pytest.raises(InputError, match="3 URLs"):
        fetcher.check_count(["https://example.org/1"] * 3, "input")
