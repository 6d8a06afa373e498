"""An S3 store for tests and benchmarks: moto's server, a process of its own, with faults, latency and counts.

`reserve()` gives a port and points every S3 client of this process and those it starts there; `ObjectStore` then serves it.
"""

from __future__ import annotations

import json
import os
import random
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from typing import Any

Start = Callable[..., Any]


def reserve(environment: MutableMapping[str, str]) -> socket.socket:
    """A port that nobody else gets while the socket is open, as what `environment` calls S3."""
    bound = socket.socket()
    bound.bind(("127.0.0.1", 0))
    environment.update(
        {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{bound.getsockname()[1]}",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }
    )
    return bound


class ObjectStore:
    """The server, until the block ends."""

    def __init__(self, bound: socket.socket) -> None:
        self._url = f"http://127.0.0.1:{bound.getsockname()[1]}/_store"
        command = [sys.executable, "-W", "ignore", __file__, str(bound.fileno())]
        self._process = subprocess.Popen(command, pass_fds=[bound.fileno()])

    def __enter__(self) -> ObjectStore:
        while self._process.poll() is None:
            try:
                self.counts()
                return self
            except OSError:
                time.sleep(0.1)
        raise RuntimeError(f"moto's server ended with {self._process.returncode}")

    def __exit__(self, *error: object) -> None:
        self._process.terminate()
        self._process.wait()

    def faults(self, *, fail: float = 0.0, latency_s: float = 0.0, every_write: int = 0) -> None:
        """From now on `fail` of the reads (GETs and HEADs of objects) fail, half of them with 503, half cut off in the middle of the
        body, and each read waits `latency_s`. Of writes (PUTs, POSTs and DELETEs) every `every_write`th fails with 503, by turns before
        and after it is done. Counts start at 0."""
        body = json.dumps({"fail": fail, "latency_s": latency_s, "every_write": every_write}).encode()
        urllib.request.urlopen(urllib.request.Request(f"{self._url}/faults", data=body, method="PUT"), timeout=30).read()

    def counts(self) -> dict[str, int]:
        """`requests`, `bytes` and `failed` of reads, `writes` and `failed_writes`, since `faults` was called."""
        counts: dict[str, int] = json.loads(urllib.request.urlopen(f"{self._url}/counts", timeout=30).read())
        return counts


class _FaultyStore:
    """A WSGI application around moto's."""

    def __init__(self) -> None:
        from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app

        self._moto = DomainDispatcherApplication(create_backend_app)
        self._lock, self._random = threading.Lock(), random.Random(0)
        self._faults = {"fail": 0.0, "latency_s": 0.0, "every_write": 0}
        self._counts = {"requests": 0, "bytes": 0, "failed": 0, "writes": 0, "failed_writes": 0}

    def __call__(self, environ: dict[str, Any], start: Start) -> Iterable[bytes]:
        match environ["REQUEST_METHOD"], environ["PATH_INFO"]:
            case "PUT", "/_store/faults":
                with self._lock:
                    self._faults |= json.loads(environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"])))
                    self._counts = dict.fromkeys(self._counts, 0)
                return self._json(start, self._faults)
            case "GET", "/_store/counts":
                return self._json(start, self._counts)
            case (("GET" | "HEAD"), path) if path.count("/") > 1 and "list-type" not in environ.get("QUERY_STRING", ""):
                return self._read(environ, start)
            case (("PUT" | "POST" | "DELETE"), path) if path.count("/") > 1 or environ.get("QUERY_STRING", "").startswith("delete"):
                return self._write(environ, start)
        return self._moto(environ, start)

    def _write(self, environ: dict[str, Any], start: Start) -> Iterable[bytes]:
        with self._lock:
            self._counts["writes"] += 1
            fails = self._faults["every_write"] > 0 and self._counts["writes"] % self._faults["every_write"] == 0
            self._counts["failed_writes"] += fails
            done = self._counts["failed_writes"] % 2 == 0
        if not fails:
            return self._moto(environ, start)
        if done:
            b"".join(self._moto(environ, lambda *_: None))
        else:
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        start("503 Slow Down", [("Content-Length", "0"), ("Connection", "close")])
        return [b""]

    def _read(self, environ: dict[str, Any], start: Start) -> Iterable[bytes]:
        time.sleep(self._faults["latency_s"])
        with self._lock:
            fails, cut = self._random.random() < self._faults["fail"], self._random.random() < 0.5
            self._counts["requests"] += 1
            self._counts["failed"] += fails
        if fails and (environ["REQUEST_METHOD"] == "HEAD" or not cut):
            start("503 Slow Down", [("Content-Length", "0")])
            return [b""]

        def start_cut(status: str, headers: list[tuple[str, str]], *rest: Any) -> Any:
            return start(status, [*headers, ("Connection", "close")], *rest)

        body = b"".join(self._moto(environ, start_cut if fails else start))
        with self._lock:
            self._counts["bytes"] += len(body)
        return [body[: len(body) // 2] if fails else body]

    @staticmethod
    def _json(start: Start, values: Mapping[str, float]) -> Iterable[bytes]:
        body = json.dumps(values).encode()
        start("200 OK", [("Content-Type", "application/json"), ("Content-Length", str(len(body)))])
        return [body]


def main() -> None:
    from werkzeug.serving import WSGIRequestHandler, make_server

    class Quiet(WSGIRequestHandler):
        protocol_version = "HTTP/1.1"  # connections are used again, as a store's are

        def log(self, type: str, message: str, *args: Any) -> None:
            pass

    fd = int(sys.argv[1])
    with socket.socket(fileno=os.dup(fd)) as bound:
        bound.listen(128)
    make_server("127.0.0.1", 0, _FaultyStore(), threaded=True, request_handler=Quiet, fd=fd).serve_forever()


if __name__ == "__main__":
    main()
