"""What an mm command needs where it runs, as far as its words tell: the stores that it names, and the tracking store if it uses one."""

from __future__ import annotations

import os
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from cluster.run_names import command_of
from mm_core.errors import ConfigError
from mm_core.store import OBJECT_STORES

_DEFAULT_TRACKING, _SQLITE = "sqlite:///mlflow.db", "sqlite:///"
_TRACKED = ("train", "register", "demo")
_WITHOUT_MODEL = ("data", "search-index", "config", "serve-key", "doctor", "jobs", "submit", "tls")
_END = r"#\"',\]"
_PATTERN = r"*?\[{"
_STORE = re.compile(rf"\b(?:{'|'.join(OBJECT_STORES)})://[^{_END}{_PATTERN}]+?(?=$|[{_END}]|/[^/]*[{_PATTERN}])")
"""Without a ledger; of many files, named by a pattern, the folder."""


@dataclass(frozen=True)
class Needs:
    tracking_uri: str | None
    """As the command sets it, else as this machine is configured, with an absolute path. None: it uses none."""
    stores: tuple[str, ...] | None
    """Addresses of files and folders. None: nothing is known of a command, and what is configured matters."""
    gpus: bool = True
    """Whether it computes with a model, for which GPUs that are there must be seen."""


def configured() -> Needs:
    """Of any command on this machine."""
    return Needs(_tracking(""), None)


def needs_of(command: str) -> Needs:
    """Of `train clip-tiny --data s3://bucket/index#clean --set tracking.uri=http://mlflow:5000`, quoted as a shell takes it.

    Raises:
        ConfigError: a quote is open.
    """
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise ConfigError(f"--before {command}: {error}") from None
    if words[:1] == ["mm"]:
        words = words[1:]
    first = command_of(words)
    set_uris = [word.partition("tracking.uri=")[2] for word in words if "tracking.uri=" in word]
    tracked = first in _TRACKED or any("models:/" in word for word in words)
    if first == "train" and not any("storage=" in word for word in words):
        words.append(os.environ.get("MM_SET__STORAGE", ""))
    stores = dict.fromkeys(found for word in words for found in _STORE.findall(word))
    return Needs(_tracking(set_uris[-1] if set_uris else "") if tracked else None, tuple(stores), first not in _WITHOUT_MODEL)


def _tracking(uri: str) -> str:
    uri = uri or os.environ.get("MM_SET__TRACKING__URI", _DEFAULT_TRACKING)
    return _SQLITE + str(Path(uri.removeprefix(_SQLITE)).absolute()) if uri.startswith(_SQLITE) else uri
