"""All that a report says, gathered in two passes over an index and its ledgers, a chunk at a time; only what is shown is read as samples.

Nothing here depends on how the chunks are worked through: counts add up, and draws are by hash.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import numpy as np
from jaxtyping import Int64

from mm_core.data.among import Among
from mm_core.data.index import Index
from mm_core.data.ledger import Ledger, LedgerSummary
from mm_core.data.personal import PersonalKind
from mm_core.errors import DataError
from pipelines.curate.report.draw import KEPT, POINTS
from pipelines.curate.report.histogram import Axis, Histogram
from pipelines.curate.report.maps import EmbeddingMap, check_embeddings, embedding_map
from pipelines.curate.report.pictures import Shown, read_samples
from pipelines.curate.report.tally import Tally
from pipelines.curate.report.view import Column, Question, View, chunks
from pipelines.session import ray_session
from pipelines.tasks import run_tasks

_ALONE_CHUNKS = 32
"""Up to so many this process counts by itself: it takes half a second for each, and Ray ten to start (39 chunks: 18 s, by Ray on two
cores 29 s)."""
MAX_PICTURES = 720
"""Of one report: some 5 MB."""
Progress = Callable[[int], None]
Result = TypeVar("Result")
Match = tuple[str, str, int]
"""A ledger, a reason, and an ordinal of the other index that the reason names."""


@dataclass(frozen=True)
class Findings:
    """What a report shows."""

    index: Index
    question: Question
    """Its `gallery` lowered where there are so many galleries that the file would become too large."""
    summaries: dict[str, LedgerSummary]
    tally: Tally
    histograms: dict[Column, Histogram]
    map: EmbeddingMap | None
    samples: dict[int, Shown]
    """Of the galleries, by ordinal."""
    matches: dict[Match, Shown]
    """What other indexes hold of samples that are dropped for it."""
    captions: dict[int, Shown]
    """Of the map's points, without pictures."""
    mask: tuple[PersonalKind, ...]
    """Personal data that is masked in captions."""


def find(
    question: Question,
    embeddings: str | None,
    on_progress: Progress = lambda rows: None,
    on_step: Callable[[str], None] = lambda step: None,
) -> Findings:
    """
    Args:
        on_step: told what comes after the passes.

    Raises:
        DataError: an index, ledger or scores that are not there, are of another index, or are damaged.
    """
    index = Index.open(question.index)
    summaries = {name: Ledger(index, name).summary() for name in question.ledgers}
    if embeddings:
        check_embeddings(index, embeddings)
    tally = Tally()
    for chunk, part in _each(partial(Tally.of, question), index):
        tally.add(part, question)
        on_progress(_rows(index, chunk))
    histograms = _histograms(index, question, summaries, tally, on_progress)
    mask = _personal(summaries)
    points, gallery = tally.draws.get(POINTS, []), _affordable(tally, question)
    if embeddings:
        on_step(f"laying out {len(points):,} samples by their embeddings")
    found = embedding_map(index, embeddings, points, question.seed) if embeddings else None
    chosen = _chosen(tally, question, found, gallery)
    on_step(f"reading the {len(chosen):,} samples that are shown")
    samples = read_samples(index, chosen, mask)
    matches = _matches(tally, summaries, gallery, mask)
    captions = read_samples(index, [point.ordinal for point in found.points], mask, pictures=False) if found else {}
    question = replace(question, gallery=gallery)
    return Findings(index, question, summaries, tally, histograms, found, samples, matches, captions, mask)


def _each(function: Callable[[int], Result], index: Index) -> Iterator[tuple[int, Result]]:
    """Of every chunk its number and what `function` makes of it, as Ray tasks where there are many."""
    numbers = range(len(chunks(index)))
    if len(numbers) <= _ALONE_CHUNKS:
        yield from ((chunk, function(chunk)) for chunk in numbers)
        return
    with ray_session():
        yield from run_tasks(function, numbers)


def _rows(index: Index, chunk: int) -> int:
    first, last = chunks(index).bounds(chunk)
    return last - first


