"""Starting the workers of a run, on the machines there are, and waiting until they end."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress
from functools import partial
from typing import Any

import pyarrow.fs as pafs
import ray
import ray.train
from ray.train.torch import TorchTrainer

from mm_core.address import is_local
from mm_core.console import Console
from mm_core.errors import ConfigError, MMError, TrainingError
from mm_core.store import open_store
from mm_core.training.precision import Precision
from pipelines.causes import own_error
from pipelines.exported import RunGauges
from pipelines.session import may_grow
from pipelines.train.config import TrainRun
from pipelines.train.following import followed
from pipelines.train.loop import WorkerTask, train_worker
from pipelines.train.losses import ToldLosses
from pipelines.train.outcome import Outcome
from pipelines.train.process_group import ProcessGroupConfig
from pipelines.train.run_folder import RunFolder

_WORKER_MEMORY_BYTES = 256 << 20
_ABORT_S = 15
_TYPE = "accelerator_type:"
_UNPACKED = "/runtime_resources/working_dir_files/"
"""In Ray's temporary folder."""
WITHOUT_FP8 = {"P4", "P100", "K80", "V100", "T4", "A10G", "A100", "A100-40G", "A100-80G"}
"""Ray's names (`ray.util.accelerators`) of NVIDIA's GPUs before Ada."""


def launch(task: WorkerTask, folder: RunFolder, console: Console) -> Outcome:
    """Train until the last step, or until rank 0 reports why it cannot go on (`Outcome.failure`).

    Raises:
        MMError: what stopped a worker and would stop it again.
        TrainingError: Ray gave up.
    """
    run = task.run
    gauges = RunGauges(folder.name)
    gauges.started(folder.checkpoints.newest() or 0, run.steps)  # seen also where workers never come
    gpus = gpus_per_worker(run)
    trainer = _Trainer(
        partial(train_worker, task),  # bound, not as `train_loop_config`, for which Train's controller would load all of this too
        torch_config=ProcessGroupConfig(backend="nccl" if gpus else "gloo"),
        scaling_config=ray.train.ScalingConfig(
            num_workers=run.resources.elastic or run.resources.workers,
            elastic_resize_monitor_interval_s=run.resources.resize_every_s,
            use_gpu=bool(gpus),
            # CPU workers book memory, as Train wants something booked, and no CPU: a booked CPU is lost to the stream, and
            # with all booked it would never start.
            resources_per_worker={"GPU": gpus, "CPU": 1} if gpus else {"CPU": 0, "memory": _WORKER_MEMORY_BYTES},
        ),
        run_config=ray.train.RunConfig(
            name=folder.name,
            **_storage(folder),
            # A worker that is gone must not keep the others from their last checkpoint.
            # How often they may be lost the board decides: Ray would count those of weeks.
            failure_config=ray.train.FailureConfig(max_failures=-1 if run.faults.max_failures else 0, relax_collectives_on_preemption=True),
            callbacks=[ToldLosses(task.board)],
        ),
    )
    workers = run.resources.min_workers or run.resources.workers
    try:
        with console.progress("train", run.steps, "steps") as tracker, followed(task.board, folder, workers, console, tracker):
            result = trainer.fit()
    except KeyboardInterrupt:
        trainer.abort()
        raise
    except Exception as error:
        raise _fatal(task.board) or _explained(error) from error
    if (fatal := _fatal(task.board)) is not None:
        raise fatal
    outcome: Outcome = result.return_value
    gauges.started(outcome.steps, run.steps)  # rank 0's last figure may be lost with its process
    return outcome


def _storage(folder: RunFolder) -> dict[str, Any]:
    """Where Ray Train keeps its own record of a run; checkpoints are mm's (`run_checkpoints`). A remote store is opened through fsspec,
    as all else is: left to itself Ray would take pyarrow's own client, which has settings of its own."""
    if is_local(folder.storage):
        return {"storage_path": folder.storage}
    fs, path = open_store(folder.storage)
    return {"storage_path": path, "storage_filesystem": pafs.PyFileSystem(pafs.FSSpecHandler(fs))}


def _fatal(board: ray.actor.ActorHandle) -> MMError | None:
    """What no restart would mend."""
    try:
        error: MMError | None = ray.get(board.error.remote())
    except ray.exceptions.RayActorError:  # it is gone: the run's own error says more
        return None
    return error


