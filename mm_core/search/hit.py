"""One result of a search."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Hit:
    """An item that was found."""

    item: int
    uid: str
    score: float
    caption: str | None
    metadata: dict[str, Any]
    has_picture: bool
