"""`mm serve` and `mm serve-key`."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mm_core.address import absolute
from mm_core.config import resolve, validate
from mm_core.console import Console
from mm_core.errors import ConfigError

if TYPE_CHECKING:
    import ray.serve

    from serve.config import LabelSet, ServeConfig
    from serve.fleet import Wanted
    from serve.run import Plan
    from serve.store import ModelStore

_MODELS = "models:/"
_IMPORT_PATH = "mm:serving"
"""What builds the application on a cluster."""


def attach(app: typer.Typer, store: Callable[[], ModelStore], session: Callable[[], AbstractContextManager[None]]) -> None:
    """Add the commands. `store` finds what a MODEL argument stands for; `session` connects to Ray."""
    app.command("serve-key")(serve_key)

    @app.command()
    def serve(
        models: Annotated[
            list[str], typer.Argument(metavar="MODEL...", help="Bundles' folders, models:/NAME@ALIAS, or hub ids; NAME=MODEL names one.")
        ],
        port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
        host: Annotated[str, typer.Option(help="Address to listen on; beyond loopback API keys are needed.")] = "127.0.0.1",
        replicas: Annotated[int, typer.Option(min=1, help="Copies of each model.")] = 1,
        gpus: Annotated[float, typer.Option(min=0, help="GPUs of each copy.")] = 0,
        search: Annotated[str | None, typer.Option(help="Folder that `mm search-index` made: /v1/search.")] = None,
        canary: Annotated[
            list[str] | None, typer.Option(metavar="MODEL=PERCENT", help="Another version, for a percentage of the requests.")
        ] = None,
        keys: Annotated[Path | None, typer.Option(help="File of API keys' digests; see mm serve-key. Or MM_API_KEYS=NAME=KEY,…")] = None,
        label_set: Annotated[
            list[str] | None, typer.Option(metavar="NAME=FILE", help="Labels, one a line, or a folder in CLIP_benchmark's layout.")
        ] = None,
        fetch_from: Annotated[list[str] | None, typer.Option(metavar="HOST", help="Let requests name pictures of this host.")] = None,
        precision: Annotated[str, typer.Option(help="fp32 or bf16.")] = "fp32",
        compile_model: Annotated[bool, typer.Option("--compile", help="Compile the model while it comes up.")] = False,
        settings: Annotated[
            list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="A setting, e.g. bounds.max_inputs=512.")
        ] = None,
        write_config: Annotated[Path | None, typer.Option(help="Write a serve.yaml for a cluster, and stop.")] = None,
    ) -> None:
        """Serve models over HTTP until Ctrl-C: a page, /v1/embeddings, /v1/classify, /v1/match, /v1/search, /metrics. An alias is followed.

        Example: mm serve models:/clip-demo@champion --port 8000
        """
        from serve.address import check_address

        compute = {"replicas": replicas, "gpus_per_replica": gpus, "precision": precision, "compile": compile_model}
        found = {
            "host": host,
            "port": port,
            "compute": compute,
            "keys": _keys(keys),
            "label_sets": {name: one.model_dump() for name, one in map(_label_set, label_set or ())},
            "fetching": {"hosts": tuple(fetch_from or ())},
            "search": _folder(search) if search else None,
        }
        config = _config(found, settings or ())
        if write_config is None:
            check_address(config.host, config.port)  # before what takes seconds to import
        wanted = wanted_models(models, canary or ())
        if config.needs_key and not config.keys:
            raise ConfigError(
                f"{config.host} is reachable from elsewhere and there are no API keys: give --keys FILE; `mm serve-key NAME` draws one"
            )
        from serve.run import look_at, plan_of, start

        console = Console()
        if write_config is not None:
            _write(write_config, serve_yaml(plan_of(wanted, config, store()), _environment()))
            console.say(f"{write_config} is for `serve deploy {write_config}` and for a RayService")
            return
        plan = look_at(wanted, config, store())
        with session():
            server = start(plan)
            _introduce(console, server.url, server.models, config)
            server.wait(_watch(console))
            console.note("stopping")
            server.stop()


def serve_key(name: Annotated[str, typer.Argument(help="Whose key it is.")]) -> None:
    """Draw an API key. The key goes to standard error, once; the line for the file of `mm serve --keys` to standard output.

    Example: mm serve-key ada >> keys.txt
    """
    from serve.keys import digest, new_key

    if not name.isidentifier():
        raise ConfigError(f"{name!r} cannot name a key; use letters, digits and '_'")
    key = new_key()
    Console().note(f"the key of {name}, which is not kept anywhere: {key}")
    typer.echo(f"{name} {digest(key)}")


def wanted_models(models: Sequence[str], canaries: Sequence[str]) -> list[Wanted]:
    """What the arguments name.

    Raises:
        ConfigError: two models of one name, or a canary that belongs to none.
    """
    from serve.fleet import Wanted

    named: dict[str, Wanted] = {}
    for text in models:
        name, reference = _named(text)
        if name in named:
            raise ConfigError(f"two models are called {name!r}: name one, NAME=MODEL")
        named[name] = Wanted(name, reference)
    for text in canaries:
        reference, _, share = text.rpartition("=")
        try:
            percent = float(share)
        except ValueError:
            percent = -1
        if not reference or not 0 <= percent <= 100:
            raise ConfigError(f"--canary {text!r} is not of the form MODEL=PERCENT, e.g. models:/clip-demo@challenger=10")
        owner = _owner(reference, list(named))
        named[owner] = Wanted(owner, named[owner].reference, reference, percent)
    return list(named.values())


def serve_yaml(plan: Plan, environment: Mapping[str, str]) -> str:
    """What `serve deploy` and a RayService take; the digests of the keys are in it, the keys are not."""
    import yaml

    config = plan.config
    args = {"models": [vars(one) for one in plan.wanted], "config": config.model_dump(mode="json")}
    application: dict[str, Any] = {"name": "mm", "route_prefix": "/", "import_path": _IMPORT_PATH, "args": args}
    if environment:
        application["runtime_env"] = {"env_vars": dict(environment)}
    http = {"host": config.host, "port": config.port, "request_timeout_s": config.bounds.request_timeout_s + 10}
    return yaml.safe_dump({"http_options": http, "applications": [application]}, sort_keys=False)


def from_yaml(args: Mapping[str, Any], store: ModelStore) -> ray.serve.Application:
    """The application that `serve_yaml` described, on the cluster it is to run on."""
    from serve.config import ServeConfig
    from serve.fleet import Wanted
    from serve.run import application, plan_of

    wanted = [Wanted(**one) for one in args["models"]]
    return application(plan_of(wanted, validate(ServeConfig, args["config"]), store))


def _named(text: str) -> tuple[str, str]:
    """Name and reference; of a folder one that means the same wherever it is read."""
    name, equals, reference = text.partition("=")
    if not equals or "/" in name or ":" in name:
        name, reference = (text.removeprefix(_MODELS) if text.startswith(_MODELS) else Path(text.rstrip("/")).name), text
    return name, absolute(reference) if Path(reference).is_dir() else reference


def _owner(reference: str, names: Sequence[str]) -> str:
    """The served model that a canary belongs to: of the same registered name, or the only one."""
    base = _named(reference)[0].partition("@")[0].partition("/")[0]
    same = [name for name in names if name.partition("@")[0].partition("/")[0] == base]
    if len(same) == 1 or len(names) == 1:
        return (same or names)[0]
    raise ConfigError(f"--canary {reference} belongs to none of {', '.join(names)}: give versions of one registered model")


def _keys(path: Path | None) -> dict[str, str]:
    from serve.keys import ENVIRONMENT, parse_keys, read_keys

    return (read_keys(path) if path else {}) | parse_keys(os.environ.get(ENVIRONMENT, ""))


def _folder(search: str) -> str:
    from mm_core.search.embeddings import vectors_folder

    return str(vectors_folder(search))


def _label_set(text: str) -> tuple[str, LabelSet]:
    from mm_core.evaluation.zeroshot import read_classnames, read_templates
    from serve.config import LabelSet

    name, equals, place = text.partition("=")
    path = Path(place)
    if not equals or not name:
        raise ConfigError(f"--label-set {text!r} is not of the form NAME=FILE")
    if path.is_dir():
        return name, LabelSet(labels=tuple(read_classnames(path)), templates=tuple(read_templates(path)))
    try:
        labels = tuple(line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--label-set {name}: cannot read {path}: {error}") from None
    if not labels:
        raise ConfigError(f"--label-set {name}: {path} is empty; it holds a label on each line")
    return name, LabelSet(labels=labels)


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--write-config: cannot write {path}: {error.strerror}") from None


def _config(found: Mapping[str, Any], settings: Sequence[str]) -> ServeConfig:
    from serve.config import ServeConfig

    return resolve(validate(ServeConfig, found), environment={}, overrides=settings)[0]


def _environment() -> dict[str, str]:
    """What the registry is reached with on a cluster as here."""
    return {name: value for name, value in os.environ.items() if name.startswith("MM_SET__TRACKING__")}


def _watch(console: Console) -> Callable[[], None]:
    """Tell the person who watches when a version comes or is refused."""
    from serve.run import states

    told = states()

    def look() -> None:
        nonlocal told
        try:
            now = states()
        except Exception:  # a keeper that is being replaced tells again when it is back
            return
        for name, line in now.items():
            if told.get(name) != line:
                console.note(f"{name}: {line}")
        told = now

    return look


def _introduce(console: Console, url: str, models: Sequence[str], config: ServeConfig) -> None:
    console.say(f"{', '.join(models)} at {url}: a page to look at, {url}/openapi.json for programs. Ctrl-C stops it. Try:")
    key = ' -H "authorization: Bearer $KEY"' if config.needs_key else ""
    console.say(f"""  curl -s {url}/v1/embeddings{key} -H 'content-type: application/json' -d '{{"input": ["a red circle"]}}'""")