def _histograms(
    index: Index, question: Question, summaries: dict[str, LedgerSummary], tally: Tally, on_progress: Progress
) -> dict[Column, Histogram]:
    """Of every column with values; of weights only where some are neither 0 nor 1."""
    marks = {column: _marks(summaries, column) for column in tally.spreads}
    axes = {
        column: Axis.of(spread, [value for _, value in marks[column]])
        for column, spread in tally.spreads.items()
        if spread.total and (column[1] != "repeat" or (spread.low, spread.high) != (1, 1))
    }
    counts = {column: np.zeros((len(axis.edges) - 1, 2), dtype=np.int64) for column, axis in axes.items()}
    for chunk, part in _each(partial(_counted, question, axes), index):
        for column, some in part.items():
            counts[column] += some
        on_progress(_rows(index, chunk))
    return {column: Histogram(axis, tally.spreads[column], counts[column], marks[column]) for column, axis in axes.items()}


def _counted(question: Question, axes: dict[Column, Axis], chunk: int) -> dict[Column, Int64[np.ndarray, "bins 2"]]:
    values = View.read(question, chunk).values()
    return {column: axes[column].count(numbers, kept) for column, numbers, kept in values if column in axes}


def _marks(summaries: dict[str, LedgerSummary], column: Column) -> tuple[tuple[str, float], ...]:
    """The thresholds of the rule whose values a column has."""
    ledger, rule = column[0], column[1].removeprefix("value.")
    if not ledger or rule not in summaries[ledger].rules:
        return ()
    given = {key: summaries[ledger].rules[rule].get(key) for key in ("min", "max", "min_score")}
    given["top"] = summaries[ledger].bounds.get(rule)
    return tuple((key, float(value)) for key, value in given.items() if value is not None)


def _personal(summaries: dict[str, LedgerSummary]) -> tuple[PersonalKind, ...]:
    """What any ledger looks for, whether it masks or drops: a report is passed on."""
    rules = [rule for summary in summaries.values() for rule in summary.rules.values() if rule.get("rule") == "personal"]
    named = {kind for rule in rules for kind in rule.get("kinds", ())} | {kind for summary in summaries.values() for kind in summary.mask}
    return tuple(kind for kind in PersonalKind if kind in named)


def _affordable(tally: Tally, question: Question) -> int:
    """Samples of a gallery so that all galleries together are bounded."""
    galleries = sum(kind != POINTS for kind in tally.draws)
    return min(question.gallery, max(1, MAX_PICTURES // max(1, galleries)))


def _chosen(tally: Tally, question: Question, found: EmbeddingMap | None, gallery: int) -> set[int]:
    """Ordinals of all that is shown with its picture."""
    several = len(question.together) > 1 or not question.ledgers
    drawn = {one.ordinal for kind, some in tally.draws.items() if kind != POINTS and (several or kind != KEPT) for one in some[:gallery]}
    groups = [(kept, *copies) for ledger in tally.ledgers.values() for (_, kept), copies in ledger.duplicates.drawn.items()]
    typical = {found.points[n].ordinal for n in found.typical} if found else set()
    return drawn | {ordinal for group in groups for ordinal in group} | typical


def _matches(tally: Tally, summaries: dict[str, LedgerSummary], gallery: int, mask: tuple[PersonalKind, ...]) -> dict[Match, Shown]:
    found: dict[Match, Shown] = {}
    for kind, drawn in tally.draws.items():
        wanted = [one.match for one in drawn[:gallery] if one.match >= 0]
        if wanted:
            _, ledger, reason = kind
            samples = _elsewhere(summaries[ledger].rules.get(reason, {}), wanted, mask)
            found |= {(ledger, reason, ordinal): shown for ordinal, shown in samples.items()}
    return found


def _elsewhere(rule: dict[str, Any], ordinals: list[int], mask: tuple[PersonalKind, ...]) -> dict[int, Shown]:
    """Samples of the index that `rule` names; one that is gone, or another by now, has none to show."""
    if "index" not in rule:
        return {}
    try:
        index = Index.open(rule["index"])
        theirs = Among.of(index, rule.get("ledgers", ())).mask
    except DataError:
        return {}
    return (
        read_samples(index, ordinals, tuple(dict.fromkeys((*mask, *theirs))))
        if index.summary.fingerprint == rule.get("fingerprint")
        else {}
    )
