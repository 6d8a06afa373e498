"""What a search index answers, for processes that hold none."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32

from mm_core.search.hit import Hit

Vector = Float32[np.ndarray, " d"]


@dataclass(frozen=True)
class Hits:
    """One page."""

    rows: list[Hit]
    more: bool
    """Whether there is another page."""


@dataclass(frozen=True)
class Refused:
    """What was asked for is not there, or makes no sense."""

    reason: str
