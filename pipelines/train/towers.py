"""From a run's configuration to the towers that it trains."""

from __future__ import annotations

from transformers import PreTrainedModel

from mm_core.errors import ConfigError
from mm_core.models.family import outline
from mm_core.models.two_tower import TwoTower
from pipelines.train.config import TrainRun


def wrapped(run: TrainRun, model: PreTrainedModel) -> TwoTower:
    """`model` as the run trains it.

    Raises:
        ConfigError: the run asks for what such towers do not have.
    """
    towers = TwoTower(model, mean=run.model.image_mean, std=run.model.image_std)
    if run.towers.frozen is not None:
        towers.freeze(run.towers.frozen)
    if run.towers.patch_dropout:
        towers.drop_patches(run.towers.patch_dropout)
    if run.parallel.compile:
        towers.compile_blocks()
    if run.parallel.activation_checkpointing:
        towers.checkpoint_activations()
    if run.parallel.micro_batch_size is not None and towers.depends_on_batch:
        raise ConfigError(
            "parallel.micro_batch_size computes a batch in pieces, and this image tower normalises over the whole of it (BatchNorm): pieces"
            " would train another function. Leave it out, and save memory with parallel.activation_checkpointing=true or more workers;"
            " a tower that is not trained, towers.frozen=vision, may be computed in pieces"
        )
    return towers


def check_towers(run: TrainRun) -> None:
    """
    Raises:
        ConfigError: as `wrapped`, and sizes that do not fit one another; nothing is allocated.
    """
    wrapped(run, outline(run.model))
