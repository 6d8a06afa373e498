"""An exponential mean of the weights (Polyak and Juditsky 1992): what is exported and evaluated in place of the last ones."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

_STATISTICS = ("running_mean", "running_var")


class WeightMean:
    """The mean of a model's trained parameters, and of the statistics that batch normalisation keeps of them (as EfficientNet's own code
    has it: Tan and Le 2019). Sharded parameters have sharded means, so it costs a rank its share of one more model."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        """`decay`: the weight of the past in each step, at most; it begins lower, so that fresh weights are soon forgotten."""
        self._followed: dict[str, Tensor] = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._followed |= {name: b for name, b in model.named_buffers() if name.rpartition(".")[2] in _STATISTICS}
        self._decay = decay
        self.state: dict[str, Tensor] = {name: p.detach().clone() for name, p in self._followed.items()}
        """The means, by parameter or buffer."""

    @torch.no_grad()
    def update(self, step: int) -> None:
        """After the optimiser step numbered `step`, from 0."""
        decay = min(self._decay, (1 + step) / (10 + step))
        for name, mean in self.state.items():
            mean.lerp_(self._followed[name].detach(), 1 - decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The model with the mean as its weights, and after it again with its own, bit for bit. Costs the memory of one parameter."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, mean in self.state.items():
            own = self._followed[name].detach()
            kept = own.clone()
            own.copy_(mean)
            mean.copy_(kept)
