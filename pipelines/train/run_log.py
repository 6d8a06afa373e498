"""Who is told of a run's steps: MLflow, Prometheus and the driver's display, by rank 0; the store, by a rank that stands still."""

from __future__ import annotations

import logging
import posixpath
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING

import ray
import ray.train
import torch.distributed as dist

from mm_core.store import open_store, reaching, write_whole
from mm_core.training.checkpoints import CheckpointFolder, LateMetrics
from mm_core.training.clock import StepClock
from mm_core.training.watchdog import Standstill, Watchdog
from pipelines.exported import RunGauges
from pipelines.metric_log import MetricLog, spool_folder, system_metrics
from pipelines.train.evaluation import evaluation_line

if TYPE_CHECKING:
    from pipelines.train.loop import WorkerTask

logger = logging.getLogger(__name__)
_UNSENT = "unsent.jsonl"


class RunLog:
    """Rank 0's metrics and messages go to MLflow, to Prometheus and to the driver; the other ranks' nowhere."""

    def __init__(self, task: WorkerTask, rank: int) -> None:
        self._task, self._rank = task, rank
        self._stack = ExitStack()
        self._log: MetricLog | None = None
        self._has_kept = False
        self._gauges = RunGauges(posixpath.basename(task.folder))
        self._measured = LateMetrics(CheckpointFolder(task.folder))

    def __enter__(self) -> RunLog:
        if self._rank == 0:
            tracking = self._task.run.tracking
            self._log = MetricLog(tracking.uri, self._task.tracking_run_id, spool_folder())
            self._stack.callback(self._log.close)
            self._has_kept = take_back(self._log, self._task.folder)
            if tracking.system_metrics:
                self._stack.enter_context(system_metrics(self._log, interval_s=tracking.system_metrics_interval_s))
        return self

    def started(self, step: int) -> None:
        """The workers are about to take `step`."""
        if self._log is not None:
            self._log.at(step)
            self._gauges.started(step, self._task.run.steps)
            self._task.board.started.remote(step)

    def metrics(self, step: int, metrics: dict[str, float]) -> None:
        if self._log is not None:
            self._log.log(step, metrics)
            self._gauges.update(step, metrics)
            self._task.board.update.remote(step, metrics)
            self._measured.hand_on()

    def before_checkpoint(self) -> None:
        """What MLflow has not taken yet is kept in the run's folder: with its machine rank 0's own file is lost, and these steps are not
        taken again."""
        if self._log is None:
            return
        url = f"{self._task.folder}/{_UNSENT}"
        try:
            with reaching(url):
                if unsent := self._log.unsent():
                    write_whole(url, unsent)
                elif self._has_kept:
                    fs, path = open_store(url)
                    fs.rm(path)
                self._has_kept = bool(unsent)
        except OSError as error:
            logger.warning("points that MLflow has not taken are on this machine alone: %s", error)

    def evaluated(self, step: int, metrics: dict[str, float]) -> None:
        """What was measured of the model of a step, now or, in the background, later; from any thread. Its checkpoint is told too."""
        if self._log is not None:
            self._log.log(step, metrics)
            self._task.board.say.remote(evaluation_line(step, metrics))
            self._measured.add(step, metrics)

    def say(self, text: str) -> None:
        if self._log is not None:
            self._task.board.say.remote(text)

    def warn(self, text: str) -> None:
        logger.warning(text)
        self.say(text)

    def __exit__(self, *error: object) -> None:
        self._stack.callback(self._measured.hand_on)
        self._stack.close()


def take_back(log: MetricLog, folder: str) -> bool:
    """Send what the run's folder has of points that MLflow had not taken. Whether there are some; they stay there until they are sent."""
    url = f"{folder}/{_UNSENT}"
    with suppress(OSError), reaching(url):
        fs, path = open_store(url)
        if fs.exists(path):
            log.resend(fs.cat_file(path))
            return True
    return False


@contextmanager
def watching(task: WorkerTask, clock: StepClock) -> Iterator[Watchdog]:
    """A rank that stands still writes where into the run's folder, says so to the driver, and ends; Ray Train starts all again."""
    rank = dist.get_rank()

    def tell(found: Standstill) -> None:
        task.board.say.remote(str(found))
        where = f"{task.folder}/standstill/step{found.step:08d}-rank{rank:05d}.txt"
        write_whole(where, f"{found}\n\n{found.stack}".encode())

    watchdog = Watchdog(task.run.faults.step_timeout_s, rank=rank, phase=lambda: clock.phase_now, tell=tell)
    try:
        yield watchdog
    finally:
        watchdog.close()


class Preemption:
    """Whether a node of this run is about to be taken away, as Ray's autoscaler or the cloud announces it. Each notice counts once."""

    def __init__(self, watched: bool) -> None:
        """`watched`: whether anybody looks for notices; the same on all ranks."""
        self._watched = watched
        self._known: set[str] = set()

    def __call__(self) -> bool:
        """A collective where notices are watched for."""
        if not self._watched or (info := ray.train.get_preemption_info()) is None:
            return False
        new = set(info.preempted_node_ids) - self._known
        self._known |= new
        return bool(new)
