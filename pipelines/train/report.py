"""What a run leaves in MLflow beside its steps: what was replaced, where its time went, its bundle and its plots."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mm_core.console import Console
from mm_core.evaluation.chance import chance
from mm_core.models.dvae import DiscreteVae
from pipelines.metric_log import MetricLog, spool_folder
from pipelines.plots import evaluation_curve, loss_curve, time_bars
from pipelines.tracking import RunStatus, final_metrics, finish_run, log_artifacts, log_metrics, metric_history, run_status
from pipelines.train.config import TrainRun
from pipelines.train.export import trained_model
from pipelines.train.goodput import Goodput
from pipelines.train.outcome import Outcome
from pipelines.train.reconstructions import draw_reconstructions
from pipelines.train.run_data import RunData
from pipelines.train.run_folder import RunFolder
from pipelines.train.run_log import take_back

_EVALUATED = ("retrieval/t2i_r1", "retrieval/i2t_r1", "zeroshot/top1")
_SIZES = ("retrieval/images", "retrieval/texts", "zeroshot/classes")


def log_data(run: TrainRun, run_id: str, outcome: Outcome) -> None:
    """`data/replaced.json`: how many samples of which shard were replaced, and why, since the workers were last started;
    `data/stopped_at.json`: the samples of the batch that a run stopped at."""
    found: dict[str, list[Any]] = {"replaced": [count._asdict() for count in outcome.replaced]}
    if outcome.failed_uids:
        found["stopped_at"] = [*outcome.failed_uids]
    with tempfile.TemporaryDirectory() as temporary:
        for name, rows in found.items():
            Path(temporary, f"{name}.json").write_text(json.dumps(rows, indent=1))
        log_artifacts(run.tracking, run_id, Path(temporary), "data")


def log_goodput(run: TrainRun, folder: RunFolder, run_id: str, console: Console) -> None:
    """Where the wall time of the whole run went: a table here; metrics, `data/goodput.json` and a plot in MLflow."""
    goodput = Goodput.of(folder.read_goodput())
    if not goodput.seconds:
        return
    console.table(("wall time", "s", "share"), [(part, round(s, 1), f"{share:.1%}") for part, s, share in goodput.rows()])
    metrics = goodput.metrics()
    if points := metric_history(run.tracking, run_id, ["mfu"]).get("mfu"):  # on GPUs that there is a data sheet of
        mean = sum(value for _, value in points) / len(points)
        metrics["goodput/mfu"] = goodput.mfu(mean)
        console.note(f"MFU {mean:.1%} while steps were taken, {metrics['goodput/mfu']:.1%} of the whole time")
    log_metrics(run.tracking, run_id, metrics)
    with tempfile.TemporaryDirectory() as temporary:
        Path(temporary, "goodput.json").write_text(json.dumps(goodput.record(), indent=1))
        log_artifacts(run.tracking, run_id, Path(temporary), "data")
    with tempfile.TemporaryDirectory() as temporary:
        log_artifacts(run.tracking, run_id, time_bars(goodput.rows(), Path(temporary) / "goodput.png"), "plots")


def log_results(run: TrainRun, folder: RunFolder, run_id: str, data: RunData, metrics: Mapping[str, float]) -> None:
    """Log the bundle and plots of a finished run; what the store does not take is a warning.

    Raises:
        CheckpointError: the bundle is not there.
    """
    bundle = folder.get("bundle")
    log_artifacts(run.tracking, run_id, bundle, "bundle")
    history = metric_history(run.tracking, run_id, [name for name in metrics if name == "loss" or name.startswith("loss/")])
    with tempfile.TemporaryDirectory() as temporary:
        loss_curve(history, Path(temporary) / "loss.png")
        model = None if run.model.reads_text else trained_model(run, folder, folder.checkpoints.newest() or 0, None)
        if isinstance(model, DiscreteVae):
            draw_reconstructions(model, run.model.image_size, data, Path(temporary) / "reconstructions.png")
        if run.evaluation.every_steps is not None:
            measured = metric_history(run.tracking, run_id, [f"eval/{name}" for name in (*_EVALUATED, *_SIZES)])
            _draw_evaluations({name.removeprefix("eval/"): points for name, points in measured.items()}, Path(temporary) / "evaluation.png")
        log_artifacts(run.tracking, run_id, Path(temporary), "plots")


def complete(run: TrainRun, folder: RunFolder, run_id: str, data: RunData, console: Console) -> dict[str, float]:
    """Log what MLflow lacks of a run that is finished: it was away at the end, or the command was killed before it had told all. Returns
    the last metrics, none where MLflow is away now too."""
    log = MetricLog(run.tracking.uri, run_id, spool_folder())
    take_back(log, folder.url)
    log.close()
    metrics = final_metrics(run.tracking, run_id, "")
    if run_status(run.tracking, run_id) not in (None, RunStatus.FINISHED):
        log_results(run, folder, run_id, data, metrics)
        log_goodput(run, folder, run_id, console)
        finish_run(run.tracking, run_id, RunStatus.FINISHED)
    return metrics


def _draw_evaluations(measured: Mapping[str, Sequence[tuple[int, float]]], path: Path) -> None:
    guesses: dict[str, float] = {}
    for kind in ("retrieval", "zeroshot"):
        last = {name.removeprefix(f"{kind}/"): points[-1][1] for name, points in measured.items() if name.startswith(f"{kind}/")}
        guesses |= {f"{kind}/{name}": value for name, value in chance(last).items()} if last else {}
    evaluation_curve({name: measured[name] for name in _EVALUATED if name in measured}, path, chance=guesses)
