"""From a run's configuration to what its loop is made of: the model as it is trained, its objective, and the batches it takes.

The loop knows none of the kinds that there are: a new one is added here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from mm_core.config import Config
from mm_core.data.masking import Masking, uniform
from mm_core.distributed import Around, GlobalBatch
from mm_core.errors import ConfigError
from mm_core.models.dvae import DiscreteVae, DvaeBatch, DvaeConfig
from mm_core.models.family import outline
from mm_core.models.flava import FlavaConfig
from mm_core.models.fused import Fused
from mm_core.models.fused_batch import (
    FusedBatch,
    ImageBatch,
    LabelledBatch,
    MaskedImages,
    MaskedTexts,
    PairBatch,
    Task,
    TextBatch,
)
from mm_core.models.fused_classifier import ClassHead, FusedClassifier
from mm_core.models.hallucination import Hallucination
from mm_core.models.two_tower import ImageTextBatch, TwoTower
from mm_core.objectives.classify import ClassifyConfig, ClassifyObjective
from mm_core.objectives.codebook import CodebookObjective, CodebookObjectiveConfig
from mm_core.objectives.config import ObjectiveConfig
from mm_core.objectives.contrastive import Teaching, build_objective
from mm_core.objectives.multitask import MultitaskConfig, MultitaskObjective
from mm_core.objectives.output import Objective
from mm_core.training.transfer import Transfer
from pipelines.batches import StepBatch
from pipelines.train.config import TrainRun

_NEGATIVE, _SEEN = 7, 8
"""Keep the draws of negatives and of what the fusion sees apart from those of the plan and the reader."""

Model = TwoTower | Fused | DiscreteVae
Inputs = Callable[[StepBatch, Transfer], Any]
"""From what the stream gives of a step to what the model takes, on its device."""

_OBJECTIVES: dict[type[Config], tuple[type[Config], ...]] = {
    FlavaConfig: (MultitaskConfig, ClassifyConfig),
    DvaeConfig: (CodebookObjectiveConfig,),
}
"""By the model's configuration, where it is not that of two towers."""


def wrapped(run: TrainRun, model: PreTrainedModel) -> Model:
    """`model` as the run trains it.

    Raises:
        ConfigError: the run asks for what such a model does not have.
    """
    _check_objective(run)
    whole: Model
    match run.model, run.objective:
        case FlavaConfig() as config, MultitaskConfig() as objective:
            whole = Fused(
                model,
                mean=config.image_mean,
                std=config.image_std,
                tasks=objective.weights.tasks,
                hard_negatives=objective.hard_negatives,
                learns_balance=objective.balance.learns,
                hallucination=Hallucination(model.config) if objective.hallucination else None,
            )
        case FlavaConfig() as config, ClassifyConfig() as objective:
            head = ClassHead(model.config, objective.num_classes, objective.sides)
            whole = FusedClassifier(model, head, mean=config.image_mean, std=config.image_std)
        case DvaeConfig() as config, _:
            whole = DiscreteVae(model, config)
        case config, _:
            whole = TwoTower(model, mean=config.image_mean, std=config.image_std)
    if isinstance(whole, TwoTower):
        _prepare_towers(run, whole)
    else:
        _check_untouched(run)
    if run.faults.spike is not None and whole.trains_in_parts:
        raise ConfigError(
            f"faults.spike compares a step's loss with those before it, and the steps of a {run.model.family} model are of several tasks:"
            " leave it out; faults.not_finite works"
        )
    if run.parallel.compile:
        _compile(whole)
    if run.parallel.activation_checkpointing:
        whole.checkpoint_activations()
    return whole


def _compile(model: Model) -> None:
    if isinstance(model, DiscreteVae):
        raise ConfigError("parallel.compile is of transformer blocks, and a codebook has none: leave it out")
    model.compile_blocks()


def _check_objective(run: TrainRun) -> None:
    wanted = _OBJECTIVES.get(type(run.model), (ObjectiveConfig,))
    if not isinstance(run.objective, wanted):
        raise ConfigError(f"objective.kind={run.objective.kind} is none of a {run.model.family} model: begin with a recipe that has it")


