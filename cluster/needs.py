"""What an mm command needs where it runs, as far as its words tell: the stores that it names, and the tracking store if it uses one."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass

from mm_core.store import OBJECT_STORES

_TRACKED = ("train", "eval", "register", "serve", "demo")
_STORE = re.compile(rf"\b(?:{'|'.join(OBJECT_STORES)})://[^#]+?(?=$|#|/[^/]*[*?\[{{])")
"""Without a ledger; of many files, named by a pattern, the folder."""


@dataclass(frozen=True)
class Needs:
    tracking_uri: str | None = ""
    """As the command sets it; empty: as this machine is configured; None: it uses none."""
    stores: tuple[str, ...] = ()
    """Addresses of files and folders."""


def needs_of(arguments: Sequence[str]) -> Needs:
    """Of a command without its program: `train clip-tiny --data s3://bucket/index#clean --set tracking.uri=http://mlflow:5000`."""
    words, first = list(arguments), arguments[0] if arguments else ""
    set_uris = [word.partition("tracking.uri=")[2] for word in words if "tracking.uri=" in word]
    tracked = first in _TRACKED or any("models:/" in word for word in words)
    if first == "train" and not any("storage=" in word for word in words):
        words.append(os.environ.get("MM_SET__STORAGE", ""))
    stores = dict.fromkeys(found for word in words for found in _STORE.findall(word))
    return Needs((set_uris[-1] if set_uris else "") if tracked else None, tuple(stores))
