"""FLAVA's objectives (Singh et al. 2022, section 3.2): a loss for each task that a step's modalities allow, over the global batch.

`LossOutput` says how a share is scaled. A mean is over all that is predicted on any rank, so ranks with more masked words count for more.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional

from mm_core.config import Config
from mm_core.distributed import Around, gather_features, sum_over_ranks
from mm_core.losses.blocks import BLOCK_BYTES
from mm_core.losses.contrastive import contrastive_loss
from mm_core.models.fused_batch import FusedBatch, FusedOutput, Predictions, Task
from mm_core.objectives.balance import (
    BalanceConfig,
    BalanceKind,
    Pulls,
    damping,
    gradnorm_loss,
    gradnorm_weights,
    guessing_loss,
    pulls_of,
    uncertainty_terms,
)
from mm_core.objectives.output import LossOutput


class TaskWeights(Config):
    """0 leaves a task out, and what serves no other."""

    mim: float = Field(default=1.0, ge=0, description="Masked patches of an image alone.")
    mlm: float = Field(default=1.0, ge=0, description="Masked words of a text alone.")
    mmm_image: float = Field(default=1.0, ge=0, description="Masked patches of a pair.")
    mmm_text: float = Field(default=1.0, ge=0, description="Masked words of a pair.")
    itm: float = Field(default=1.0, ge=0, description="Whether an image and a text belong together.")
    contrastive: float = Field(default=1.0, ge=0, description="Which image belongs to which text of the global batch.")

    def __getitem__(self, task: Task) -> float:
        weight: float = getattr(self, task)
        return weight

    @property
    def tasks(self) -> frozenset[Task]:
        return frozenset(task for task in Task if self[task])


class MultitaskConfig(Config):
    """The tasks and how they are weighted."""

    kind: Literal["multitask"] = "multitask"
    weights: TaskWeights = TaskWeights()
    hard_negatives: float = Field(
        default=0.5, ge=0, le=1, description="Share of matching's negatives drawn by their similarity to the image; the rest is any text."
    )
    balance: BalanceConfig = BalanceConfig()
    modality_dropout: float = Field(
        default=0.0, ge=0, lt=1, description="Share of pairs of which the fusion sees one side only, the image or the text."
    )

    hallucination: float = Field(
        default=0.0, ge=0, description="Weight of a head that guesses a missing side's feature for the fusion; 0: none."
    )

    @model_validator(mode="after")
    def _has_a_task(self) -> MultitaskConfig:
        if not self.weights.tasks:
            raise ValueError("every weight is 0: there is no task")
        if self.modality_dropout and not {Task.MMM_IMAGE, Task.MMM_TEXT} & self.weights.tasks:
            raise ValueError("modality_dropout hides a side from masked pairs, which mmm_image=0 and mmm_text=0 leave out: set it to 0")
        if self.hallucination and not self.modality_dropout:
            raise ValueError(
                "hallucination stands in for a side that is missing, and modality_dropout=0 leaves none out: set it too, to 0.3 say"
            )
        return self


class MultitaskObjective:
    """The tasks of whatever a step's batch allows."""

    def __init__(self, config: MultitaskConfig, *, around: Around = nullcontext, block_bytes: int = BLOCK_BYTES) -> None:
        """
        Args:
            around: entered for the messages between ranks; for a clock.
            block_bytes: the largest part of a similarity matrix that is held at a time.
        """
        self._config, self._around = config, around
        self._contrastive = partial(contrastive_loss, block_bytes=block_bytes)

    def __call__(self, output: FusedOutput, batch: FusedBatch, counts: Sequence[int]) -> LossOutput:
        shares, measures = self._shares(output, batch)
        assert shares, "the driver lets only sources pass that serve a task"
        pulls = None
        if output.tokens:
            pulls = pulls_of([*shares.values()], output.tokens, batch.whole, around=self._around)
            measures |= pulls.measures([*shares], len(counts)) | self._damp(output, pulls, len(counts))
        terms, weights = self._balanced(output, batch, shares, pulls)
        if output.guessed is not None:
            cosine = output.guessed.mean(dim=1).sum() / sum(counts)
            terms["hallucination"] = self._config.hallucination * (len(output.guessed) / sum(counts) - cosine)
            measures["hallucination/cosine"] = cosine.detach()
        return LossOutput.of(terms, len(counts), measures | {f"weight/{task}": weight / len(counts) for task, weight in weights.items()})

    def _shares(self, output: FusedOutput, batch: FusedBatch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """This rank's share of each task's loss with its set weight, and of its accuracy."""
        sums = {task: _sums(predictions) for task, predictions in output.predictions.items()}
        shares: dict[str, Tensor] = {}
        measures: dict[str, Tensor] = {}
        if sums:
            number = sum_over_ranks(torch.stack([found.number for found in sums.values()]), batch.whole, around=self._around).clamp(min=1)
            for (task, found), whole in zip(sums.items(), number.unbind(), strict=True):
                shares[task.value] = self._config.weights[task] * found.loss / whole
                measures[f"accuracy/{task}"] = found.hits / whole
        if output.image_features is not None:
            shares[Task.CONTRASTIVE.value] = self._config.weights[Task.CONTRASTIVE] * self._contrast(output, batch)
        return shares, measures

    def _damp(self, output: FusedOutput, pulls: Pulls, ranks: int) -> dict[str, Tensor]:
        """Where one tower is pulled harder, its gradient shall be less; by how much."""
        if not self._config.balance.modulation:
            return {}
        factors = damping(pulls.by_tower.sum(dim=0), self._config.balance.modulation).unbind()
        for tokens, factor in zip(output.tokens, factors, strict=True):
            tokens.register_hook(partial(torch.mul, factor.to(tokens.dtype)))
        return {f"gradient_factor/{side}": factor / ranks for side, factor in zip(("image", "text"), factors, strict=True)}

    def _balanced(
        self, output: FusedOutput, batch: FusedBatch, shares: dict[str, Tensor], pulls: Pulls | None
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The terms, and the weights that are learned, if some are."""
        learned = {task.value: parameter for task, parameter in output.balance.items()}
        match self._config.balance.kind:
            case BalanceKind.FIXED:
                return shares, {}
            case BalanceKind.UNCERTAINTY:
                weights = {name: torch.exp(-parameter.detach()) for name, parameter in learned.items()}
                return uncertainty_terms(shares, learned, len(batch.whole.counts)), weights
            case BalanceKind.GRADNORM:
                if pulls is None:  # a step of one task has nothing to balance
                    return {name: share + 0 * learned[name] for name, share in shares.items()}, {}
                return self._by_gradnorm(output, batch, shares, learned, pulls)

    def _by_gradnorm(
        self, output: FusedOutput, batch: FusedBatch, shares: dict[str, Tensor], learned: dict[str, Tensor], pulls: Pulls
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        ranks = len(batch.whole.counts)
        weights = gradnorm_weights([learned[name] for name in shares])
        losses = sum_over_ranks(torch.stack([*shares.values()]).detach(), batch.whole, around=self._around)
        firsts = [self._first_loss(Task(name), output, batch) for name in shares]
        extra = gradnorm_loss(weights, pulls.norms, losses, firsts, self._config.balance.alpha) / ranks
        given = dict(zip(shares, weights.detach().unbind(), strict=True))
        return {name: given[name] * share for name, share in shares.items()} | {"gradnorm": extra}, given

    def _first_loss(self, task: Task, output: FusedOutput, batch: FusedBatch) -> float:
        """What guessing gives."""
        choices = sum(batch.whole.counts) if task is Task.CONTRASTIVE else output.predictions[task].logits.shape[1]
        return self._config.weights[task] * guessing_loss(choices)

    def _contrast(self, output: FusedOutput, batch: FusedBatch) -> Tensor:
        image, text, scale, whole = output.image_features, output.text_features, output.logit_scale, batch.whole
        assert image is not None, "a pair has both"
        assert text is not None, "a pair has both"
        assert scale is not None, "a pair has both"
        both = gather_features(torch.cat([image, text], dim=1), whole.counts, around=self._around)
        all_image, all_text = both.chunk(2, dim=1)
        return self._contrastive(image, text[:, None], all_image, all_text[:, None], scale, whole.first)


class _Sums(NamedTuple):
    """Of one rank's predictions."""

    loss: Float[Tensor, ""]
    hits: Float[Tensor, ""]
    number: Float[Tensor, ""]


def _sums(predictions: Predictions) -> _Sums:
    """In fp32 at least; half precision has too few digits for a sum over thousands of places."""
    logits = predictions.logits.to(torch.promote_types(predictions.logits.dtype, torch.float32))
    losses = functional.cross_entropy(logits, predictions.targets, reduction="none")
    hits = logits.detach().argmax(dim=1) == predictions.targets
    if predictions.counts is None:
        return _Sums(losses.sum(), hits.sum().to(losses.dtype), losses.new_full((), len(losses)))
    counts = predictions.counts
    return _Sums((losses * counts).sum(), (hits & counts).sum().to(losses.dtype), counts.sum().to(losses.dtype))
