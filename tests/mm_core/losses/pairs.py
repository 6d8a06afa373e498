"""Made-up features."""

from __future__ import annotations

import torch
from torch import Tensor


def unit(*shape: int, seed: int) -> Tensor:
    """L2-normalised along the last axis, in float64."""
    return torch.nn.functional.normalize(torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)), dim=-1)
