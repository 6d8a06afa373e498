"""`mm train`: from a resolved config and an index to a trained, tracked bundle. Runs in the driver.

Order: look at everything that can be wrong; take the run's folder and the tracking run; train; export. What fails before the
first step leaves no folder behind.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs
import ray
import ray.train
from ray.train.torch import TorchConfig, TorchTrainer
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from mm_core.address import absolute, is_local
from mm_core.bundle import BundleManifest, init_from, write_bundle
from mm_core.console import Console, Tracker
from mm_core.data.ledger import Source
from mm_core.data.reader import ReadSpec
from mm_core.errors import CheckpointError, ConfigError, MMError, TrainingError
from mm_core.models.clip import TwoTower, build_clip
from mm_core.models.tokenizer import caption_tokenizer, load_tokenizer, special_tokens, train_bpe
from mm_core.store import open_store
from mm_core.training.checkpoint import load_weights
from pipelines.causes import own_error
from pipelines.metric_log import MetricLog, spool_folder
from pipelines.plots import loss_curve
from pipelines.shards import check_shards
from pipelines.tracking import DatasetInput, RunStatus, continue_run, create_run, finish_run, log_artifacts, metric_history
from pipelines.train.board import start_board
from pipelines.train.config import TrainRun
from pipelines.train.loop import Outcome, WorkerTask, train_worker
from pipelines.train.run_data import RunData
from pipelines.train.run_folder import RunFolder, RunRecord, check_same, newest_run

_WORKER_MEMORY_BYTES = 256 << 20
_ABORT_S = 15
_CURVES = ("loss", "loss/contrastive")


@dataclass(frozen=True)
class TrainRequest:
    """What the command line asks for."""

    run: TrainRun
    sources: tuple[Source, ...]
    """Several are mixed as `data.mix` says."""
    name: str | None = None
    resume: bool = False
    audit: str | None = None


@dataclass(frozen=True)
class TrainResult:
    """The keys of `mm train --json`."""

    run_id: str
    name: str
    steps: int
    samples_seen: int
    samples_per_s: float
    data_wait_fraction: float
    final_loss: float
    checkpoint: str
    bundle: str


def train(request: TrainRequest, console: Console) -> TrainResult:
    """Train, or continue, a run.

    Raises:
        ConfigError, DataError, CheckpointError: before any worker starts.
        TrainingError: the run stopped; its message says how to continue.
    """
    # 1. The data, as it was indexed.
    data = RunData.open(request.sources)
    check_shards(data.indexes)
    data.check_modalities()
    run = request.run.model_copy(update={"tracking": request.run.tracking.resolved()})
    data.plan(run)
    _check_resources(run)

    # 2. The run: a new folder and tracking run, or the ones it began with.
    folder, record = _claim(request, run, data)
    resumed = record is not None
    if record is None:
        record = _begin(request, run, data, folder)
    elif folder.latest_checkpoint() is None:
        console.note(f"{folder.url} has no checkpoint yet: starting from step 0")
    if resumed:
        continue_run(run.tracking, record.tracking_run_id)
    console.note(f"run {folder.name}   mlflow run {record.tracking_run_id} (experiment {run.tracking.experiment})")

    # 3. Train and export.
    status = RunStatus.FAILED
    try:
        outcome = _fit(_task(request, run, data, folder, record), folder, console)
        bundle = _export(run, folder, record, outcome)
        _log_results(run, folder, record.tracking_run_id)
        status = RunStatus.FINISHED
    except KeyboardInterrupt:
        status = RunStatus.KILLED
        console.note(f"stopped; continue with the same command and --resume --name {folder.name}")
        raise
    except MMError:
        if (checkpoint := folder.latest_checkpoint()) is not None:
            console.note(f"{checkpoint} is kept: once this is mended, continue with the same command and --resume --name {folder.name}")
        raise
    finally:
        MetricLog(run.tracking.uri, record.tracking_run_id, spool_folder()).close(5)  # what a killed rank 0 on this machine left
        finish_run(run.tracking, record.tracking_run_id, status)
    return TrainResult(
        run_id=record.tracking_run_id,
        name=folder.name,
        steps=outcome.steps,
        samples_seen=outcome.steps * run.global_batch_size,
        samples_per_s=outcome.metrics.get("samples_per_s", 0.0),
        data_wait_fraction=outcome.metrics.get("time_fraction/data_wait", 0.0),
        final_loss=outcome.metrics.get("loss", float("nan")),
        checkpoint=f"{folder.url}/{folder.latest_checkpoint()}",
        bundle=bundle,
    )


def export_bundle(folder: RunFolder, name: str = "bundle") -> BundleManifest:
    """Write the newest checkpoint of a run as a bundle below its folder.

    Raises:
        CheckpointError: the run has no checkpoint, or it does not fit.
    """
    record = folder.read()
    run = TrainRun.model_validate(record.config)
    checkpoint = folder.latest_checkpoint()
    if checkpoint is None:
        raise CheckpointError(f"the run {folder.url} has no checkpoint to export yet")
    tokenizer = load_tokenizer(str(folder.get("tokenizer")))
    model = TwoTower(build_clip(run.model, special_tokens(tokenizer)), mean=run.model.image_mean, std=run.model.image_std)
    load_weights(folder.get(checkpoint), model)
    with tempfile.TemporaryDirectory(prefix="mm-bundle-") as temporary:
        manifest = write_bundle(
            Path(temporary) / name,
            model=model.clip,
            tokenizer=tokenizer,
            config=run.model,
            recipe=run.recipe,
            data_fingerprint=record.data_fingerprint,
            metrics={},
            run_id=record.tracking_run_id,
        )
        folder.put(Path(temporary) / name, name)
    return manifest


def _claim(request: TrainRequest, run: TrainRun, data: RunData) -> tuple[RunFolder, RunRecord | None]:
    """The folder of the run, and its record where it is to be continued."""
    if request.resume:
        if request.name is None:
            found = newest_run(run.storage, _identity(run), data.fingerprint)
            if found is None:
                raise CheckpointError(
                    f"no run of {run.recipe} with this configuration and data under {run.storage}:"
                    " name one with --name, or leave out --resume"
                )
            return found, found.read()
        folder = RunFolder.of(run.storage, request.name)
        record = folder.read()
        check_same(record, _identity(run), data.fingerprint, folder.url)
        return folder, record
    name = request.name or f"{run.recipe}-{datetime.now():%Y%m%d-%H%M%S}"
    folder = RunFolder.of(run.storage, name)
    if folder.exists():
        raise ConfigError(f"run {folder.url} exists: continue it with --resume, or give another --name")
    return folder, None


def _identity(run: TrainRun) -> dict[str, Any]:
    """Without what the tokenizer decides, which is known only once it is made."""
    identity = run.identity()
    identity["model"].pop("vocab_size")
    return identity


def _begin(request: TrainRequest, run: TrainRun, data: RunData, folder: RunFolder) -> RunRecord:
    """Make the tokenizer, the run's folder and the tracking run."""
    source = run.tokenizer.source or run.init  # the weights of another model belong to its token ids
    tokenizer = load_tokenizer(source) if source else _train_tokenizer(run, data)
    run = run.model_copy(update={"model": run.model.model_copy(update={"vocab_size": len(tokenizer)})})
    _initial_state(run, tokenizer)
    try:
        with tempfile.TemporaryDirectory(prefix="mm-tokenizer-") as local:
            tokenizer.save_pretrained(local)
            folder.put(Path(local), "tokenizer")
        run_id = create_run(
            run.tracking,
            run_name=folder.name,
            params=run.model_dump(mode="json"),
            tags={
                "mm.recipe": run.recipe,
                "mm.data_fingerprint": data.fingerprint,
                "mm.code_revision": code_revision(),
                "mm.folder": folder.url,
            },
            datasets=[
                DatasetInput(Path(index.url).name, index.summary.fingerprint, index.url, len(kept))
                for index, kept in zip(data.indexes, data.kept, strict=True)
            ],
        )
        record = RunRecord(
            identity=_identity(run),
            config=run.model_dump(mode="json"),
            sources=data.sources,
            data_fingerprint=data.fingerprint,
            tracking_run_id=run_id,
        )
        folder.write(record)
    except BaseException:
        folder.remove()
        raise
    return record


