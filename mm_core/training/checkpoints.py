"""The checkpoints of one run: written beside training, found again, and thrown away by rule.

URL/checkpoint_00000100/ is the one of step 100. Guarantees: one that is found is whole, since its state.json is written last and removed
first; a kill at any moment leaves the ones before it as they were.
"""

from __future__ import annotations

import json
import logging
import posixpath
import time
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from threading import Lock
from typing import Any

import torch
import torch.distributed as dist
from pydantic import Field
from torch import nn
from torch.distributed.checkpoint import state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from mm_core.config import Config
from mm_core.errors import CheckpointError
from mm_core.ranks import Ranks
from mm_core.store import open_file, open_store, write_whole
from mm_core.training.checkpoint import METRICS, STATE, CheckpointState, cause_of, checkpoint_writer, whole_state
from mm_core.training.ema import WeightMean

logger = logging.getLogger(__name__)
_FAILURES_IN_A_ROW = 2


class BestIs(StrEnum):
    HIGHEST = "highest"
    LOWEST = "lowest"


class Retention(Config):
    """Which checkpoints stay."""

    keep: int = Field(default=2, gt=0, description="The newest so many stay.")
    keep_every_steps: int | None = Field(default=None, gt=0, description="Those at multiples of this stay for good.")
    best_metric: str | None = Field(
        default=None, description="A metric, eval/retrieval/t2i_r5 say: the best checkpoint by it stays, and is the one that is exported."
    )
    best_is: BestIs = Field(default=BestIs.HIGHEST, description="Of best_metric: highest or lowest.")

    def best(self, metrics: Mapping[int, Mapping[str, float]]) -> int | None:
        """The step whose metric is best, the later one of two that are equal; None where none has it."""
        sign = 1 if self.best_is is BestIs.HIGHEST else -1
        measured = [(sign * m[self.best_metric], step) for step, m in metrics.items() if self.best_metric and self.best_metric in m]
        return max(measured)[1] if measured else None

    def kept(self, metrics: Mapping[int, Mapping[str, float]], *, reach_back: int = 0) -> set[int]:
        """Of the checkpoints at the steps of `metrics` those that stay.

        Args:
            reach_back: one at least so many steps older than the newest stays, for going back to.
        """
        steps = sorted(metrics)
        stay = {*steps[-self.keep :], *(step for step in steps if self.keep_every_steps and step % self.keep_every_steps == 0)}
        if (best := self.best(metrics)) is not None:
            stay.add(best)
        if reach_back and (older := [step for step in steps if step <= steps[-1] - reach_back]):
            stay.add(older[-1])
        return stay


@dataclass(frozen=True)
class CheckpointFolder:
    """Where a run's checkpoints are: any fsspec URL."""

    url: str

    def at(self, step: int) -> str:
        return f"{self.url}/checkpoint_{step:08d}"

    def steps(self) -> list[int]:
        """Of the whole ones, oldest first."""
        fs, path = open_store(self.url)
        return sorted(int(posixpath.dirname(file).rpartition("_")[2]) for file in fs.glob(f"{path}/checkpoint_*/{STATE}"))

    def begun(self) -> list[int]:
        """Of all, whole or not."""
        fs, path = open_store(self.url)
        numbers = (posixpath.basename(found.rstrip("/")).rpartition("_")[2] for found in fs.glob(f"{path}/checkpoint_*"))
        return sorted(int(number) for number in numbers if number.isdigit())

    def newest(self) -> int | None:
        return max(self.steps(), default=None)

    def metrics(self) -> dict[int, dict[str, float]]:
        """What was measured at the step of each."""
        return {step: self._metrics(step) for step in self.steps()}

    def _metrics(self, step: int) -> dict[str, float]:
        try:
            with open_file(f"{self.at(step)}/{METRICS}", "rt") as file:
                return {name: float(value) for name, value in json.load(file).items()}
        except (FileNotFoundError, ValueError):
            return {}

    def add_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """What was measured at a step, before its checkpoint is whole or after."""
        write_whole(f"{self.at(step)}/{METRICS}", json.dumps(self._metrics(step) | dict(metrics)).encode())

    def remove(self, step: int) -> None:
        """One, whole or not."""
        fs, path = open_store(self.at(step))
        with suppress(FileNotFoundError):
            fs.rm_file(f"{path}/{STATE}")
        with suppress(FileNotFoundError):
            fs.rm(path, recursive=True)

    def remove_after(self, step: int) -> None:
        """All newer than `step`, the unfinished ones too."""
        for begun in self.begun():
            if begun > step:
                self.remove(begun)


class LateMetrics:
    """What was measured of steps, for their checkpoints, which may still be under way: writing begins by removing what is at a step."""

    def __init__(self, folder: CheckpointFolder) -> None:
        self._folder, self._lock = folder, Lock()
        self._waiting: dict[int, Mapping[str, float]] = {}

    def add(self, step: int, metrics: Mapping[str, float]) -> None:
        """From any thread."""
        with self._lock:
            self._waiting[step] = metrics
        self.hand_on()

    def hand_on(self) -> None:
        """To the checkpoints that are whole by now. To be called from time to time; reads the store only where something waits."""
        with self._lock:
            if not self._waiting:
                return
            steps = self._folder.steps()
            for step in sorted(self._waiting.keys() & {*steps}):
                self._folder.add_metrics(step, self._waiting.pop(step))
            newest = max(steps, default=0)
            self._waiting = {step: metrics for step, metrics in self._waiting.items() if step > newest}  # the rest have none


