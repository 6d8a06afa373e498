"""Which model scores which samples: one model all of them, or each fold's samples a model that was not trained on them.

A model finds its own training pairs to fit, wrong ones too. Cross-fitting scores every pair by a model that never saw it: train one model
on each of two ledgers, and score each ledger by the other's model.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mm_core.bundle import Bundle, load_bundle
from mm_core.data.among import Among
from mm_core.data.index import Index
from mm_core.data.ledger import Kept, Ledger, LedgerSummary, compile_kept, kept_fingerprint, ledger_names
from mm_core.data.permutation import U64
from mm_core.errors import ConfigError, DataError
from pipelines.encode import LEFT_OUT, Model, check_sizes

_TOGETHER = 2
"""Ledgers that a run is thought to have read together."""
_SLICE = 1 << 20


@dataclass(frozen=True)
class Fold:
    """Samples, and the model that scores them."""

    ledger: str | None
    """None for every sample of the index."""
    source: str
    """A bundle's folder, a folder in transformers' layout, or a hub id."""

    @classmethod
    def parse(cls, text: str) -> tuple[str, str]:
        """Ledger and model of `LEDGER=MODEL`.

        Raises:
            ConfigError: it is not of this form.
        """
        ledger, separator, model = text.partition("=")
        if not (separator and ledger and model):
            raise ConfigError(f"--fold {text!r} is not of the form LEDGER=MODEL, for example --fold a=runs/trained-on-b/bundle")
        return ledger, model


@dataclass(frozen=True)
class Folds:
    """Opened and checked."""

    index: Index
    models: tuple[Model, ...]
    kept: tuple[Kept, ...]
    """By model, the samples it scores; none where one model scores all."""
    notes: tuple[str, ...]
    """For the person who asked."""
    among: Among
    """Whose samples alone are scored."""

    @classmethod
    def open(cls, index: Index, folds: Sequence[Fold], among: Among) -> Folds:
        """
        Raises:
            ConfigError: folds that share samples or are scored by a model trained on them; models whose images differ in size.
            BundleError, DataError: a model or a ledger that is not there.
        """
        kept = tuple(compile_kept(index, [fold.ledger]) for fold in folds if fold.ledger is not None)
        for (one, ours), (other, theirs) in combinations(zip(folds, kept, strict=False), 2):
            if shared := _shared(ours.ordinals, theirs.ordinals):
                raise ConfigError(
                    f"the ledgers {one.ledger!r} and {other.ledger!r} share {shared:,} samples, and a sample has one fold: make two with"
                    f" `mm data split {index.url} --heldout 0.5 --names a,b`"
                )
        models, notes = list[Model](), list[str]()
        for fold in folds:
            bundle = load_bundle(fold.source)
            models.append(Model.of(fold.source, bundle))
            notes += _unseen(index, fold, bundle, among)
        check_sizes(models)
        return cls(index, tuple(models), kept, tuple(notes), among)

    @property
    def settings(self) -> dict[str, Any]:
        """What scores depend on: the weights, and with folds which samples are scored by which."""
        if not self.kept:
            return {"model": self.models[0].digest}
        return {"folds": sorted([kept.fingerprint, model.digest] for kept, model in zip(self.kept, self.models, strict=True))}

    def models_of(self, first: int, last: int) -> NDArray[np.int8]:
        """The number of the model of rows `first` up to `last`, LEFT_OUT where a row has none."""
        models = np.full(last - first, LEFT_OUT, dtype=np.int8)
        if not self.kept:
            models[:] = 0
        for number, kept in enumerate(self.kept):
            start, end = np.searchsorted(kept.ordinals, np.array([first, last], dtype=np.uint64))
            models[(kept.ordinals[start:end] - np.uint64(first)).astype(np.int64)] = number
        models[~self.among.rows(self.index, first, last)] = LEFT_OUT
        return models


def trained_on(index: Index, data_fingerprint: str) -> tuple[str, ...] | None:
    """The ledgers under which a run read `index`; None where it was another index, several, or ledgers that are there no more."""
    summaries: dict[str, LedgerSummary] = {}
    for name in ledger_names(index):
        with suppress(DataError):
            summaries[name] = Ledger(index, name).summary()
    for count in range(_TOGETHER + 1):
        for names in combinations(summaries, count):
            if kept_fingerprint(index, [summaries[name] for name in names]) == data_fingerprint:
                return names
    return None


def _unseen(index: Index, fold: Fold, bundle: Bundle, among: Among) -> list[str]:
    """What is to be said of a model that may have been trained on the samples it scores.

    Raises:
        ConfigError: it was, and a fold is to be scored by one that was not.
    """
    names = None if bundle.manifest is None else trained_on(index, bundle.manifest.data_fingerprint)
    if names is None:
        return [] if fold.ledger is None else [f"whether {fold.source} was trained on samples of {fold.ledger!r} cannot be known from it"]
    seen = compile_kept(index, names).ordinals
    what = f"ledger {' and '.join(names)}" if names else "all samples"
    if fold.ledger is None:
        shared = _shared(seen, compile_kept(index, among.ledgers).ordinals)
        return [f"{fold.source} was trained on {shared:,} of these samples, and such pairs fit too well: --fold scores each by another"]
    if shared := _shared(seen, compile_kept(index, [fold.ledger]).ordinals):
        raise ConfigError(
            f"--fold {fold.ledger}={fold.source}: this model was trained on {what} of the index, and {shared:,} of those samples are"
            f" in {fold.ledger!r}: give each fold a model that was trained on the others"
        )
    return []


def _shared(ours: U64, theirs: U64) -> int:
    """How many ordinals two kept sets share, a part at a time."""
    shared = 0
    for at in range(0, len(ours), _SLICE):
        part = np.asarray(ours[at : at + _SLICE])
        start, end = np.searchsorted(theirs, part[[0, -1]])
        shared += int(np.isin(part, theirs[start : end + 1], assume_unique=True).sum())
    return shared