def _train_tokenizer(run: TrainRun, data: RunData) -> PreTrainedTokenizerFast:
    return train_bpe(
        data.captions(run.tokenizer.max_captions), vocab_size=run.tokenizer.vocab_size, context_length=run.model.context_length
    )


def _task(request: TrainRequest, run: TrainRun, data: RunData, folder: RunFolder, record: RunRecord) -> WorkerTask:
    tokenizer = load_tokenizer(str(folder.get("tokenizer")))
    run = run.model_copy(update={"model": run.model.model_copy(update={"vocab_size": len(tokenizer)})})
    initial = _initial_state(run, tokenizer)
    spec = ReadSpec(
        sources=data.sources,
        plan=data.plan(run),
        image_size=run.model.image_size,
        augment=run.data.augment,
        tokenizer=caption_tokenizer(tokenizer, run.model.context_length),
        prompt_templates=run.data.prompt_templates,
        max_pixels=run.data.max_pixels,
        gap_bytes=run.data.gap_bytes,
        verify=run.data.verify,
    )
    return WorkerTask(
        run=run,
        spec=spec,
        tokens=special_tokens(tokenizer),
        folder=folder.url,
        audit=request.audit and absolute(request.audit),
        data_fingerprint=data.fingerprint,
        code_revision=code_revision(),
        tracking_run_id=record.tracking_run_id,
        initial_weights=None if initial is None else ray.put(initial),
        board=start_board(),
    )


def _initial_state(run: TrainRun, tokenizer: PreTrainedTokenizerFast) -> dict[str, Tensor] | None:
    """The weights that `--init` names.

    Raises:
        ConfigError, BundleError: sizes or tokenizer that do not fit the model.
    """
    model = build_clip(run.model, special_tokens(tokenizer))
    if run.init is None:
        return None
    init_from(model, run.init, tokenizer=tokenizer)
    state: dict[str, Tensor] = model.state_dict()
    return state


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


