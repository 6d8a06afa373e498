"""`mm data groups`: groups of samples counted before and after ledgers, as Ray tasks over the index's chunks, whose counts add up.

LEDGER/groups.json holds the result (`mm_core.curation.fairness.GroupReport`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from mm_core.curation.fairness import Fates, GroupReport, count_groups, report_groups
from mm_core.curation.groups import GroupTerms, groups_of
from mm_core.curation.text_file import TextFile
from mm_core.data.index import Index
from mm_core.data.ledger import Ledger, LedgerSummary
from mm_core.errors import ConfigError
from mm_core.store import reaching, write_whole
from pipelines.curate.batches import ALL, batches, bounds_of, chunks_of, opened, rows_of
from pipelines.session import ray_session
from pipelines.tasks import run_tasks

Progress = Callable[[int], None]
"""Called with the number of rows counted since the last call."""


@dataclass(frozen=True)
class _Job:
    """What every task needs."""

    index: str
    terms: TextFile
    ledgers: dict[str, int]
    """How many rules each has."""


def report_index(
    index: Index, terms: TextFile, ledgers: Sequence[str] = (), *, max_difference: float = 0.05, on_progress: Progress = lambda rows: None
) -> list[GroupReport]:
    """A report for each ledger, which is written beside it; of several one more, of what all of them keep; without any one of the index.

    Raises:
        ConfigError: the terms are not valid, or the samples need not have captions.
        DataError: no such ledger, or it is of another index.
    """
    given = GroupTerms.parse(terms)
    if "text" not in index.summary.need:
        raise ConfigError(f"groups are told by captions, and the samples of {index.url} need not have any")
    summaries = {name: Ledger(index, name).summary() for name in dict.fromkeys(ledgers)}
    job = _Job(index.url, terms, {name: len(summary.rules) for name, summary in summaries.items()})
    total = np.zeros(1, dtype=np.int64)
    with ray_session():
        for chunk, counts in run_tasks(partial(_count, job), chunks_of(index)):
            total = total + counts
            first, last = bounds_of(index, chunk)
            on_progress(last - first)
    reports, at = [], 0
    for name, rules, fingerprint in _columns(summaries):
        columns = total[:, at : at + 3 + len(rules)]
        at += columns.shape[1]
        facts = {"ledger": name, "ledger_fingerprint": fingerprint, "terms": terms.digest}
        reports.append(report_groups(given, columns, rules, max_difference, facts))
    for report in reports:
        if report.ledger is not None:
            url = Ledger(index, report.ledger).url
            with reaching(url):
                write_whole(f"{url}/groups.json", report.model_dump_json(indent=1).encode())
    return reports


def _columns(summaries: dict[str, LedgerSummary]) -> list[tuple[str | None, list[str], str | None]]:
    """Of what `_count` counts: ledger, rules and fingerprint."""
    each: list[tuple[str | None, list[str], str | None]] = [(name, list(s.rules), s.fingerprint) for name, s in summaries.items()]
    return each if len(each) == 1 else [*each, (None, [], None)]


def _count(job: _Job, chunk: int) -> NDArray[np.int64]:
    index, groups = opened(job.index), groups_of(job.terms)
    good = pa.array(rows_of(index, chunk, ALL))
    fates = [_fates(Ledger(index, name), rules, chunk, good) for name, rules in job.ledgers.items()]
    if len(fates) != 1:
        together = np.prod([each.repeat for each in fates], axis=0) if fates else np.ones(pc.sum(good).as_py() or 0)
        fates.append(Fates(together, np.zeros(len(together), dtype=np.uint64), 0))
    total, at = np.zeros(1, dtype=np.int64), 0
    for rows in batches(index, chunk, ["captions"]):
        part = slice(at, at + len(rows))
        total = total + count_groups(groups, rows, [Fates(each.repeat[part], each.fails[part], each.rules) for each in fates])
        at += len(rows)
    return total


def _fates(ledger: Ledger, rules: int, chunk: int, good: pa.BooleanArray) -> Fates:
    table = ledger.decisions.read(chunk, ["repeat", "fails"] if rules else ["repeat"]).filter(good)
    fails = table["fails"].to_numpy() if rules else np.zeros(len(table), dtype=np.uint64)
    return Fates(table["repeat"].to_numpy(), fails, rules)
