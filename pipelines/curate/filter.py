"""`mm data filter`: rules laid over an index, chunk by chunk, as Ray tasks; each writes its part of a ledger.

A decision depends on the sample, the rules and the scores alone: not on how many tasks there are, nor where they run. Only `top`, which
keeps a share of all, looks at every sample first; its threshold is exact (`mm_core.curation.quantile`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from mm_core.curation.quantile import count, locate, value_at
from mm_core.curation.rows import Rows
from mm_core.curation.rule import Judgement
from mm_core.curation.ruleset import RuleSet, Verdict
from mm_core.curation.score_rules import ScoreRule
from mm_core.data.index import Index
from mm_core.data.ledger import Decided, Ledger, LedgerSummary
from mm_core.data.scan import BATCH_ROWS, usable
from mm_core.data.scores import Scores
from mm_core.errors import ConfigError, DataError
from pipelines.session import ray_session
from pipelines.tasks import run_tasks

Progress = Callable[[int], None]
"""Called with the number of rows judged since the last call."""


@dataclass(frozen=True)
class _Job:
    """What every task needs."""

    index: str
    ledger: str
    rules: RuleSet


def filter_index(
    index: Index, rules: RuleSet, name: str, *, replace_ledger: bool = False, on_progress: Progress = lambda rows: None
) -> LedgerSummary:
    """Write the ledger `name` of `index`. The same rules and scores as those of a ledger that is there give it back as it is.

    Raises:
        ConfigError: a rule that does not fit the index, or another ledger of this name is there and is not to be replaced.
        DataError: scores that a rule reads are not there; the message has the command that makes them.
    """
    rules.check_modalities(index.summary.need, index.url)
    scores = {score: _score_fingerprint(index, score, rule) for score, rule in rules.scores.items()}
    made_by = f"rules {rules.hash}"
    ledger = Ledger(index, name)
    if ledger.exists() and not replace_ledger:
        found = ledger.summary()
        if (found.rule, found.scores) == (made_by, scores):
            return found
        raise ConfigError(
            f"the index at {index.url} has a ledger {name!r} by other rules ({found.rule}): give another --name, or --replace"
        )
    with ray_session():
        bounds = _top_bounds(index, rules)
        job = _Job(index.url, name, _bounded(rules, bounds))
        ledger.remove()
        decided: dict[int, Decided] = {}
        failed = np.zeros(len(rules.rules), dtype=np.int64)
        for chunk, (result, fails) in run_tasks(partial(_decide, job), range(len(ledger.decisions))):
            decided[chunk] = result
            failed += fails
            first, last = ledger.decisions.bounds(chunk)
            on_progress(last - first)
    return ledger.finish(
        [decided[chunk] for chunk in sorted(decided)],
        rule=made_by,
        rules={name: rule.model_dump(mode="json") for name, rule in rules.rules.items()},
        failed=dict(zip(rules.rules, failed.tolist(), strict=True)),
        bounds=bounds,
        scores=scores,
        mask=rules.mask,
    )


def _score_fingerprint(index: Index, score: str, rule: str) -> str:
    try:
        return Scores(index, score).complete().fingerprint
    except DataError as error:
        raise DataError(f"rule {rule!r}: {error}; make them: mm data score {index.url} {score}") from None


def _top_bounds(index: Index, rules: RuleSet) -> dict[str, float]:
    """For each rule that keeps a share of all the least value it keeps."""
    bounds = {}
    for name, rule in rules.rules.items():
        if isinstance(rule, ScoreRule) and rule.top is not None:
            whole = _counted(index, rule, None)
            if not whole.sum():
                raise DataError(f"rule {name!r}: not one sample of {index.url} has a score {rule.scores!r}")
            cell, rest = locate(whole, max(1, round(rule.top * int(whole.sum()))))
            place, _ = locate(_counted(index, rule, cell), rest)
            bounds[name] = value_at(cell, place)
    return bounds


def _counted(index: Index, rule: ScoreRule, cell: int | None) -> NDArray[np.int64]:
    chunks = range(len(Scores(index, rule.scores).values))
    return np.asarray(sum(counts for _, counts in run_tasks(partial(_count, index.url, rule, cell), chunks)))


def _count(url: str, rule: ScoreRule, cell: int | None, chunk: int) -> NDArray[np.int64]:
    values = Scores(_opened(url), rule.scores).values.read(chunk, [rule.column])[rule.column]
    return count(np.asarray(values.to_numpy(), dtype=np.float32), cell)


def _bounded(rules: RuleSet, bounds: dict[str, float]) -> RuleSet:
    given = {name: rule.model_copy(update={"min": bounds[name]}) for name, rule in rules.rules.items() if name in bounds}
    return replace(rules, rules={**rules.rules, **given})


def _decide(job: _Job, chunk: int) -> tuple[Decided, NDArray[np.int64]]:
    """Judge the rows of a chunk and write them. Batches small enough for a processor's cache: larger ones take five times as long."""
    index, rules = _opened(job.index), job.rules
    ledger = Ledger(index, job.ledger)
    first, last = ledger.decisions.bounds(chunk)
    good = usable(index.locators["flags"][first:last], index.summary.need)
    table = index.rows(first, last, rules.columns or ["row"]).filter(pa.array(good))
    scores = {name: Scores(index, name).values.read(chunk).filter(pa.array(good)) for name in rules.scores}
    verdicts = [
        rules.judge(Rows(table.slice(at, BATCH_ROWS), {name: values.slice(at, BATCH_ROWS) for name, values in scores.items()}))
        for at in range(0, table.num_rows, BATCH_ROWS)
    ]
    kept, reasons, more = _columns(rules, verdicts, good)
    failed = np.array([sum(int((~v.judgements[n].keep).sum()) for v in verdicts) for n in range(len(rules.rules))])
    return ledger.write_chunk(chunk, kept, reasons, more), failed


def _columns(rules: RuleSet, verdicts: list[Verdict], good: NDArray[np.bool_]) -> tuple[NDArray[np.float32], pa.Array, dict[str, Any]]:
    """Weights, reasons and the further columns of a chunk, of all its rows."""
    first = np.full(len(good), -1)
    fails = np.zeros(len(good), dtype=np.uint64)
    if verdicts:
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
    return (first < 0).astype(np.float32), reasons, more


def _labels(judgements: list[Judgement], good: NDArray[np.bool_]) -> pa.Array:
    """Rows that were not judged have none."""
    labels = pa.concat_arrays([judgement.labels.cast(pa.string()) for judgement in judgements if judgement.labels is not None])
    places = np.cumsum(good) - 1
    return labels.take(pa.array(places, mask=~good)).dictionary_encode()


@lru_cache(maxsize=4)
def _opened(url: str) -> Index:
    return Index.open(url)
