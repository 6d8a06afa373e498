"""Balance between tasks that pull at the same towers, and between the towers: weights that are learned, and what is logged of the pull.

Gradients are compared where tasks part, at the tokens that the towers hand on (an upper bound of those at the towers' parameters: Sener and
Koltun 2018, arXiv 1810.04650, section 3.3): that costs a backward pass of the fusion for each task, and none of the towers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from enum import StrEnum
from itertools import combinations

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from mm_core.config import Config
from mm_core.data.masking import uniform
from mm_core.distributed import Around, GlobalBatch, sum_over_ranks

_TINY = 1e-12
_PROBED = 13
"""Keeps the draw of the steps that are probed apart from others."""


class BalanceKind(StrEnum):
    FIXED = "fixed"
    """The weights as they are set."""
    UNCERTAINTY = "uncertainty"
    """Divided by the variance of each task's loss, which is learned (Kendall et al. 2018, arXiv 1705.07115, section 3.2)."""
    GRADNORM = "gradnorm"
    """Such that the tasks of a step pull alike, those that learn slowly more (Chen et al. 2018, arXiv 1711.02257, algorithm 1)."""


class BalanceConfig(Config):
    """How tasks, and the modalities below them, are weighed against one another."""

    kind: BalanceKind = Field(default=BalanceKind.FIXED, description="fixed, uncertainty or gradnorm.")
    alpha: float = Field(default=1.5, ge=0, description="Of gradnorm: how much more slow tasks pull.")
    modulation: float = Field(
        default=0.0, ge=0, description="How much the gradient of the tower that is pulled harder is damped (after OGM-GE); 0: not at all."
    )
    probe_every_steps: int | None = Field(
        default=None, gt=0, description="One step in so many, on average, shows each task's gradient norm and their cosines; null: none."
    )

    @property
    def learns(self) -> bool:
        return self.kind is not BalanceKind.FIXED

    def probes(self, step: int) -> bool:
        """Whether the tokens' gradients are needed at a step."""
        if self.kind is BalanceKind.GRADNORM or self.modulation > 0:
            return True
        # By a draw of the step: a mix of sources repeats, and every n-th step may be of texts alone.
        return self.probe_every_steps is not None and bool(uniform(_PROBED, step) * self.probe_every_steps < 1)


@dataclass(frozen=True)
class Pulls:
    """The global batch's gradient of each task at the tokens, as norms and angles."""

    gram: Float[Tensor, "t t"]
    """Inner products of the tasks' gradients."""
    by_tower: Float[Tensor, "t m"]
    """Squared norms of each task's gradient at each tower's tokens."""

    @property
    def norms(self) -> Float[Tensor, " t"]:
        return self.gram.diagonal().clamp(min=0).sqrt()

    def measures(self, names: Sequence[str], ranks: int) -> dict[str, Float[Tensor, ""]]:
        """This rank's part, so that the sum over ranks is the whole."""
        norms = self.norms
        found = {f"gradient_norm/{name}": norm / ranks for name, norm in zip(names, norms.unbind(), strict=True)}
        for (i, a), (j, b) in combinations(enumerate(names), 2):
            found[f"gradient_cosine/{a}-{b}"] = self.gram[i, j] / (norms[i] * norms[j]).clamp(min=_TINY) / ranks
        return found


def pulls_of(losses: Sequence[Tensor], tokens: Sequence[Tensor], whole: GlobalBatch, *, around: Around = nullcontext) -> Pulls:
    """`losses`: this rank's shares of the tasks', whose graph stays. A collective, of the losses' own messages too."""
    rows = [_gradients(loss, tokens) for loss in losses]
    by_tower = torch.stack([torch.stack([part.square().sum() for part in row]) for row in rows])
    gram = torch.stack([torch.stack([_inner(a, b) for b in rows]) for a in rows])
    summed = sum_over_ranks(torch.cat([gram, by_tower], dim=1).flatten(), whole, around=around).view(len(losses), -1)
    return Pulls(*summed.split([len(losses), len(tokens)], dim=1))


def _gradients(loss: Tensor, tokens: Sequence[Tensor]) -> list[Float[Tensor, " n"]]:
    """By tower, flat, in fp32 at least."""
    found = torch.autograd.grad(loss, tokens, retain_graph=True, allow_unused=True)
    there = [torch.zeros_like(of) if gradient is None else gradient for gradient, of in zip(found, tokens, strict=True)]
    return [gradient.flatten().to(torch.promote_types(gradient.dtype, torch.float32)) for gradient in there]


def _inner(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    return torch.stack([x @ y for x, y in zip(a, b, strict=True)]).sum()


def uncertainty_terms(losses: Mapping[str, Tensor], log_variances: Mapping[str, Tensor], ranks: int) -> dict[str, Float[Tensor, ""]]:
    """Each rank's share of exp(-s) L + s / 2, s the logarithm of the task's variance."""
    return {name: torch.exp(-log_variances[name]) * loss + log_variances[name] / (2 * ranks) for name, loss in losses.items()}


def gradnorm_weights(logits: Sequence[Tensor]) -> Float[Tensor, " t"]:
    """Positive, their sum the number of tasks."""
    return len(logits) * torch.stack([*logits]).softmax(dim=0)


def gradnorm_loss(
    weights: Float[Tensor, " t"], norms: Float[Tensor, " t"], losses: Float[Tensor, " t"], first_losses: Sequence[float], alpha: float
) -> Float[Tensor, ""]:
    """How far the weighted norms are from what each task should pull with (equation 2). Its gradient is that of the weights alone.

    Args:
        losses: of the global batch, without their weights.
        first_losses: what guessing gives, which stands for the losses of the first step.
    """
    pulls = weights * norms.detach()
    rates = losses.detach() / losses.new_tensor(first_losses)
    wanted = pulls.mean().detach() * (rates / rates.mean()) ** alpha
    return (pulls - wanted).abs().sum()


def damping(by_tower: Float[Tensor, " m"], strength: float) -> Float[Tensor, " m"]:
    """Factors of the gradients at each tower's tokens: 1 - tanh(strength (r - 1)) where a tower is pulled r > 1 times as hard as the
    others (Peng et al. 2022, arXiv 2203.15332, equation 10, where the ratio is one of confidences: a fusion has none of one side alone)."""
    norms = by_tower.sqrt()
    others = ((norms.sum() - norms) / max(1, len(norms) - 1)).clamp(min=_TINY)
    return 1 - torch.tanh(strength * (norms / others - 1).clamp(min=0))


def guessing_loss(classes: int) -> float:
    """Cross-entropy of a guess."""
    return math.log(classes)
