"""How a run begins or is found again: its folder, its tokenizer, its record and its MLflow run."""

from __future__ import annotations

import tempfile
from datetime import datetime
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from mm_core.errors import CheckpointError, ConfigError
from mm_core.models.tokenizer import train_bpe
from mm_core.revision import code_revision
from pipelines.tracking import FOLDER_TAG, DatasetInput, RunStatus, create_run, end_runs_of, finish_run
from pipelines.train.config import TrainRun
from pipelines.train.preflight import Start, fed_by
from pipelines.train.run_data import RunData
from pipelines.train.run_folder import RunFolder, RunRecord, check_same, newest_run


def claim(run: TrainRun, data: RunData, name: str | None, *, resume: bool, or_resume: bool) -> tuple[RunFolder, RunRecord | None]:
    """The folder of the run, and its record where it is to be continued: with `or_resume` if there is one of that name.

    Without a name a new run gets one of its recipe and the time, and the newest of this configuration and data is continued.

    Raises:
        CheckpointError: there is nothing to continue, or it is of another configuration or data.
        ConfigError: the folder is taken, or `or_resume` without a name.
    """
    if or_resume and name is None:
        raise ConfigError("--or-resume needs --name: by its name the next start finds the run")
    begun = or_resume and RunFolder.of(run.storage, name or "").exists()
    if resume or begun:
        if name is None:
            found = newest_run(run.storage, _identity(run), data.fingerprint)
            if found is None:
                raise CheckpointError(
                    f"no run of {run.recipe} with this configuration and data under {run.storage}:"
                    " name one with --name, or leave out --resume"
                )
            return found, found.read()
        folder = RunFolder.of(run.storage, name)
        record = folder.read()
        check_same(record, _identity(run), data.fingerprint, folder.url)
        return folder, record
    name = name or f"{run.recipe}-{datetime.now():%Y%m%d-%H%M%S}"
    folder = RunFolder.of(run.storage, name)
    _refuse_another(folder)
    if folder.holds_something() and not folder.is_begun():
        raise ConfigError(f"{folder.url} exists and holds no run: give another --name, or remove it first")
    return folder, None


def _refuse_another(folder: RunFolder) -> None:
    if folder.exists():
        raise ConfigError(f"run {folder.url} exists: continue it with --resume, or give another --name")


def _identity(run: TrainRun) -> dict[str, Any]:
    """Without what the tokenizer and the model's sources decide, which is known only once they are there."""
    identity = run.identity()
    identity["model"] = {key: value for key, value in identity["model"].items() if key not in run.model.derived}
    return identity


def begin(run: TrainRun, data: RunData, folder: RunFolder, start: Start | None) -> RunRecord:
    """Make the tokenizer, the run's folder and the tracking run. Where an earlier start was killed before it had, it is made anew.

    Raises:
        ConfigError: another command has begun this run meanwhile.
    """
    tokenizer = _train_tokenizer(run, data) if start is None else start.tokenizer
    run = fed_by(run, tokenizer)
    _refuse_another(folder)  # there may be one since it was claimed
    if folder.is_begun():
        end_runs_of(run.tracking, folder.name, folder.url)
    mark, run_id = folder.begin(), None
    try:
        if tokenizer is not None and folder.is_begun_by(mark):
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
                FOLDER_TAG: folder.url,
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
        if not folder.is_begun_by(mark):
            raise ConfigError(f"another command has begun {folder.url} meanwhile: this one ends, or give it another --name")
        folder.write(record)
    except BaseException:
        if run_id is not None:
            finish_run(run.tracking, run_id, RunStatus.KILLED)
        if folder.is_begun_by(mark):
            folder.remove()
        raise
    return record


def _train_tokenizer(run: TrainRun, data: RunData) -> PreTrainedTokenizerFast:
    captions = data.captions(run.tokenizer.max_captions)
    return train_bpe(captions, vocab_size=run.tokenizer.vocab_size, context_length=run.joint_model.context_length)
