"""`mm data filter`: rules laid over an index, chunk by chunk, as Ray tasks; each writes its part of a ledger.

A decision depends on the sample, the rules and the scores alone: not on how many tasks there are, nor where they run. Rules that decide by
counts over the whole index (`CountingRule`: a share of all, a balance) have every row counted in passes of their own first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from mm_core.config import nearest
from mm_core.curation.balance_rules import ConceptRule
from mm_core.curation.concepts import write_concepts
from mm_core.curation.rule import Judgement
from mm_core.curation.ruleset import RuleSet, Verdict
from mm_core.curation.score_rules import ScoreRule, made_by
from mm_core.data.among import Among
from mm_core.data.index import Index
from mm_core.data.ledger import Decided, Ledger, LedgerSummary
from mm_core.data.personal import PersonalKind
from mm_core.data.scores import Scores
from mm_core.errors import ConfigError, DataError
from pipelines.curate.batches import ALL, batches, bounds_of, chunks_of, opened, rows_of
from pipelines.session import ray_session
from pipelines.tasks import run_tasks

Progress = Callable[[int], None]
"""Called with the number of rows counted or judged since the last call: all of the index once, and once for each of `RuleSet.passes`."""


@dataclass(frozen=True)
class _Job:
    """What every task needs."""

    index: str
    ledger: str
    rules: RuleSet
    among: Among


@dataclass(frozen=True)
class _Part:
    """What a chunk came to."""

    decided: Decided
    failed: NDArray[np.int64]
    """Samples by rule."""
    concepts: dict[str, NDArray[np.int64]]
    """Kept samples by concept, of the rules that count some."""


def filter_index(
    index: Index,
    rules: RuleSet,
    name: str,
    *,
    among: Among = ALL,
    replace_ledger: bool = False,
    on_progress: Progress = lambda rows: None,
) -> LedgerSummary:
    """Write the ledger `name` of `index`, of whose samples those are counted and judged that are `among` some; the others keep the reason
    they have there. The same rules and scores as those of a ledger that is there give it back as it is.

    Raises:
        ConfigError: a rule that does not fit the index, or another ledger of this name is there and is not to be replaced.
        DataError: scores that a rule reads are not there; the message has the command that makes them.
    """
    rules.check_modalities(index.summary.need, index.url)
    scores = _score_fingerprints(index, rules)
    decided_by = f"rules {rules.hash}{among}"
    ledger = Ledger(index, name)
    written = {name: rule.model_dump(mode="json") for name, rule in rules.rules.items()}
    tables = {name: rule.tables for name, rule in rules.rules.items() if rule.tables}
    if found := ledger.claim(decided_by, scores, rules=written, tables=tables, among=among.ledgers, replace=replace_ledger):
        return found
    with ray_session():
        settled = rules.settled(partial(_counted, ledger, among, on_progress))
        ledger.remove()
        decided: dict[int, Decided] = {}
        failed = np.zeros(len(rules.rules), dtype=np.int64)
        concepts: dict[str, NDArray[np.int64]] = {}
        for chunk, part in run_tasks(partial(_decide, _Job(index.url, name, settled, among)), chunks_of(index)):
            decided[chunk] = part.decided
            failed += part.failed
            concepts = {name: concepts.get(name, 0) + counts for name, counts in part.concepts.items()}
            on_progress(_size(index, chunk))
    write_concepts(ledger, settled, concepts)
    return ledger.finish(
        [decided[chunk] for chunk in sorted(decided)],
        rule=decided_by,
        rules=written,
        tables=tables,
        failed=dict(zip(rules.rules, failed.tolist(), strict=True)),
        bounds={name: rule.min for name, rule in settled.rules.items() if isinstance(rule, ScoreRule) and rule.top is not None},
        scores=scores,
        mask=tuple(kind for kind in PersonalKind if kind in (*rules.mask, *among.mask)),
    )


def _score_fingerprints(index: Index, rules: RuleSet) -> dict[str, str]:
    """By name, of the scores that rules read; every column they read is there."""
    found = {}
    for name, rule in rules.rules.items():
        if isinstance(rule, ScoreRule):
            scores, column = rule.reads
            try:
                summary = Scores(index, scores).complete(made_by(scores, column))
            except DataError as error:
                raise DataError(f"rule {name!r}: {error}") from None
            if column not in summary.columns:
                raise ConfigError(
                    f"rule {name!r}: the scores {scores!r} of {index.url}, of {summary.kind}, have no column of numbers {column!r}"
                    f"; one is made by: mm data score {index.url} {made_by('NAME', column)}{nearest(column, summary.columns)}"
                )
            found[scores] = summary.fingerprint
    return found


def _counted(ledger: Ledger, among: Among, on_progress: Progress, rules: RuleSet) -> NDArray[np.int64]:
    """What the last of the rules counts over the whole index."""
    total = np.zeros(1, dtype=np.int64)
    for chunk, counts in run_tasks(partial(_count, _Job(ledger.index.url, ledger.name, rules, among)), chunks_of(ledger.index)):
        total = total + counts
        on_progress(_size(ledger.index, chunk))
    return total


def _size(index: Index, chunk: int) -> int:
    first, last = bounds_of(index, chunk)
    return last - first


def _count(job: _Job, chunk: int) -> NDArray[np.int64]:
    index, total = opened(job.index), np.zeros(1, dtype=np.int64)
    for rows in batches(index, chunk, job.rules.columns, job.rules.scores, job.among):
        total = total + job.rules.count(rows)
    return total


def _decide(job: _Job, chunk: int) -> _Part:
    """Judge the rows of a chunk and write them."""
    rules, concepts = job.rules, {name: rule for name, rule in job.rules.rules.items() if isinstance(rule, ConceptRule)}
    index, verdicts = opened(job.index), []
    kept_of = {name: np.zeros(len(rule.concepts), dtype=np.int64) for name, rule in concepts.items()}
    for rows in batches(index, chunk, job.rules.columns, job.rules.scores, job.among):
        verdicts.append(rules.judge(rows))
        for name, rule in concepts.items():
            kept_of[name] += rule.count(rows, verdicts[-1].first < 0)
    repeat, reasons, more = _columns(rules, verdicts, rows_of(index, chunk, job.among))
    if job.among.ledgers:
        reasons = pc.coalesce(job.among.reasons(index, *bounds_of(index, chunk)), reasons)
    failed = np.array([sum(int((~v.judgements[n].keep).sum()) for v in verdicts) for n in range(len(rules.rules))])
    return _Part(Ledger(index, job.ledger).write_chunk(chunk, repeat, reasons, more), failed, kept_of)


def _columns(rules: RuleSet, verdicts: list[Verdict], good: NDArray[np.bool_]) -> tuple[NDArray[np.float32], pa.Array, dict[str, Any]]:
    """Weights, reasons and the further columns of a chunk, of all its rows."""
    first = np.full(len(good), -1)
    fails = np.zeros(len(good), dtype=np.uint64)
    repeat = np.zeros(len(good), dtype=np.float32)
    if verdicts:
        repeat[good] = np.concatenate([verdict.weights for verdict in verdicts])
        first[good] = np.concatenate([verdict.first for verdict in verdicts])
        fails[good] = np.concatenate([verdict.fails for verdict in verdicts])
    reasons = pa.array(list(rules.rules)).take(pa.array(first, mask=first < 0))
    more: dict[str, Any] = {"fails": fails}
    for number, name in enumerate(rules.rules):
        judgements = [verdict.judgements[number] for verdict in verdicts]
        values = np.full(len(good), np.nan, dtype=np.float32)
        if judgements:
            values[good] = np.concatenate([judgement.values for judgement in judgements])
        more[f"value.{name}"] = pa.array(values, from_pandas=True)
        if judgements and judgements[0].labels is not None:
            more[f"label.{name}"] = _labels(judgements, good)
    return repeat, reasons, more


def _labels(judgements: list[Judgement], good: NDArray[np.bool_]) -> pa.Array:
    """Rows that were not judged have none."""
    labels = pa.concat_arrays([judgement.labels.cast(pa.string()) for judgement in judgements if judgement.labels is not None])
    places = np.cumsum(good) - 1
    return labels.take(pa.array(places, mask=~good)).dictionary_encode()
