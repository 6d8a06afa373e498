"""The evidence lower bound of a discrete VAE (Ramesh et al. 2021, equation 1), and whether its codebook is in use."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from mm_core.config import Config
from mm_core.distributed import Around, gather_features, sum_over_ranks
from mm_core.models.codebook import CODEBOOK_STRIDE
from mm_core.models.dvae import DvaeBatch, DvaeOutput
from mm_core.objectives.output import LossOutput

_VALUES = 3 * CODEBOOK_STRIDE**2
"""Of the picture, for each entry."""


class CodebookObjectiveConfig(Config):
    """The bound's weights and how the choice of entries hardens. By default DALL-E's (appendix A.2), by shares of the run."""

    kind: Literal["codebook"] = "codebook"
    kl_weight: float = Field(default=6.6, ge=0, description="Of the divergence from even use of all entries, at its highest.")
    kl_warmup: float = Field(default=0.1, ge=0, le=1, description="Share of the run in which that weight grows from 0.")
    usage_weight: float = Field(
        default=0.0,
        ge=0,
        description="Of the entropy that the batch's use of the entries lacks (wav2vec 2.0): keeps them from falling idle.",
    )
    temperature: tuple[float, float] = Field(default=(1.0, 1 / 16), description="Of the relaxed choice, first and last.")
    cooling: float = Field(default=0.5, gt=0, le=1, description="Share of the run in which it falls from the first to the last.")

    def kl_weight_at(self, progress: float) -> float:
        """`progress`: share of the run that is done."""
        return self.kl_weight * _cosine(progress, self.kl_warmup)

    def temperature_at(self, progress: float) -> float:
        first, last = self.temperature
        return first + (last - first) * _cosine(progress, self.cooling)


def _cosine(progress: float, end: float) -> float:
    """From 0 to 1."""
    return 1.0 if progress >= end else (1 - math.cos(math.pi * progress / end)) / 2


class CodebookObjective:
    """Reconstruction and divergence, in nats per value of the picture."""

    def __init__(self, config: CodebookObjectiveConfig, *, around: Around = nullcontext) -> None:
        """`around`: entered for the messages between ranks; for a clock."""
        self._usage_weight, self._around = config.usage_weight, around

    def __call__(self, output: DvaeOutput, batch: DvaeBatch, counts: Sequence[int]) -> LossOutput:
        share = len(output.pixels) / sum(counts)
        logits = output.logits.float()
        terms = {
            "reconstruction": share * logit_laplace_loss(output.reconstruction.float(), output.pixels.float()),
            "divergence": share * batch.kl_weight * divergence_from_even(logits) / _VALUES,
        }
        if self._usage_weight:
            terms["usage"] = self._usage_weight * self._uneven(share * logits.softmax(dim=1).mean(dim=(0, 2, 3)), batch)
        return LossOutput.of(terms, len(counts), self._usage(logits.detach(), batch))

    def _uneven(self, shares: Float[Tensor, " k"], batch: DvaeBatch) -> Float[Tensor, ""]:
        """This rank's part of the divergence of the global batch's mean use from even use (Baevski et al. 2020, arXiv 2006.11477,
        equation 4). `shares`: of the rank's own, as parts of the whole."""
        ranks = len(batch.whole.counts)
        use = gather_features(shares[None], [1] * ranks, around=self._around).sum(dim=0)
        return (math.log(len(use)) + torch.special.xlogy(use, use).sum()) / ranks

    def _usage(self, logits: Float[Tensor, "b k n m"], batch: DvaeBatch) -> dict[str, Float[Tensor, ""]]:
        """Of the global batch; each rank reports its part, so that the sum over ranks is it."""
        chosen = torch.bincount(logits.argmax(dim=1).flatten(), minlength=logits.shape[1]).to(logits.dtype)
        used = sum_over_ranks(chosen, batch.whole, around=self._around)
        shares = used / used.sum()
        entropy = -torch.special.xlogy(shares, shares).sum()
        ranks = len(batch.whole.counts)
        return {"codebook/perplexity": entropy.exp() / ranks, "codebook/used": (used > 0).to(logits.dtype).mean() / ranks}


def logit_laplace_loss(parameters: Float[Tensor, "b 6 h w"], pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, ""]:
    """The mean negative log-likelihood of pixels in (0, 1) (equation 2)."""
    location, log_scale = parameters.chunk(2, dim=1)
    distance = (torch.logit(pixels) - location).abs() * torch.exp(-log_scale)
    return (distance + log_scale + math.log(2) + torch.log(pixels * (1 - pixels))).mean()


def divergence_from_even(logits: Float[Tensor, "b k n m"]) -> Float[Tensor, ""]:
    """The mean over places of the divergence of the entries' distribution from the uniform one, nats."""
    log_shares = logits.log_softmax(dim=1)
    return (log_shares.exp() * (log_shares + math.log(logits.shape[1]))).sum(dim=1).mean()
