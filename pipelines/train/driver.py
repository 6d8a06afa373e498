"""`mm train`: from a resolved config and an index to a trained, tracked bundle. Runs in the driver.

Order: look at everything that can be wrong; take the run's folder and the tracking run; train; export. What fails before the
first step leaves no folder behind.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import ray
from transformers import PreTrainedTokenizerFast

from mm_core.address import absolute
from mm_core.bundle import BundleManifest, write_bundle
from mm_core.console import Console
from mm_core.data.ledger import Source
from mm_core.data.reader import ReadSpec
from mm_core.errors import CheckpointError, ConfigError, MMError, TrainingError
from mm_core.evaluation.chance import chance
from mm_core.models.dvae import DiscreteVae
from mm_core.models.family import build_model, resolved
from mm_core.models.tokenizer import caption_tokenizer, load_tokenizer, special_tokens, train_bpe
from mm_core.revision import code_revision
from mm_core.training.checkpoint import load_weights
from mm_core.training.ema import WeightMean
from pipelines.metric_log import MetricLog, spool_folder
from pipelines.plots import evaluation_curve, loss_curve, time_bars
from pipelines.session import ray_session
from pipelines.shards import check_shards
from pipelines.tracking import (
    DatasetInput,
    RunStatus,
    TrackingConfig,
    continue_run,
    create_run,
    final_metrics,
    finish_run,
    log_artifacts,
    log_metrics,
    metric_history,
)
from pipelines.train.board import start_board
from pipelines.train.config import TrainRun
from pipelines.train.evaluation import EvaluationTask, start_background
from pipelines.train.evaluation_data import ZEROSHOT_INDEX, EvaluationData
from pipelines.train.goodput import Goodput
from pipelines.train.launch import check_resources, gpus_per_worker, launch, preemption_watched
from pipelines.train.loop import WorkerTask
from pipelines.train.outcome import Outcome
from pipelines.train.parts import Model, check_parts, wrapped
from pipelines.train.preflight import Start, check_run, fed_by, masking_for, named_weights, start_of, teacher_of
from pipelines.train.reconstructions import draw_reconstructions
from pipelines.train.run_data import RunData
from pipelines.train.run_folder import RunFolder, RunRecord, check_same, newest_run

_EVALUATED = ("retrieval/t2i_r1", "retrieval/i2t_r1", "zeroshot/top1")
_SIZES = ("retrieval/images", "retrieval/texts", "zeroshot/classes")
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
    run = request.run.model_copy(update={"tracking": request.run.tracking.resolved()})
    check_run(run, data)
    heldout = EvaluationData.open(run, data, console)
    folder, record = _claim(request, run, data)
    start = None
    if record is None:
        run = run.model_copy(update={"model": resolved(run.model)})
        check_parts(run)
        start = start_of(run)
        if start is not None and start.taken is not None:
            console.note(f"--init {run.init}: {start.taken}" if run.init else f"the model's sources: {start.taken}")
    else:
        if request.run.tracking == TrackingConfig():  # nobody named another store than the one it began in
            run = run.model_copy(update={"tracking": TrackingConfig.model_validate(record.config["tracking"])})
        if folder.is_finished(run.steps):
            console.note(f"{folder.url} has taken all of its {run.steps:,} steps: there is nothing to continue")
            return _result(run, folder, record, run.steps, final_metrics(run.tracking, record.tracking_run_id, ""))
    with ray_session():
        return _train(request, run, data, heldout, folder, record, start, console)


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
    check_resources(run)
    resumed = record is not None
    with nullcontext() if heldout is None else heldout.index() as zeroshot_index:
        if record is None:
            record = _begin(run, data, folder, start)
        elif folder.checkpoints.newest() is None:
            console.note(f"{folder.url} has no checkpoint yet: starting from step 0")
        if zeroshot_index is not None:
            folder.put(zeroshot_index, ZEROSHOT_INDEX)
    run = run.model_copy(update={"model": TrainRun.model_validate(record.config).model})  # with what its tokenizer and sources decided
    if resumed:
        continue_run(run.tracking, record.tracking_run_id)
    console.note(f"run {folder.name}   mlflow run {record.tracking_run_id} (experiment {run.tracking.experiment})")

    # 3. Train and export.
    status = RunStatus.FAILED
    try:
        task = _task(request, run, data, folder, record, start)
        if heldout is not None:
            task = replace(task, evaluation=_evaluation(heldout, task, folder, console))
        outcome = launch(task, folder, console)
        _log_data(run, record.tracking_run_id, outcome)
        if outcome.failure:
            raise TrainingError(outcome.failure)
        export_bundle(folder, metrics={name: value for name, value in outcome.metrics.items() if name in _BUNDLE_METRICS})
        _log_results(run, folder, record.tracking_run_id, data, outcome.metrics)
        status = RunStatus.FINISHED
    except KeyboardInterrupt:
        status = RunStatus.KILLED
        console.note(f"stopped; continue with the same command and --resume --name {folder.name}")
        raise
    except MMError:
        if (step := folder.checkpoints.newest()) is not None:
            kept = folder.checkpoints.at(step)
            console.note(f"{kept} is kept: once this is mended, continue with the same command and --resume --name {folder.name}")
        raise
    finally:
        MetricLog(run.tracking.uri, record.tracking_run_id, spool_folder()).close(5)  # what a killed rank 0 on this machine left
        _log_goodput(run, folder, record.tracking_run_id, console)
        finish_run(run.tracking, record.tracking_run_id, status)
    return _result(run, folder, record, outcome.steps, outcome.metrics)


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


def export_bundle(folder: RunFolder, name: str = "bundle", *, metrics: Mapping[str, float] | None = None) -> BundleManifest:
    """Write a checkpoint of a run as a bundle below its folder: the best, where the run says by what, else the newest. `metrics` go into
    its card.

    Raises:
        CheckpointError: the run has no checkpoint, or it does not fit.
    """
    record = folder.read()
    run = TrainRun.model_validate(record.config)
    best = run.checkpoint.best(folder.checkpoints.metrics()) if run.checkpoint.best_metric else None
    step = folder.checkpoints.newest() if best is None else best
    if step is None:
        raise CheckpointError(f"the run {folder.url} has no checkpoint to export yet")
    tokenizer = _saved_tokenizer(run, folder)
    model = _trained(run, folder, step, tokenizer)
    with tempfile.TemporaryDirectory(prefix="mm-bundle-") as temporary:
        manifest = write_bundle(
            Path(temporary) / name,
            model=model.model,
            decoder=model.decoder if isinstance(model, DiscreteVae) else None,
            tokenizer=tokenizer,
            config=run.model,
            recipe=run.recipe,
            data_fingerprint=record.data_fingerprint,
            metrics=metrics or {},
            run_id=record.tracking_run_id,
        )
        folder.put(Path(temporary) / name, name)
    return manifest


def _trained(run: TrainRun, folder: RunFolder, step: int, tokenizer: PreTrainedTokenizerFast | None) -> Model:
    """The model of a checkpoint."""
    model = wrapped(run, build_model(run.model, None if tokenizer is None else special_tokens(tokenizer)))
    load_weights(folder.checkpoints.at(step), model, None if run.mean_decay is None else WeightMean(model, run.mean_decay))
    return model


def _claim(request: TrainRequest, run: TrainRun, data: RunData) -> tuple[RunFolder, RunRecord | None]:
    """The folder of the run, and its record where it is to be continued."""
    if request.or_resume and request.name is None:
        raise ConfigError("--or-resume needs --name: by its name the next start finds the run")
    begun = request.or_resume and RunFolder.of(run.storage, request.name or "").exists()
    if request.resume or begun:
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
    if folder.holds_something():
        raise ConfigError(f"{folder.url} exists and holds no run: give another --name, or remove it first")
    return folder, None


def _identity(run: TrainRun) -> dict[str, Any]:
    """Without what the tokenizer and the model's sources decide, which is known only once they are there."""
    identity = run.identity()
    identity["model"] = {key: value for key, value in identity["model"].items() if key not in run.model.derived}
    return identity


