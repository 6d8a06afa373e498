"""Configuration: frozen pydantic models resolved from recipe < file < environment < `--set a.b=c`.

A key nobody declared is an error that names the nearest one. `resolve` also says where each value came from.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from mm_core.address import without_password
from mm_core.errors import ConfigError

ENV_PREFIX = "MM_"
"""`MM_SET__OPTIMIZER__LR=1e-3` sets `optimizer.lr`: the marker, then the path with double underscores."""
_ENV_MARKER = f"{ENV_PREFIX}SET__"


class Config(BaseModel):
    """Base of every config model: immutable, and no key that is not declared."""

    model_config = ConfigDict(frozen=True, extra="forbid")


C = TypeVar("C", bound=Config)
Origins = dict[str, str]
"""Dotted key → where its value came from."""


def resolve(
    base: C,
    *,
    base_name: str = "default",
    file: Path | None = None,
    environment: Mapping[str, str] | None = None,
    overrides: Sequence[str] = (),
) -> tuple[C, Origins]:
    """Lay the sources over `base` in order of precedence and validate the result.

    Raises:
        ConfigError: an unknown key (the nearest one is named), an unreadable file, a value of the wrong type.
    """
    values = base.model_dump()
    origins = {key: base_name for key, _ in flatten(values)}
    layers: list[tuple[str, dict[str, Any]]] = []
    if file is not None:
        layers.append((str(file), dict(flatten(read_file(file)))))
    env = os.environ if environment is None else environment
    for name in sorted(env):
        if name.startswith(_ENV_MARKER):
            key = name[len(_ENV_MARKER) :].lower().replace("__", ".")
            layers.append((f"environment {name}", {key: _scalar(env[name])}))
    for item in overrides:
        key, separator, value = item.partition("=")
        if not separator or not key:
            raise ConfigError(f"--set {item!r} is not of the form key=value, for example --set optimizer.lr=1e-3")
        layers.append((f"--set {key}", {key: _scalar(value)}))
    for origin, settings in layers:
        for key, value in settings.items():
            _assign(values, key, value, origin)
            origins = {k: v for k, v in origins.items() if not k.startswith(key + ".")}
            origins[key] = origin
    return validate(type(base), values), origins


def validate(model: type[C], values: Mapping[str, Any], context: Mapping[str, Any] | None = None) -> C:
    """Build `model`, turning pydantic's report into one line per problem. `context` is for its validators."""
    try:
        return model.model_validate(values, context=dict(context or {}))
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc'])) or model.__name__}: {e['msg']}, got {e['input']!r}" for e in error.errors())
        raise ConfigError(f"invalid configuration: {without_password(problems)}") from None


def read_file(path: Path) -> dict[str, Any]:
    """A YAML (or JSON) mapping."""
    try:
        loaded = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise ConfigError(f"cannot read config file {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"config file {path} is not UTF-8 text: {error.reason} at byte {error.start}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(loaded, dict):
        raise ConfigError(f"{path} holds {type(loaded).__name__}; a config file is a mapping of keys to values")
    return loaded


class _Loader(yaml.SafeLoader):
    """A key that comes twice would silently be the second one alone."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = str(self.construct_object(key_node, deep=True))
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} comes twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted key and value of every leaf, in order. An empty mapping is a leaf."""
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def nearest(word: str, known: Sequence[str]) -> str:
    """The ending ` (did you mean 'x'?)` for an error message, or the list of what is known."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(sorted(known))}"


def _assign(values: dict[str, Any], key: str, value: Any, origin: str) -> None:
    *parents, last = key.split(".")
    node = values
    for depth, part in enumerate(parents):
        child = node.get(part)
        if not isinstance(child, dict):
            path = ".".join(parents[: depth + 1])
            raise ConfigError(f"unknown key {key!r} ({origin}): {path!r} has no keys below it{nearest(part, list(node))}")
        node = child
    if last not in node:
        known = [k for k, _ in flatten(values)]
        raise ConfigError(f"unknown key {key!r} ({origin}){nearest(key, known)}")
    if isinstance(node[last], dict) and not isinstance(value, dict):
        below = ", ".join(f"{key}.{k}" for k in node[last])
        raise ConfigError(f"{key!r} ({origin}) is a group; set one of {below}")
    node[last] = value


def _scalar(text: str) -> Any:
    """A value as YAML reads it, with the numbers YAML misses (`1e-3`)."""
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return text
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value
