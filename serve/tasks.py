"""Which endpoints a model has: that follows from its bundle's task.

A new task is a line here, what its model takes in `prepare.py`, what it computes in `encoder.py`, and its routes beside those in `app.py`.
"""

from __future__ import annotations

from collections.abc import Iterable

_SPACE = ("embeddings", "classify", "match", "search")
ENDPOINTS: dict[str, tuple[str, ...]] = {"contrastive": _SPACE, "multitask": _SPACE}
"""By task. `search` is there where an index is served too."""
FUSED = frozenset({"multitask"})
"""Tasks of models that read a picture and a text at once, which is how they match them."""


def endpoints_of(tasks: Iterable[str]) -> list[str]:
    """Of all models of an endpoint together."""
    return list(dict.fromkeys(name for task in tasks for name in ENDPOINTS[task]))