def _begin(run: TrainRun, data: RunData, folder: RunFolder, start: Start | None) -> RunRecord:
    """Make the tokenizer, the run's folder and the tracking run."""
    tokenizer = _train_tokenizer(run, data) if start is None else start.tokenizer
    run = fed_by(run, tokenizer)
    try:
        if tokenizer is not None:
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
    captions = data.captions(run.tokenizer.max_captions)
    return train_bpe(captions, vocab_size=run.tokenizer.vocab_size, context_length=run.joint_model.context_length)


def _saved_tokenizer(run: TrainRun, folder: RunFolder) -> PreTrainedTokenizerFast | None:
    return load_tokenizer(str(folder.get("tokenizer"))) if run.model.reads_text else None


def _task(request: TrainRequest, run: TrainRun, data: RunData, folder: RunFolder, record: RunRecord, start: Start | None) -> WorkerTask:
    tokenizer = _saved_tokenizer(run, folder)
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
        board=start_board(folder.read_goodput()),
        preemption_watched=preemption_watched(),
    )


def _evaluation(heldout: EvaluationData, task: WorkerTask, folder: RunFolder, console: Console) -> EvaluationTask:
    """Where it is to run in the background and there is no room for that, the ranks evaluate."""
    run = task.run
    tokenizer = _saved_tokenizer(run, folder)
    assert tokenizer is not None, "the driver has looked at it"
    spec = heldout.spec(run, tokenizer, folder)
    actor = start_background(spec, run, task.tokens, gpus_per_worker(run)) if run.evaluation.background else None
    if run.evaluation.background and actor is None:
        console.note(
            "evaluation.background: the cluster has no GPU, or without GPUs no processor, beyond the ranks': they evaluate themselves"
        )
    return EvaluationTask(spec, actor)