def _prepare_towers(run: TrainRun, towers: TwoTower) -> None:
    if run.towers.frozen is not None:
        towers.freeze(run.towers.frozen)
    if run.towers.patch_dropout:
        towers.drop_patches(run.towers.patch_dropout)
    if run.parallel.micro_batch_size is not None and towers.depends_on_batch:
        raise ConfigError(
            "parallel.micro_batch_size computes a batch in pieces, and this image tower normalises over the whole of it (BatchNorm): pieces"
            " would train another function. Leave it out, and save memory with parallel.activation_checkpointing=true or more workers;"
            " a tower that is not trained, towers.frozen=vision, may be computed in pieces"
        )


def _check_untouched(run: TrainRun) -> None:
    """What is there for two towers only."""
    if run.towers != type(run.towers)():
        raise ConfigError(f"towers.frozen and towers.patch_dropout are for two towers, and this is a {run.model.family} model")
    if run.parallel.micro_batch_size is not None:
        raise ConfigError(
            f"parallel.micro_batch_size computes a batch in pieces, which is there for two towers, and this is a {run.model.family} model:"
            " save memory with parallel.activation_checkpointing=true, parallel.kind=fsdp or more workers"
        )


def check_parts(run: TrainRun) -> None:
    """
    Raises:
        ConfigError: as `wrapped`, and sizes that do not fit one another; nothing is allocated.
    """
    wrapped(run, outline(run.model))
    if run.data.masking is not None and not isinstance(run.objective, MultitaskConfig):
        raise ConfigError(f"data.masking hides what objective.kind=multitask predicts, and this is {run.objective.kind}: leave it at null")
    if isinstance(run.objective, MultitaskConfig | ClassifyConfig) and (run.data.augment.views, run.data.captions) != (1, 1):
        raise ConfigError(
            f"objective.kind={run.objective.kind} is of one view and one text of a sample: leave data.augment.views and data.captions at 1"
        )
    if isinstance(run.objective, ClassifyConfig) and run.evaluation.every_steps is not None:
        raise ConfigError(
            "evaluation.… measures a joint space, which objective.kind=classify does not train: leave evaluation.every_steps at null,"
            " and look at the bundle with mm eval --classify"
        )


def objective_of(run: TrainRun, *, rank: int, teacher: Teaching | None = None, around: Around = nullcontext) -> Objective:
    """`around`: entered for the messages between ranks; for a clock."""
    block_bytes = run.parallel.logit_block_mb << 20
    match run.objective:
        case MultitaskConfig():
            return MultitaskObjective(run.objective, around=around, block_bytes=block_bytes)
        case ClassifyConfig():
            return ClassifyObjective(run.objective)
        case CodebookObjectiveConfig():
            return CodebookObjective(run.objective, around=around)
        case ObjectiveConfig():
            return build_objective(run.objective, rank=rank, teacher=teacher, around=around, block_bytes=block_bytes)


def heldout_objective(run: TrainRun) -> ObjectiveConfig:
    """What held-out features are measured by."""
    return run.objective if isinstance(run.objective, ObjectiveConfig) else ObjectiveConfig()


def masking_of(run: TrainRun, mask_id: int, pad_id: int) -> Masking | None:
    """What read tasks hide of a sample."""
    if run.data.masking is None:
        return None
    assert isinstance(run.model, FlavaConfig), "only its recipes have masks"
    return Masking(run.data.masking, run.model.grid, mask_id=mask_id, pad_id=pad_id, vocab_size=run.model.vocab_size)


def inputs_of(run: TrainRun, counts: Sequence[int], rank: int) -> Inputs:
    """`counts`: samples of each rank in a step."""
    whole = GlobalBatch(tuple(counts), rank)
    match run.objective:
        case MultitaskConfig() as tasks:
            return lambda batch, to_device: _fused_batch(run, tasks, batch, to_device, whole)
        case ClassifyConfig():
            return _labelled
        case CodebookObjectiveConfig() as objective:
            return lambda batch, to_device: _dvae_batch(objective, batch.step / run.steps, batch, to_device, whole)
        case ObjectiveConfig():
            return _pairs