def _is_of_a_lost_peer(error: BaseException) -> bool:
    """Torch has no other word for it where gloo tells."""
    return type(error) is RuntimeError or isinstance(error, dist.DistError)


class CheckpointWriter:
    """Writes a run's checkpoints: the step waits only until the state is copied to host memory, a thread does the rest.

    One per rank; every method is a collective. At most one checkpoint is under way.
    """

    def __init__(
        self,
        folder: CheckpointFolder,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        mean: WeightMean | None = None,
        *,
        retention: Retention,
        reach_back: int = 0,
    ) -> None:
        """
        Args:
            reach_back: as in `Retention.kept`.
        """
        self._folder, self._model, self._optimizer, self._mean = folder, model, optimizer, mean
        self._retention, self._reach_back = retention, reach_back
        on_gpu = next(model.parameters()).device.type == "cuda"
        self._stager = DefaultStager(StagingOptions(on_gpu, False, False, on_gpu))
        # Messages of its own: those of a thread must not get between those of the step.
        self._group = dist.new_group(backend="gloo") if dist.is_initialized() else None
        self._ranks = Ranks(torch.device("cpu"), self._group, work="a checkpoint")
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._under_way: Future[float] | None = None
        self._failures = 0
        self.write_s = 0.0
        """Seconds that the thread took for the last one."""

    def save(self, state: CheckpointState, metrics: Mapping[str, float], *, wait: bool = False) -> None:
        """Begin to write the state as it is now; with `wait`, until it is there, which is tried twice: there may be no next one.

        Raises:
            CheckpointError: two in a row could not be written.
            RuntimeError: nor could they, since another rank is gone: a new start mends that.
        """
        self.finish()
        staged = self._stager.stage(whole_state(self._model, self._optimizer, self._mean))
        assert isinstance(staged, dict), "the stager was told to copy before it returns"
        self._under_way = self._thread.submit(self._write, staged, state, dict(metrics))
        if wait:
            self.finish()
            if self._failures:
                self._under_way = self._thread.submit(self._write, staged, state, dict(metrics))
                self.finish()

    def finish(self) -> None:
        """Wait for the one that is under way.

        Raises:
            CheckpointError: as `save`.
        """
        if self._under_way is None:
            return
        try:
            self.write_s, self._failures = self._under_way.result(), 0
        except (Exception, CheckpointException) as error:  # CheckpointException, which all ranks get if one does, is no Exception
            self._failures += 1
            said = f"a checkpoint could not be written to {self._folder.url}: {cause_of(error)}"
            if self._failures == _FAILURES_IN_A_ROW:
                if _is_of_a_lost_peer(error):
                    raise
                raise CheckpointError(f"{said}, twice in a row: look at the store") from None
            logger.warning("%s; the one before it stays, and it is tried again", said)
        finally:
            self._under_way = None

    def close(self) -> None:
        """What is under way is given up where it stands, and its process group left to it. No collective."""
        self._thread.shutdown(wait=False, cancel_futures=True)
        if self._group is not None and self._under_way is None:
            dist.destroy_process_group(self._group)

    def _write(self, staged: dict[str, Any], state: CheckpointState, metrics: dict[str, float]) -> float:
        began = time.monotonic()
        self._first_alone(lambda: self._folder.remove(state.step))  # what a killed attempt has left there
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process
            state_dict_saver.save(staged, storage_writer=checkpoint_writer(self._folder.at(state.step)), process_group=self._group)
        self._first_alone(lambda: self._complete(state, metrics))
        return time.monotonic() - began

    def _complete(self, state: CheckpointState, metrics: dict[str, float]) -> None:
        if metrics:
            self._folder.add_metrics(state.step, metrics)
        write_whole(f"{self._folder.at(state.step)}/{STATE}", state.model_dump_json(indent=1).encode())
        try:
            self._prune()
        except Exception as error:  # whatever a store raises; this one is whole
            logger.warning("what is old in %s could not be removed, and is tried again: %s", self._folder.url, cause_of(error))

    def _first_alone(self, act: Callable[[], None]) -> None:
        """Rank 0 acts. If that fails it fails on all ranks: one that gave up alone would be a checkpoint ahead of the others from then on,
        and its part would get in between theirs."""
        error = None
        if self._ranks.rank == 0:
            try:
                act()
            except Exception as caught:  # whatever a store raises
                error = caught
        self._ranks.agree(error)

    def _prune(self) -> None:
        # A small file of each, in a store that may be far away: read only where something is chosen by it.
        measured = self._folder.metrics() if self._retention.best_metric else {step: {} for step in self._folder.steps()}
        kept = self._retention.kept(measured, reach_back=self._reach_back)
        for step in self._folder.begun():
            if step not in kept and step <= max(kept):  # what a kill has left unfinished too
                self._folder.remove(step)