def _log_data(run: TrainRun, run_id: str, outcome: Outcome) -> None:
    """`data/replaced.json`: how many samples of which shard were replaced, and why, since the workers were last started;
    `data/stopped_at.json`: the samples of the batch that a run stopped at."""
    found: dict[str, list[Any]] = {"replaced": [count._asdict() for count in outcome.replaced]}
    if outcome.failed_uids:
        found["stopped_at"] = [*outcome.failed_uids]
    with tempfile.TemporaryDirectory() as temporary:
        for name, rows in found.items():
            Path(temporary, f"{name}.json").write_text(json.dumps(rows, indent=1))
        log_artifacts(run.tracking, run_id, Path(temporary), "data")


def _log_goodput(run: TrainRun, folder: RunFolder, run_id: str, console: Console) -> None:
    """Where the wall time of the whole run went: a table here; metrics, `data/goodput.json` and a plot in MLflow."""
    goodput = Goodput.of(folder.read_goodput())
    if not goodput.seconds:
        return
    console.table(("wall time", "s", "share"), [(part, round(s, 1), f"{share:.1%}") for part, s, share in goodput.rows()])
    log_metrics(run.tracking, run_id, goodput.metrics())
    with tempfile.TemporaryDirectory() as temporary:
        Path(temporary, "goodput.json").write_text(json.dumps(goodput.record(), indent=1))
        log_artifacts(run.tracking, run_id, Path(temporary), "data")
    with tempfile.TemporaryDirectory() as temporary:
        log_artifacts(run.tracking, run_id, time_bars(goodput.rows(), Path(temporary) / "goodput.png"), "plots")


def _log_results(run: TrainRun, folder: RunFolder, run_id: str, data: RunData, metrics: Mapping[str, float]) -> None:
    bundle = folder.get("bundle")
    log_artifacts(run.tracking, run_id, bundle, "bundle")
    history = metric_history(run.tracking, run_id, [name for name in metrics if name == "loss" or name.startswith("loss/")])
    with tempfile.TemporaryDirectory() as temporary:
        loss_curve(history, Path(temporary) / "loss.png")
        model = None if run.model.reads_text else _trained(run, folder, folder.checkpoints.newest() or 0, None)
        if isinstance(model, DiscreteVae):
            draw_reconstructions(model, run.model.image_size, data, Path(temporary) / "reconstructions.png")
        if run.evaluation.every_steps is not None:
            measured = metric_history(run.tracking, run_id, [f"eval/{name}" for name in (*_EVALUATED, *_SIZES)])
            _draw_evaluations({name.removeprefix("eval/"): points for name, points in measured.items()}, Path(temporary) / "evaluation.png")
        log_artifacts(run.tracking, run_id, Path(temporary), "plots")


def _draw_evaluations(measured: Mapping[str, Sequence[tuple[int, float]]], path: Path) -> None:
    guesses: dict[str, float] = {}
    for kind in ("retrieval", "zeroshot"):
        last = {name.removeprefix(f"{kind}/"): points[-1][1] for name, points in measured.items() if name.startswith(f"{kind}/")}
        guesses |= {f"{kind}/{name}": value for name, value in chance(last).items()} if last else {}
    evaluation_curve({name: measured[name] for name in _EVALUATED if name in measured}, path, chance=guesses)
