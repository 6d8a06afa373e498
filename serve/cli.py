"""`mm serve`."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Annotated

import typer

from mm_core.console import Console

_MODELS = "models:/"


def attach(app: typer.Typer, resolve_model: Callable[[str], str], session: Callable[[], AbstractContextManager[None]]) -> None:
    """Add `mm serve`. `resolve_model` finds what a MODEL argument stands for; `session` connects to Ray."""

    @app.command()
    def serve(
        model: Annotated[str, typer.Argument(help="A bundle's folder, models:/NAME@ALIAS, or a hub id.")],
        port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
        host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
        replicas: Annotated[int, typer.Option(min=1, help="Copies of the model.")] = 1,
        gpus: Annotated[float, typer.Option(min=0, help="GPUs of each copy.")] = 0,
    ) -> None:
        """Serve a model over HTTP until Ctrl-C: /v1/embeddings, /v1/classify, /healthz, /docs.

        Example: mm serve models:/clip-demo@champion --port 8000
        """
        from serve.address import check_address

        check_address(host, port)
        from serve.config import ServeConfig
        from serve.run import look_at, start

        console = Console()
        config = ServeConfig(host=host, port=port, replicas=replicas, gpus_per_replica=gpus)
        folder = resolve_model(model)
        name = model.removeprefix(_MODELS) if model.startswith(_MODELS) else None
        if not config.is_loopback:
            console.note(f"warning: {host} is reachable from elsewhere and this version asks for no key: put a proxy that does before it")
        served = look_at(folder, config, name=name)
        with session():
            server = start(served, config)
            _introduce(console, model, server.url)
            server.wait()
            console.note("stopping")
            server.stop()


def _introduce(console: Console, model: str, url: str) -> None:
    console.say(f"{model} answers at {url} (OpenAPI: {url}/docs). Ctrl-C stops it. Try:")
    console.say(f"""  curl -s {url}/v1/embeddings -H 'content-type: application/json' -d '{{"input": ["a red circle"]}}'""")
