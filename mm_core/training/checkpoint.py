"""Checkpoints: all that an interrupted run needs to go on as if it had not been, on any number of workers.

    .metadata, *.distcp   model, optimiser and mean of the weights (torch.distributed.checkpoint; each rank writes its part)
    metrics.json          what was measured at its step, for choosing the best one
    state.json            step, data cursor, fingerprints, resolved config, code revision, tracking run; written last, so that a
                          folder with it is whole

The random state of a step is drawn from (seed, step, rank) by `seed_step`, so it is restored by the step number.
Reading one runs nothing that is in it (`guarded_read`). Bundles are what travels.
"""

from __future__ import annotations

import json
import warnings
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint import state_dict_loader
from torch.distributed.checkpoint._fsspec_filesystem import FsspecWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_state_dict, set_model_state_dict, set_state_dict
from torch.distributed.checkpoint.storage import StorageWriter

from mm_core.address import is_local
from mm_core.config import Config
from mm_core.data.permutation import mix
from mm_core.errors import CheckpointError
from mm_core.store import open_file, open_store, store_options
from mm_core.training.ema import WeightMean
from mm_core.training.guarded_read import GuardedFsspecReader, GuardedPlanner, GuardedReader

FORMAT = 2
STATE, METRICS = "state.json", "metrics.json"


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
    left_out: tuple[tuple[int, int], ...] = ()
    """Steps [first, last) whose batches a rollback has left out."""
    recent_losses: tuple[float, ...] = ()
    """What a spike of the loss is measured by."""


def whole_state(model: nn.Module, optimizer: torch.optim.Optimizer, mean: WeightMean | None = None) -> dict[str, Any]:
    """All tensors of a run, by name; sharded ones as they are. Not copies."""
    model_state, optimizer_state = get_state_dict(model, optimizer)
    return {"model": model_state, "optimizer": optimizer_state} | _mean_state(mean)


def load_checkpoint(url: str, model: nn.Module, optimizer: torch.optim.Optimizer, mean: WeightMean | None = None) -> None:
    """Restore in place. A collective.

    Raises:
        CheckpointError: the checkpoint is of another model, or damaged.
        Exception: as the store or the process group raised it, which may do better next time.
    """
    state = whole_state(model, optimizer, mean)
    _load(state, url)
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])


def load_weights(url: str, model: nn.Module, mean: WeightMean | None = None) -> None:
    """The weights alone, in one process, for export and evaluation; with `mean` their mean, where there is one.

    Raises:
        CheckpointError: as `load_checkpoint`.
    """
    model_state = get_model_state_dict(model)
    _load({"model": model_state} | _mean_state(mean), url, alone=True)
    set_model_state_dict(model, {**model_state, **(mean.state if mean else {})})


def read_state(url: str) -> CheckpointState:
    """
    Raises:
        CheckpointError: there is no checkpoint in `url`, or its format is another.
    """
    try:
        with open_file(f"{url}/{STATE}", "rt") as file:
            values = json.load(file)
    except (FileNotFoundError, NotADirectoryError, ValueError) as error:
        raise CheckpointError(f"{url} is no checkpoint of mm: {error}") from None
    if values.get("format") != FORMAT:
        raise CheckpointError(f"the checkpoint {url} has format {values.get('format')!r}, this mm reads {FORMAT}")
    return CheckpointState.model_validate(values)


def seed_step(seed: int, step: int, rank: int) -> None:
    """Set torch's random state for one step of one rank, so that a resumed run draws what an undisturbed one does."""
    torch.manual_seed(int(mix(seed, step, rank)))


def checkpoint_writer(url: str) -> StorageWriter:
    """Where `torch.distributed.checkpoint` writes a checkpoint at `url`."""
    return FileSystemWriter(open_store(url)[1]) if is_local(url) else FsspecWriter(url, **store_options(url))


def _reader(url: str) -> GuardedReader | GuardedFsspecReader:
    return GuardedReader(open_store(url)[1]) if is_local(url) else GuardedFsspecReader(url, **store_options(url))


def _mean_state(mean: WeightMean | None) -> dict[str, Any]:
    return {} if mean is None else {"mean": mean.state}


def _load(state: dict[str, Any], url: str, *, alone: bool = False) -> None:
    reader = _reader(url)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # as `alone` says
            state_dict_loader.load(state, storage_reader=reader, planner=GuardedPlanner(), no_dist=alone)
    except CheckpointException as error:  # what each rank met; no Exception
        causes = [reader.unread] if reader.unread else [cause for cause, _ in error.failures.values()]
        if causes and all(isinstance(cause, OSError) and not isinstance(cause, FileNotFoundError) for cause in causes):
            raise OSError(f"the checkpoint {url} could not be read: {cause_of(causes[0])}") from None
        raise CheckpointError(f"the checkpoint {url} is damaged or of another model: {cause_of(error)}") from None


def cause_of(error: BaseException) -> str:
    """One line: what went wrong on one of the ranks."""
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}{': ' if line else ''}{line}"