def _pairs(batch: StepBatch, to_device: Transfer) -> ImageTextBatch:
    assert batch.images is not None, "the driver lets only paired sources pass"
    assert batch.input_ids is not None, "the driver lets only paired sources pass"
    return ImageTextBatch(to_device(batch.images), to_device(batch.input_ids).long())


def _labelled(batch: StepBatch, to_device: Transfer) -> LabelledBatch:
    assert batch.labels is not None, "they are read for this objective"
    images = None if batch.images is None else to_device(batch.images[:, 0])
    input_ids = None if batch.input_ids is None else to_device(batch.input_ids[:, 0]).long()
    return LabelledBatch(images, input_ids, to_device(batch.labels))


def _dvae_batch(
    objective: CodebookObjectiveConfig, progress: float, batch: StepBatch, to_device: Transfer, whole: GlobalBatch
) -> DvaeBatch:
    assert batch.images is not None, "the driver lets only sources with images pass"
    images = to_device(batch.images[:, 0])
    return DvaeBatch(images, objective.temperature_at(progress), objective.kl_weight_at(progress), whole)


def _fused_batch(run: TrainRun, objective: MultitaskConfig, batch: StepBatch, to_device: Transfer, whole: GlobalBatch) -> FusedBatch:
    """By what the step's source has. What is masked is counted here, on the host, so that the device need not be asked."""
    masks, seen = batch.masks, None
    assert masks is not None, "the driver hides something of each sample"
    if objective.modality_dropout and batch.images is not None and batch.input_ids is not None:
        draw = uniform(run.seed, _SEEN, batch.positions) / objective.modality_dropout
        seen = np.stack([draw >= 0.5, (draw < 0.5) | (draw >= 1)], axis=1)
    images = texts = None
    if batch.images is not None and masks.patches is not None:
        rows = to_device(np.flatnonzero(masks.patches if seen is None else masks.patches & seen[:, :1]))
        images = MaskedImages(to_device(batch.images[:, 0]), to_device(masks.patches), rows)
    if batch.input_ids is not None and masks.masked_ids is not None and masks.tokens is not None:
        rows = to_device(np.flatnonzero(masks.tokens if seen is None else masks.tokens & seen[:, 1:]))
        texts = MaskedTexts(to_device(batch.input_ids[:, 0]).long(), to_device(masks.masked_ids).long(), rows)
    if images is None:
        assert texts is not None, "a sample has one modality at least"
        return TextBatch(texts, whole)
    if texts is None:
        return ImageBatch(images, whole)
    draws = uniform(run.seed, _NEGATIVE, batch.positions).astype(np.float32)
    probed = objective.balance.probes(batch.step)
    return PairBatch(images, texts, to_device(draws), whole, None if seen is None else to_device(seen), probed)


def needs_of(run: TrainRun) -> frozenset[str]:
    """The modalities that every sample has to have."""
    return run.objective.sides.modalities if isinstance(run.objective, ClassifyConfig) else run.model.needs


def modalities_of(run: TrainRun) -> frozenset[str]:
    """What is read of a sample, where it has it."""
    if isinstance(run.objective, ClassifyConfig):
        return run.objective.sides.modalities
    return frozenset({"image", "text"} if run.model.reads_text else {"image"})


def contrasts(run: TrainRun) -> bool:
    """Whether features of the whole batch are compared."""
    if isinstance(run.objective, MultitaskConfig):
        return Task.CONTRASTIVE in run.objective.weights.tasks
    return isinstance(run.objective, ObjectiveConfig)


def num_classes(run: TrainRun) -> int | None:
    """None of a run that reads no labels."""
    return run.objective.num_classes if isinstance(run.objective, ClassifyConfig) else None


def serves(run: TrainRun, modalities: Sequence[str]) -> bool:
    """Whether a source with these modalities has something to teach."""
    if not isinstance(run.objective, MultitaskConfig):
        return True
    alone = {"image": Task.MIM, "text": Task.MLM}
    tasks = {alone[modalities[0]]} if len(modalities) == 1 else set(Task) - set(alone.values())
    return bool(tasks & run.objective.weights.tasks)
