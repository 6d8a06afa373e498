"""What a run may ask of its towers, known before anything is allocated."""

from __future__ import annotations

import pytest

from mm_core.config import resolve
from mm_core.errors import ConfigError
from pipelines.recipes import recipe
from pipelines.train.config import TrainRun
from pipelines.train.towers import check_towers


def run_of(name: str, *settings: str) -> TrainRun:
    return resolve(recipe(name), environment={}, overrides=settings)[0]


def test_pieces_are_refused_where_features_depend_on_the_whole_batch() -> None:
    with pytest.raises(ConfigError, match=r"parallel\.micro_batch_size .*BatchNorm.*parallel\.activation_checkpointing=true"):
        check_towers(run_of("align-tiny", "parallel.micro_batch_size=8"))
    check_towers(run_of("align-tiny", "parallel.micro_batch_size=8", "towers.frozen=vision"))
    check_towers(run_of("clip-tiny", "parallel.micro_batch_size=8"))


def test_patches_are_dropped_where_there_are_some_and_they_are_trained() -> None:
    check_towers(run_of("siglip-tiny", "towers.patch_dropout=0.5"))
    with pytest.raises(ConfigError, match=r"set towers\.patch_dropout=0"):
        check_towers(run_of("align-tiny", "towers.patch_dropout=0.5"))
    with pytest.raises(ConfigError, match="set one of the two"):
        run_of("clip-tiny", "towers.patch_dropout=0.5", "towers.frozen=vision")
