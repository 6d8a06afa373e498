"""The held-out data that a run is measured on, opened and looked at before any worker starts."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerFast

from mm_core.address import absolute
from mm_core.console import Console
from mm_core.data.index import Index
from mm_core.data.labels import check_labels
from mm_core.data.ledger import Source, compile_kept
from mm_core.errors import ConfigError, DataError
from mm_core.evaluation.evaluator import EvaluationSpec, ZeroShot
from mm_core.models.tokenizer import caption_tokenizer
from pipelines.evaluate import check_need, classes_of, shards_of
from pipelines.index import build_index
from pipelines.shards import expand_shards
from pipelines.train.config import TrainRun
from pipelines.train.parts import heldout_objective
from pipelines.train.run_data import RunData
from pipelines.train.run_folder import RunFolder

ZEROSHOT_INDEX = "zeroshot_index"
"""Below the run's folder, where every worker finds it."""


@dataclass(frozen=True)
class EvaluationData:
    """What `evaluation.…` names."""

    retrieval: Source | None
    zeroshot: str | None
    """A folder in CLIP_benchmark's layout."""

    @classmethod
    def open(cls, run: TrainRun, data: RunData, console: Console) -> EvaluationData | None:
        """None where nothing is to be measured. Samples that are trained on too are noted on the console.

        Raises:
            ConfigError, DataError: data that is not there, or not of a kind that can be measured; the key is named.
        """
        config = run.evaluation
        if config.every_steps is None:
            return None
        retrieval = None if config.retrieval is None else _open_pairs(config.retrieval, data, console)
        if config.zeroshot is not None:
            try:
                classes_of(config.zeroshot)
                expand_shards([shards_of(config.zeroshot)])
            except DataError as error:
                raise DataError(f"evaluation.zeroshot: {error}") from None
        return cls(retrieval, config.zeroshot and absolute(config.zeroshot))

    @contextmanager
    def index(self) -> Iterator[Path | None]:
        """The zero-shot samples' index, in a folder that goes when the block ends. Needs Ray.

        Raises:
            DataError: samples without a class, or of one that `classnames.txt` has not.
        """
        if self.zeroshot is None:
            yield None
            return
        with tempfile.TemporaryDirectory(prefix="mm-zeroshot-") as folder:
            index = Path(folder) / ZEROSHOT_INDEX
            try:
                built = build_index([shards_of(self.zeroshot)], str(index), need=("image",))
                check_labels(built, compile_kept(built).ordinals, name=self.zeroshot)
            except DataError as error:
                raise DataError(f"evaluation.zeroshot: {error}") from None
            yield index

    def spec(self, run: TrainRun, tokenizer: PreTrainedTokenizerFast, folder: RunFolder) -> EvaluationSpec:
        """What ranks are told, once what `index()` made is in the run's folder."""
        zeroshot = None
        if self.zeroshot is not None:
            names, templates = classes_of(self.zeroshot)
            zeroshot = ZeroShot(Source(index=f"{folder.url}/{ZEROSHOT_INDEX}"), tuple(names), tuple(templates))
        return EvaluationSpec(
            retrieval=self.retrieval,
            zeroshot=zeroshot,
            max_samples=run.evaluation.max_samples,
            tokenizer=caption_tokenizer(tokenizer, run.joint_model.context_length),
            image_size=run.model.image_size,
            objective=heldout_objective(run),
            batch_size=run.global_batch_size,
        )


def _open_pairs(named: str, data: RunData, console: Console) -> Source:
    source = Source.parse(named)
    try:
        index = Index.open(source.index)
        check_need(index, ("image", "text"))
        kept = compile_kept(index, source.ledgers).ordinals
    except DataError as error:
        raise DataError(f"evaluation.retrieval: {error}") from None
    if not len(kept):
        raise ConfigError(f"evaluation.retrieval: nothing of {index.url} is kept by {', '.join(source.ledgers) or 'the index'}")
    for trained, chosen in zip(data.indexes, data.kept, strict=True):
        if trained.summary.fingerprint == index.summary.fingerprint and (both := len(np.intersect1d(kept, chosen.ordinals))):
            console.note(
                f"evaluation.retrieval: {both:,} of its {len(kept):,} samples are trained on too, so its figures are no held-out ones:"
                " `mm data split` makes a ledger for each"
            )
    return Source(index=index.url, ledgers=source.ledgers)