def _explained(error: Exception) -> MMError:
    """One line out of Ray's: our own error where there is one among the causes, else the last line it gives."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return own_error(error) or TrainingError(f"training stopped: {lines[-1] if lines else error!r}")


class _Trainer(TorchTrainer):
    """Leaves Ctrl-C to Python. Ray's own handler ends the process with status 1 and no word, and stays when training is over."""

    _controller: ray.actor.ActorHandle | None = None

    def _register_sigint_handler(self, controller: ray.actor.ActorHandle) -> None:
        self._controller = controller

    def abort(self) -> None:
        """Stop the workers, where there are some."""
        if self._controller is not None:
            with suppress(ray.exceptions.RayError):
                ray.get(self._controller.abort.remote(), timeout=_ABORT_S)


def check_resources(run: TrainRun, console: Console) -> None:
    """A cluster that may grow can be asked for more GPUs than it has now, which is said: Ray Train waits for them.

    Raises:
        ConfigError: this machine has fewer GPUs than the workers ask for, or the cluster fewer than workers and nobody said what to do
            then, or none that compute in the run's precision.
    """
    least = run.resources.min_workers or run.resources.workers
    wanted = (run.resources.gpus_per_worker or 0) * least
    there = ray.cluster_resources().get("GPU", 0)
    if run.resources.gpus_per_worker is None and 0 < there < least:
        _too_few(least, there, console)
    if wanted > there:
        lack = f"{run.resources.workers} workers with {run.resources.gpus_per_worker:g} GPUs each, but the cluster has {there:g}"
        if not may_grow():
            raise ConfigError(f"resources: {lack}")
        console.note(f"{lack}: training waits until nodes with more join it, an autoscaler's or yours")
    if run.precision is Precision.FP8:
        _check_fp8(run)


def _too_few(workers: int, gpus: float, console: Console) -> None:
    """On one machine that is small, processors are taken, and it is said; a cluster has most likely lost a node."""
    if not may_grow():
        console.note(f"{workers} workers train on processors, as there are only {gpus:g} GPUs: --workers {gpus:.0f} takes those")
        return
    raise ConfigError(
        f"{workers} workers, but the cluster has {gpus:g} GPUs now: --workers {gpus:.0f} takes those, resources.gpus_per_worker=1 waits for"
        " more, and 0 trains on processors"
    )


def check_folders(folders: Iterable[tuple[str, str]], console: Console) -> None:
    """Say which of a run's folders, named by what they are, must be shared by the cluster's machines.

    Raises:
        ConfigError: one is in what Ray unpacked for this job, and removes when it is large or the node ends.
    """
    machines = {node["NodeManagerHostname"] for node in ray.nodes() if node["Alive"]}
    local = [f"{name} {address}" for name, address in folders if is_local(address)]
    if lost := [text for text in local if _UNPACKED in text]:
        raise ConfigError(
            f"{', '.join(lost)}: a job's code, and what it keeps beside it, is removed by Ray sooner or later; set absolute paths or URLs"
            " (--set storage=s3://…, --set tracking.uri=http://…)"
        )
    if len(machines) > 1 and local:
        console.note(f"{', '.join(local)}: on all {len(machines)} machines it must be the same folder, or use a URL (s3://…)")


def _check_fp8(run: TrainRun) -> None:
    if not gpus_per_worker(run):
        raise ConfigError("precision=fp8 takes GPUs, from Ada and Hopper on, and the workers have none: set precision=bf16")
    types = {name.removeprefix(_TYPE) for name in ray.cluster_resources() if name.startswith(_TYPE)}
    if types and types <= WITHOUT_FP8:
        raise ConfigError(
            f"precision=fp8, but the cluster's GPUs ({', '.join(sorted(types))}) do not multiply fp8, as those from Ada and Hopper on do:"
            " set precision=bf16"
        )


def gpus_per_worker(run: TrainRun) -> float:
    """As configured, or as the cluster has them now: one that makes its GPU nodes when they are asked for must be told."""
    if run.resources.gpus_per_worker is not None:
        return run.resources.gpus_per_worker
    return 1 if ray.cluster_resources().get("GPU", 0) >= (run.resources.min_workers or run.resources.workers) else 0


def preemption_watched() -> bool:
    """Whether Ray Train looks for nodes that are about to be taken away."""
    return os.environ.get("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "1") != "0"