def _fit(task: WorkerTask, folder: RunFolder, console: Console) -> Outcome:
    run = task.run
    gpus = _gpus_per_worker(run)
    trainer = _Trainer(
        partial(train_worker, task),  # bound, not as `train_loop_config`, for which Train's controller would load all of this too
        torch_config=TorchConfig(backend="nccl" if gpus else "gloo"),
        scaling_config=ray.train.ScalingConfig(
            num_workers=run.resources.workers,
            use_gpu=bool(gpus),
            # CPU workers book memory, as Train wants something booked, and no CPU: a booked CPU is lost to the stream, and
            # with all booked it would never start.
            resources_per_worker={"GPU": gpus, "CPU": 1} if gpus else {"CPU": 0, "memory": _WORKER_MEMORY_BYTES},
        ),
        run_config=ray.train.RunConfig(
            name=folder.name,
            **_storage(folder),
            failure_config=ray.train.FailureConfig(max_failures=run.resources.max_failures),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=run.checkpoint.keep),
        ),
    )
    try:
        with console.progress("train", run.steps, "steps") as tracker, _shown(task.board, tracker):
            result = trainer.fit()
    except KeyboardInterrupt:
        trainer.abort()
        raise
    except Exception as error:
        raise _explained(error) from error
    if (fatal := ray.get(task.board.error.remote())) is not None:
        raise fatal
    outcome: Outcome = result.return_value
    _log_replaced(task, outcome)
    if outcome.failure:
        raise TrainingError(outcome.failure)
    return outcome


def _storage(folder: RunFolder) -> dict[str, Any]:
    """Where Ray Train keeps checkpoints. A remote store is opened through fsspec, as all else is: left to itself Ray would take pyarrow's
    own client, which has settings of its own."""
    if is_local(folder.storage):
        return {"storage_path": folder.storage}
    fs, path = open_store(folder.storage)
    return {"storage_path": path, "storage_filesystem": pafs.PyFileSystem(pafs.FSSpecHandler(fs))}


@contextmanager
def _shown(board: ray.actor.ActorHandle, tracker: Tracker) -> Iterator[None]:
    """Show the board on the terminal until the block ends."""
    stop = threading.Event()

    def show() -> None:
        while not stop.wait(0.5):
            try:
                state = ray.get(board.progress.remote(), timeout=5)
            except Exception:  # the display must not end a run
                continue
            if state is not None:
                step, metrics = state
                tracker.update(step, _headline(metrics))

    thread = threading.Thread(target=show, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(timeout=10)


def _headline(metrics: dict[str, float]) -> str:
    if not metrics:
        return ""
    return f"loss {metrics['loss']:.3f}  {metrics['samples_per_s']:,.0f} samples/s  data wait {metrics['time_fraction/data_wait']:.0%}"


def _explained(error: Exception) -> MMError:
    """One line out of Ray's: our own error where there is one among the causes, else the last line it gives."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return own_error(error) or TrainingError(f"training stopped: {lines[-1] if lines else error!r}")


def _export(run: TrainRun, folder: RunFolder, record: RunRecord, outcome: Outcome) -> str:
    export_bundle(folder)
    return f"{folder.url}/bundle"


def _log_replaced(task: WorkerTask, outcome: Outcome) -> None:
    """`data/replaced.json`: how many samples of which shard were replaced, and why, since the workers were last started."""
    with tempfile.TemporaryDirectory() as temporary:
        file = Path(temporary) / "replaced.json"
        file.write_text(json.dumps([count._asdict() for count in outcome.replaced], indent=1))
        log_artifacts(task.run.tracking, task.tracking_run_id, file, "data")


def _log_results(run: TrainRun, folder: RunFolder, run_id: str) -> None:
    bundle = folder.get("bundle")
    log_artifacts(run.tracking, run_id, bundle, "bundle")
    history = metric_history(run.tracking, run_id, _CURVES)
    with tempfile.TemporaryDirectory() as temporary:
        log_artifacts(run.tracking, run_id, loss_curve(history, Path(temporary) / "loss.png"), "plots")


def _check_resources(run: TrainRun) -> None:
    wanted = (run.resources.gpus_per_worker or 0) * run.resources.workers
    there = ray.cluster_resources().get("GPU", 0)
    if wanted > there:
        raise ConfigError(
            f"resources: {run.resources.workers} workers with {run.resources.gpus_per_worker} GPUs each, but the cluster has {there:g}"
        )


def _gpus_per_worker(run: TrainRun) -> float:
    if run.resources.gpus_per_worker is not None:
        return run.resources.gpus_per_worker
    return 1 if ray.cluster_resources().get("GPU", 0) >= run.resources.workers else 0


def code_revision() -> str:
    """The commit of the code that runs, `-dirty` where files differ from it; `unknown` outside a checkout."""
    here = Path(__file__).resolve().parent
    try:
        git = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=40"]
        return subprocess.run(git, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"
