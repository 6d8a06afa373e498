"""What a model makes of one request's inputs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32


@dataclass(frozen=True)
class Encoded:
    """In the order of the inputs."""

    features: Float32[np.ndarray, "n d"]
    """L2-normalised."""
    norms: Float32[np.ndarray, " n"]
    """Of the vectors before that: what drifts where inputs are of another kind than the model knows."""
    tokens: int
    """That the model read: texts cut to its context, begin and end marks included."""


@dataclass(frozen=True)
class Matched:
    """How well each picture of a request fits each of its texts."""

    scores: Float32[np.ndarray, "n m"]
    """The probability that the two belong together, by a model that reads both at once."""
