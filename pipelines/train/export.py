"""From a run's checkpoints to a bundle."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from mm_core.bundle import BundleManifest, write_bundle
from mm_core.errors import CheckpointError
from mm_core.models.family import build_model
from mm_core.models.tokenizer import load_tokenizer, special_tokens
from mm_core.training.checkpoint import load_weights
from mm_core.training.ema import WeightMean
from pipelines.train.config import TrainRun
from pipelines.train.parts import Model, wrapped
from pipelines.train.run_folder import RunFolder


def export_bundle(folder: RunFolder, metrics: Mapping[str, float]) -> BundleManifest:
    """Write a checkpoint of a run as `bundle` into its folder: the best, where the run says by what, else the newest. `metrics` go into
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
    tokenizer = saved_tokenizer(run, folder)
    model = trained_model(run, folder, step, tokenizer)
    with tempfile.TemporaryDirectory(prefix="mm-bundle-") as temporary:
        manifest = write_bundle(
            Path(temporary) / "bundle",
            model=model.model,
            beside=model.beside,
            tokenizer=tokenizer,
            config=run.model,
            recipe=run.recipe,
            data_fingerprint=record.data_fingerprint,
            metrics=metrics,
            run_id=record.tracking_run_id,
        )
        folder.put(Path(temporary) / "bundle", "bundle")
    return manifest


def trained_model(run: TrainRun, folder: RunFolder, step: int, tokenizer: PreTrainedTokenizerFast | None) -> Model:
    """The model of a checkpoint."""
    model = wrapped(run, build_model(run.model, None if tokenizer is None else special_tokens(tokenizer)))
    load_weights(folder.checkpoints.at(step), model, None if run.ema_decay is None else WeightMean(model, run.ema_decay))
    return model


def saved_tokenizer(run: TrainRun, folder: RunFolder) -> PreTrainedTokenizerFast | None:
    """What a run's texts are read by; None where its model reads none."""
    return load_tokenizer(str(folder.get("tokenizer"))) if run.model.reads_text else None
