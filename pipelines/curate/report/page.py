"""The page: templates filled with the sections of a report. One file, no script, nothing asked of any other machine; whatever stands in the
data is escaped."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from mm_core.data.index import Index
from mm_core.data.personal import PersonalKind
from pipelines.curate.report.findings import Findings
from pipelines.curate.report.pictures import Shown
from pipelines.curate.report.sections import compared, index_itself, listed, of_ledger, of_map, several

_PACKAGE = "pipelines.curate.report"


def render(found: Findings) -> str:
    """The same findings give the same page."""
    return _rendered(_page(found))


def render_samples(
    index: Index, ledgers: Sequence[str], title: str, samples: Sequence[tuple[Shown, str]], mask: Sequence[PersonalKind], seed: int
) -> str:
    """A page of a few samples, each with what was decided about it."""
    section = {"id": "samples", "title": title, "template": "samples.html", "samples": samples}
    lead = f"By {'the ledger' if len(ledgers) == 1 else 'the ledgers'} {listed(ledgers)}." if ledgers else "Before any ledger chooses."
    facts = {"title": f"Some samples of {index.url.rpartition('/')[2]}", "lead": lead, "sections": [section], "tiles": []}
    return _rendered(facts | _origin(index, mask, seed, "peek"))


def _rendered(page: dict[str, Any]) -> str:
    style = Markup((files(_PACKAGE) / "templates" / "style.css").read_text(encoding="utf-8"))
    return _environment().get_template("page.html").render(page=page, style=style)


def _origin(index: Index, mask: Sequence[PersonalKind], seed: int, made_by: str) -> dict[str, Any]:
    facts = {"index": index.url, "fingerprint": index.summary.fingerprint, "seed": seed, "made_by": made_by}
    return facts | {"mask": [str(kind.value) for kind in mask]}


def _page(found: Findings) -> dict[str, Any]:
    summary, tally, ledgers = found.index.summary, found.tally, found.question.ledgers
    sections = [index_itself(found)]
    sections += [several(found)] if len(found.question.together) > 1 else []
    sections += [of_ledger(found, name) for name in ledgers]
    sections += [compared(found)] if found.question.compare else []
    sections += [of_map(found)] if found.map else []
    tiles = {"samples": summary.samples, "shards": summary.shards, "bytes": summary.bytes, "cannot be used": sum(summary.bad.values())}
    shown = [{"name": name, "value": _size(value) if name == "bytes" else f"{value:,}"} for name, value in tiles.items()]
    if ledgers:
        shown += [{"name": "kept", "value": f"{tally.kept:,}"}, {"name": "share kept", "value": percent(tally.kept, summary.samples)}]
    return {
        "title": _title(found.question.together, found.index.url.rpartition("/")[2]),
        "lead": "Which samples are read in training, which are not, and why."
        if ledgers
        else "Its samples, before any ledger chooses among them.",
        "sections": sections,
        "tiles": shown,
    } | _origin(found.index, found.mask if found.samples else (), found.question.seed, "report")


def _title(ledgers: Sequence[str], index: str) -> str:
    if not ledgers:
        return f"What is in {index}"
    return f"What {listed(ledgers)} {'keeps' if len(ledgers) == 1 else 'keep'} of {index}"


def percent(count: float, of: float) -> str:
    """With as many digits as tell a little from nothing, and nearly all from all."""
    share = count / of if of else 0.0
    if 0 < share < 0.0005 or 0.9995 < share < 1:
        return f"{share:.3%}"
    return f"{share:.1%}"


@lru_cache(maxsize=1)
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader(_PACKAGE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"thousands": lambda value: f"{value:,}", "percent": percent, "listed": listed}
    return environment


def _size(size: float) -> str:
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if size < 1000 or unit == "TB":
            break
        size /= 1000
    return f"{size:.3g} {unit}"
