"""`mm train`: from a resolved config and an index to a trained, tracked bundle. Runs in the driver.

Order: look at everything that can be wrong; take the run's folder and the tracking run; train; export. What fails before the
first step leaves no folder behind.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace

import ray

from mm_core.address import absolute
from mm_core.console import Console
from mm_core.data.ledger import Source
from mm_core.data.reader import ReadSpec
from mm_core.errors import MMError, TrainingError
from mm_core.models.tokenizer import caption_tokenizer, special_tokens
from mm_core.revision import code_revision
from pipelines.metric_log import MetricLog, spool_folder
from pipelines.session import ray_session
from pipelines.shards import check_shards
from pipelines.tracking import (
    RunStatus,
    TrackingConfig,
    continue_run,
    finish_run,
    sqlite_file,
)
from pipelines.train.begin import begin, claim
from pipelines.train.board import start_board
from pipelines.train.config import TrainRun
from pipelines.train.evaluation import EvaluationTask, start_background
from pipelines.train.evaluation_data import ZEROSHOT_INDEX, EvaluationData
from pipelines.train.export import export_bundle, saved_tokenizer
from pipelines.train.launch import check_folders, check_resources, gpus_per_worker, launch, preemption_watched
from pipelines.train.loop import WorkerTask
from pipelines.train.parts import check_parts, modalities_of, num_classes
from pipelines.train.preflight import Start, check_run, masking_for, named_weights, start_of, teacher_of, with_codebook, with_sources
from pipelines.train.report import complete, log_data, log_goodput, log_results
from pipelines.train.run_data import RunData
from pipelines.train.run_folder import RunFolder, RunRecord

_BUNDLE_METRICS = ("loss", "logit_scale")


@dataclass(frozen=True)
class TrainRequest:
    """What the command line asks for."""

    run: TrainRun
    sources: tuple[Source, ...]
    """Several are mixed as `data.mix` says."""
    name: str | None = None
    resume: bool = False
    or_resume: bool = False
    """Continue the run called `name` if there is one, else start it."""
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
    # 1. What can be wrong before Ray is there.
    data = RunData.open(request.sources)
    run = with_codebook(request.run)
    run = run.model_copy(update={"tracking": run.tracking.resolved()})
    check_run(run, data)
    heldout = EvaluationData.open(run, data, console)
    folder, record = claim(run, data, request.name, resume=request.resume, or_resume=request.or_resume)
    start = None
    if record is None:
        run = with_sources(run)
        check_parts(run)
        start = start_of(run)
        if start is not None and start.taken is not None:
            console.note(f"--init {run.init}:\n{start.taken}" if run.init else f"the model's sources:\n{start.taken}")
    else:
        if request.run.tracking == TrackingConfig():  # nobody named another store than the one it began in
            run = run.model_copy(update={"tracking": TrackingConfig.model_validate(record.config["tracking"])})
        check_parts(_begun(run, record))
        if folder.is_finished(run.steps):
            console.note(f"{folder.url} has taken all of its {run.steps:,} steps: there is nothing to continue")
            return _result(run, folder, record, run.steps, complete(_begun(run, record), folder, record.tracking_run_id, data, console))
    with ray_session():
        return _train(request, run, data, heldout, folder, record, start, console)


def _begun(run: TrainRun, record: RunRecord) -> TrainRun:
    """With what its tokenizer and sources decided about the model when it began."""
    return run.model_copy(update={"model": TrainRun.model_validate(record.config).model})


def _train(
    request: TrainRequest,
    run: TrainRun,
    data: RunData,
    heldout: EvaluationData | None,
    folder: RunFolder,
    record: RunRecord | None,
    start: Start | None,
    console: Console,
) -> TrainResult:
    # 2. The data as it was indexed, a cluster that is large enough; then a new folder and tracking run, or the ones it began with.
    check_shards(data.indexes)
    check_resources(run, console)
    audit = [("audit", absolute(request.audit))] if request.audit else []
    database = sqlite_file(run.tracking.uri)
    tracking = [("tracking.uri", str(database))] if database else []
    check_folders([("storage", folder.storage), *(("index", index.url) for index in data.indexes), *audit, *tracking], console)
    resumed = record is not None
    with nullcontext() if heldout is None else heldout.index() as zeroshot_index:
        if record is None:
            record = begin(run, data, folder, start)
        elif folder.checkpoints.newest() is None:
            console.note(f"{folder.url} has no checkpoint yet: starting from step 0")
        if zeroshot_index is not None:
            folder.put(zeroshot_index, ZEROSHOT_INDEX)
    run = _begun(run, record)
    if resumed:
        continue_run(run.tracking, record.tracking_run_id)
    console.note(f"run {folder.name}   mlflow run {record.tracking_run_id} (experiment {run.tracking.experiment})")

    # 3. Train and export.
    status: RunStatus | None = RunStatus.FAILED
    try:
        task = _task(request, run, data, folder, record, start)
        if heldout is not None:
            task = replace(task, evaluation=_evaluation(heldout, task, folder, console))
        outcome = launch(task, folder, console)
        if outcome.taken_over:
            status = None
        else:
            log_data(run, record.tracking_run_id, outcome)
        if outcome.failure:
            raise TrainingError(outcome.failure)
        best = run.checkpoint.best_metric
        if best and run.checkpoint.best(folder.checkpoints.metrics()) is None:
            console.note(f"no checkpoint has checkpoint.best_metric={best}: the newest is exported")
        export_bundle(folder, {name: value for name, value in outcome.metrics.items() if name in _BUNDLE_METRICS})
        log_results(run, folder, record.tracking_run_id, data, outcome.metrics)
        status = RunStatus.FINISHED
    except KeyboardInterrupt:
        status = RunStatus.KILLED
        console.note(f"stopped; continue with the same command and --resume --name {folder.name}{_from(folder)}")
        raise
    except MMError:
        if status is not None and (step := folder.checkpoints.newest()) is not None:
            kept = folder.checkpoints.at(step)
            console.note(f"{kept} is kept: once this is mended, continue with the same command and --resume --name {folder.name}")
        raise
    finally:
        delivered = MetricLog(run.tracking.uri, record.tracking_run_id, spool_folder()).close(5)  # what rank 0 on this machine left
        if status is not None:
            log_goodput(run, folder, record.tracking_run_id, console)
            finished = finish_run(run.tracking, record.tracking_run_id, status)
            if status is RunStatus.FINISHED and not (delivered and finished):
                console.note(f"MLflow lacks some of it: the same command with --resume --name {folder.name} tells it that")
    return _result(run, folder, record, outcome.steps, outcome.metrics)


def _from(folder: RunFolder) -> str:
    try:
        step = folder.checkpoints.newest()
    except OSError:  # the store is away
        return ""
    return ", from step 0: it has no checkpoint yet" if step is None else f", from its last checkpoint, of step {step:,}"


def _result(run: TrainRun, folder: RunFolder, record: RunRecord, steps: int, metrics: Mapping[str, float]) -> TrainResult:
    """`metrics`: the last that were logged; what is not among them is NaN."""
    return TrainResult(
        run_id=record.tracking_run_id,
        name=folder.name,
        steps=steps,
        samples_seen=steps * run.global_batch_size,
        samples_per_s=metrics.get("samples_per_s", math.nan),
        data_wait_fraction=metrics.get("time_fraction/data_wait", math.nan),
        final_loss=metrics.get("loss", math.nan),
        checkpoint=folder.checkpoints.at(steps),
        bundle=f"{folder.url}/bundle",
    )


def _task(request: TrainRequest, run: TrainRun, data: RunData, folder: RunFolder, record: RunRecord, start: Start | None) -> WorkerTask:
    tokenizer = saved_tokenizer(run, folder)
    initial = None if start is None else start.weights
    if start is None and folder.checkpoints.newest() is None:
        initial, _ = named_weights(run, tokenizer)
    teacher = teacher_of(run, tokenizer)
    spec = ReadSpec(
        sources=data.sources,
        plan=data.plan(run),
        image_size=run.model.image_size,
        augment=run.data.augment,
        tokenizer=None if tokenizer is None else caption_tokenizer(tokenizer, run.joint_model.context_length),
        captions=run.data.captions,
        masking=None if tokenizer is None else masking_for(run, tokenizer),
        labels=num_classes(run) is not None,
        modalities=modalities_of(run),
        prompt_templates=run.data.prompt_templates,
        max_pixels=run.data.max_pixels,
        gap_bytes=run.data.gap_bytes,
        verify=run.data.verify,
    )
    return WorkerTask(
        run=run,
        spec=spec,
        tokens=None if tokenizer is None else special_tokens(tokenizer),
        folder=folder.url,
        audit=request.audit and absolute(request.audit),
        data_fingerprint=data.fingerprint,
        code_revision=code_revision(),
        tracking_run_id=record.tracking_run_id,
        initial_weights=None if initial is None else ray.put(initial),
        teacher=None if teacher is None else ray.put(teacher),
        board=start_board(folder.read_goodput(), run.faults.max_failures),
        preemption_watched=preemption_watched(),
    )


def _evaluation(heldout: EvaluationData, task: WorkerTask, folder: RunFolder, console: Console) -> EvaluationTask:
    """Where it is to run in the background and there is no room for that, the ranks evaluate."""
    run = task.run
    tokenizer = saved_tokenizer(run, folder)
    assert tokenizer is not None, "the driver has looked at it"
    spec = heldout.spec(run, tokenizer, folder)
    actor = start_background(spec, run, task.tokens, gpus_per_worker(run)) if run.evaluation.background else None
    if run.evaluation.background and actor is None:
        console.note(
            "evaluation.background: the cluster has no GPU, or without GPUs no processor, beyond the ranks': they evaluate themselves"
        )
    return EvaluationTask(spec, actor)
