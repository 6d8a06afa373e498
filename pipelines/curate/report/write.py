"""`mm data report`: gather, draw, write."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mm_core.data.index import Index
from mm_core.errors import ConfigError, DataError
from mm_core.store import open_file, open_store, reaching, write_whole
from pipelines.curate.report.findings import Findings, find
from pipelines.curate.report.page import render
from pipelines.curate.report.view import Question
from pipelines.tracking import TrackingConfig, open_client, store_errors

_GROUPS = 8
_POINTS = 1500
"""t-SNE of as many takes some ten seconds."""


@dataclass(frozen=True)
class Report:
    """What was written."""

    out: str
    bytes: int
    samples: int
    kept: int
    """By the ledgers that are read together."""
    ledgers: dict[str, int]
    """What each keeps."""
    pictures: int
    unreadable: dict[str, int]
    """Drawn samples that cannot be shown, by reason."""


def write_report(
    index: Index,
    ledgers: Sequence[str],
    out: str,
    *,
    compare: tuple[str, str] | None = None,
    embeddings: str | None = None,
    gallery: int = 12,
    seed: int = 0,
    on_progress: Callable[[int], None] = lambda rows: None,
    on_step: Callable[[str], None] = lambda step: None,
) -> Report:
    """Write the report of an index under ledgers to `out`, a file or URL, whole or not at all. The same arguments give the same file.

    Args:
        ledgers: read together, as a run does.
        compare: shown, too; without `ledgers` these are read together.

    Raises:
        ConfigError: `out` is a folder, or a ledger is compared with itself.
        DataError: a ledger or scores that are not there, are of another index, or are damaged; or `out` cannot be written.
    """
    if compare is not None and compare[0] == compare[1]:
        raise ConfigError(f"--compare {compare[0]} {compare[1]}: a ledger differs in nothing from itself; name two")
    check_page(out)
    named = tuple(dict.fromkeys((*ledgers, *(compare or ()))))
    together = tuple(dict.fromkeys(ledgers)) or named
    question = Question(index.url, named, together, compare, gallery, _GROUPS, _POINTS if embeddings else 0, seed)
    found = find(question, embeddings, on_progress, on_step)
    return _report(found, out, write_page(out, render(found)))


def check_page(out: str) -> None:
    """
    Raises:
        ConfigError: a page cannot be written to `out`, as it is a folder.
    """
    fs, path = open_store(out)
    if fs.isdir(path):
        raise ConfigError(f"--out {out} is a folder: name a file in it, for example {out.rstrip('/')}/report.html")


def write_page(out: str, page: str) -> int:
    """Its size, bytes.

    Raises:
        DataError: it cannot be written.
    """
    data = page.encode()
    try:
        with reaching(out):
            write_whole(out, data)
    except OSError as error:
        raise DataError(f"cannot write {out}: {error}; name another file with --out") from None
    return len(data)


def check_run(tracking: TrackingConfig, run_id: str) -> None:
    """Look the run up, before the work for it is done.

    Raises:
        ServiceError: the store does not answer, or has no such run.
    """
    client = open_client(tracking)
    with store_errors(tracking, f"looking up run {run_id}"):
        client.get_run(run_id)


def add_to_run(tracking: TrackingConfig, run_id: str, report: Report) -> None:
    """Keep a report with a run, as the artifact `report/NAME`.

    Raises:
        ServiceError: the store does not take it.
    """
    client = open_client(tracking)
    with tempfile.TemporaryDirectory(prefix="mm-report-") as folder, open_file(report.out, "rb") as file:
        copy = Path(folder) / report.out.rpartition("/")[2]
        copy.write_bytes(file.read())
        with store_errors(tracking, f"the report is in {report.out}; adding it to run {run_id}"):
            client.log_artifact(run_id, str(copy), "report")


def _report(found: Findings, out: str, size: int) -> Report:
    problems = Counter(shown.problem for shown in found.samples.values() if shown.problem)
    pictures = sum(shown.picture is not None for shown in found.samples.values())
    kept = {name: summary.kept for name, summary in found.summaries.items()}
    return Report(out, size, found.tally.samples, found.tally.kept, kept, pictures, dict(problems))
