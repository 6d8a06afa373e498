"""Checkpoints: all that an interrupted run needs to go on as if it had not been, on any number of workers.

    .metadata, *.distcp   model, optimiser and mean of the weights (torch.distributed.checkpoint; each rank writes its part)
    state.json            step, data cursor, fingerprints, resolved config, code revision, tracking run

The random state of a step is drawn from (seed, step, rank) by `seed_step`, so it is restored by the step number.
`.metadata` is unpickled by torch: load checkpoints only from storage you trust. Bundles are what travels.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_state_dict, set_model_state_dict, set_state_dict

from mm_core.config import Config
from mm_core.data.permutation import mix
from mm_core.errors import CheckpointError
from mm_core.training.ema import WeightMean

FORMAT = 1
_STATE = "state.json"


class CheckpointState(Config):
    """state.json."""

    format: int = FORMAT
    step: int
    """Optimiser steps done: the next step to take."""
    chunks_consumed: int
    """The data cursor."""
    plan_fingerprint: str
    data_fingerprint: str
    config: dict[str, Any]
    code_revision: str
    tracking_run_id: str | None = None


def save_checkpoint(
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: CheckpointState,
    *,
    rank: int,
    mean: WeightMean | None = None,
) -> None:
    """Write this rank's part into its own `folder`. A collective: every rank calls it with the same `state`."""
    model_state, optimizer_state = get_state_dict(model, optimizer)
    whole = {"model": model_state, "optimizer": optimizer_state} | _mean_state(mean)
    state_dict_saver.save(whole, checkpoint_id=folder)
    if rank == 0:
        (folder / _STATE).write_text(state.model_dump_json(indent=1), encoding="utf-8")


def load_checkpoint(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, mean: WeightMean | None = None) -> None:
    """Restore in place. A collective.

    Raises:
        CheckpointError: the checkpoint is of another model, or damaged.
    """
    model_state, optimizer_state = get_state_dict(model, optimizer)
    _load({"model": model_state, "optimizer": optimizer_state} | _mean_state(mean), folder)
    set_state_dict(model, optimizer, model_state_dict=model_state, optim_state_dict=optimizer_state)


def load_weights(folder: Path, model: nn.Module, mean: WeightMean | None = None) -> None:
    """The weights alone, in one process, for export and evaluation; with `mean` their mean, where there is one.

    Raises:
        CheckpointError: as `load_checkpoint`.
    """
    model_state = get_model_state_dict(model)
    _load({"model": model_state} | _mean_state(mean), folder, alone=True)
    set_model_state_dict(model, {**model_state, **(mean.state if mean else {})})


def _mean_state(mean: WeightMean | None) -> dict[str, Any]:
    return {} if mean is None else {"mean": mean.state}


def read_state(folder: Path) -> CheckpointState:
    """
    Raises:
        CheckpointError: there is no checkpoint in `folder`, or its format is another.
    """
    try:
        values = json.loads((folder / _STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder} is no checkpoint of mm: {error}") from None
    if values.get("format") != FORMAT:
        raise CheckpointError(f"the checkpoint {folder} has format {values.get('format')!r}, this mm reads {FORMAT}")
    return CheckpointState.model_validate(values)


def seed_step(seed: int, step: int, rank: int) -> None:
    """Set torch's random state for one step of one rank, so that a resumed run draws what an undisturbed one does."""
    torch.manual_seed(int(mix(seed, step, rank)))


def _load(state: dict[str, Any], folder: Path, *, alone: bool = False) -> None:
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # as `alone` says
            state_dict_loader.load(state, checkpoint_id=folder, no_dist=alone)
    except (Exception, CheckpointException) as error:  # CheckpointException, what each rank met, is no Exception
        raise CheckpointError(f"the checkpoint {folder} is damaged or of another model: {_cause(error)}") from None


def _cause(error: BaseException) -> str:
    """One line: what went wrong on one of the ranks."""
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}{': ' if line else ''}{line}"
