"""Findings as the sections of a page: what each template shows, as plain lists."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from mm_core.data.ledger import LedgerSummary, kept_fingerprint
from pipelines.curate.report import svg
from pipelines.curate.report.beside import concepts_of, group_tables
from pipelines.curate.report.draw import COMPARED, KEPT, Drawn, Kind
from pipelines.curate.report.findings import Findings
from pipelines.curate.report.pictures import Shown
from pipelines.curate.report.tally import SIDES, LedgerTally
from pipelines.curate.report.view import CAPTION_CHARACTERS, Column

Section = dict[str, Any]
_MAX_MATRIX = 12
_MAX_LABELS = 14
_MAX_DIFFERENCES = 14
_PARAMETER_CHARACTERS = 90
_FAINT, _STRONG = 0.06, 0.42
"""How opaque the tint of a matrix's least and greatest cell is: the number on it stays readable."""


def index_itself(found: Findings) -> Section:
    summary, tally = found.index.summary, found.tally
    used_w, used_h = (_used(tally.sizes.sum(axis=(2, side))) for side in (1, 0))
    sizes = tally.sizes[used_w, used_h]
    note = (lambda cell: f"{cell[0] / cell.sum():.0%} kept") if found.question.ledgers else (lambda cell: "")
    cells = _tinted(
        [[int(cell.sum()) for cell in row] for row in sizes.swapaxes(0, 1)],
        [[note(c) if c.sum() else "" for c in row] for row in sizes.swapaxes(0, 1)],
    )
    return {
        "id": "index",
        "title": "The index",
        "template": "index.html",
        "rows": summary.rows,
        "samples": summary.samples,
        "bad": sorted(summary.bad.items(), key=lambda item: -item[1]),
        "ledgers": [{"id": _id(name), "name": name, "kept": s.kept, "rule": _decided(s)} for name, s in found.summaries.items()],
        "sizes": {"columns": _classes()[used_w], "rows": list(zip(_classes()[used_h], cells, strict=True)) if sizes.size else []},
        "formats": _by_kept(tally.formats, _MAX_LABELS)[0],
        "charts": [_chart(found, ("", CAPTION_CHARACTERS), "characters of the first caption")]
        if ("", CAPTION_CHARACTERS) in found.histograms
        else [],
        "gallery": None if found.question.ledgers else _gallery(found, KEPT, "Samples", tally.kept),
    }


def several(found: Findings) -> Section:
    """Ledgers as a run reads them together."""
    tally, names = found.tally, found.question.together
    order = [(name, reason) for name in names for reason in _reasons(found.summaries[name], tally.ledgers[name])]
    order += sorted(set(tally.reasons) - set(order))
    dropped = [(f"{name}: {reason}", "", tally.reasons[name, reason]) for name, reason in order if tally.reasons[name, reason]]
    return {
        "id": "together",
        "title": "Read together",
        "template": "together.html",
        "ledgers": names,
        "weighted": tally.uneven > 0,
        "places": int(tally.weight),
        "fingerprint": kept_fingerprint(found.index, [found.summaries[name] for name in names]),
        "samples": tally.samples,
        "kept": tally.kept,
        "rows": _funnel(tally.samples, dropped),
        "gallery": _gallery(found, KEPT, "Kept by all", tally.kept),
    }


def of_ledger(found: Findings, name: str) -> Section:
    summary, ledger = found.summaries[name], found.tally.ledgers[name]
    rules, samples = list(summary.rules), found.tally.samples
    dropped = [(reason, _parameters(summary.rules.get(reason, {})), ledger.reasons[reason]) for reason in _reasons(summary, ledger)]
    columns = [column for column in found.histograms if column[0] == name]
    varied = [column for column in columns if found.histograms[column].spread.low < found.histograms[column].spread.high]
    galleries = [_gallery(found, ("kept", name), f"Kept by {name}", ledger.kept)]
    galleries += [_gallery(found, ("dropped", name, why), f"Dropped by {why or name}", n, says) for why, says, n in dropped if n]
    return {
        "id": _id(name),
        "title": f"Ledger {name}",
        "template": "ledger.html",
        "name": name,
        "rule": _decided(summary),
        "fingerprint": summary.fingerprint,
        "weighted": ledger.uneven > 0,
        "places": int(ledger.weight),
        "samples": samples,
        "kept": ledger.kept,
        "rows": _funnel(samples, dropped),
        "rules": [{"name": rule, "fails": int(ledger.together[i, i]), "alone": int(ledger.alone[i])} for i, rule in enumerate(rules)],
        "pairs": _pairs(rules, ledger),
        "charts": [_chart(found, column, _column_name(column[1])) for column in varied],
        "constant": [_constant(found, column) for column in columns if column not in varied],
        "labels": [
            {"rule": rule, "rows": rows, "more": more}
            for rule, counts in ledger.labels.items()
            for rows, more in [_by_kept(counts, _MAX_LABELS)]
        ],
        "concepts": concepts_of(found.index, name),
        "tables": group_tables(found.index, name),
        "duplicates": _duplicates(found, ledger),
        "elsewhere": [pairs for reason, _, count in dropped for pairs in _elsewhere(found, name, reason, count)],
        "galleries": [gallery for gallery in galleries if gallery["drawn"]],
    }


def compared(found: Findings) -> Section:
    assert found.question.compare is not None
    one, other = found.question.compare
    crossed = found.tally.crossed
    sides = dict.fromkeys(COMPARED, 0)
    for (ours, theirs), count in crossed.items():
        sides[COMPARED[2 * bool(ours) + bool(theirs)]] += count
    names = dict(zip(COMPARED, ("both", f"{one} alone", f"{other} alone", "neither"), strict=True))
    differing = sorted(((count, a, b) for (a, b), count in crossed.items() if bool(a) != bool(b)), key=lambda row: (-row[0], row[1:]))
    rest = sum(count for count, _, _ in differing[_MAX_DIFFERENCES:])
    galleries = [_gallery(found, ("compared", side), f"Kept by {names[side]}", sides[side]) for side in COMPARED]
    return {
        "id": "compared",
        "title": f"{one} and {other} compared",
        "template": "compared.html",
        "one": one,
        "other": other,
        "kept_one": found.summaries[one].kept,
        "kept_other": found.summaries[other].kept,
        "samples": found.tally.samples,
        "sides": [{"name": names[side], "count": sides[side]} for side in COMPARED],
        "differences": [(a or "kept", b or "kept", count) for count, a, b in differing[:_MAX_DIFFERENCES]],
        "more": f"{len(differing) - _MAX_DIFFERENCES} rarer combinations hold {rest:,} samples." if rest else "",
        "galleries": [gallery for gallery in galleries if gallery["drawn"]],
    }


def of_map(found: Findings) -> Section:
    assert found.map is not None
    points, places, clusters = found.map.points, found.map.positions.tolist(), found.map.clusters.tolist()
    section: Section = {"id": "map", "title": "Map of the embeddings", "template": "map.html", "figures": []}
    if not points:
        return section
    kept = [(x, y, svg.KEPT if p.kept else svg.DROPPED, _says(found, p)) for (x, y), p in zip(places, points, strict=True)]
    groups = [(x, y, svg.CLUSTERS[c], f"cluster {c + 1}: {_says(found, p)}") for (x, y), c, p in zip(places, clusters, points, strict=True)]
    typical = [(*places[place], str(c + 1)) for c, place in enumerate(found.map.typical)]
    by_cluster = Counter((f"{c + 1}", p.kept) for c, p in zip(clusters, points, strict=True))
    rows: list[dict[str, Any]] = [
        {"name": str(c + 1), "kept": by_cluster[str(c + 1), True], "dropped": by_cluster[str(c + 1), False]} for c in range(len(typical))
    ]
    largest = max(row["kept"] + row["dropped"] for row in rows)
    without = f" {found.map.without:,} of those drawn have none." if found.map.without else ""
    return section | {
        "says": f"{len(points):,} samples, drawn at random, by their embeddings (t-SNE; clusters by k-means).{without}",
        "figures": [
            {"name": "Kept and dropped", "says": "", "svg": svg.scatter(kept, "Map of samples, kept blue, dropped red"), "notes": ()},
            {"name": "Clusters", "says": "numbered by size", "svg": svg.scatter(groups, "Map of samples by cluster", typical), "notes": ()},
        ],
        "clusters": [row | {"of": largest} for row in rows],
        "typical": [(found.samples[points[place].ordinal], f"typical of cluster {c + 1}") for c, place in enumerate(found.map.typical)],
    }


def _says(found: Findings, point: Drawn) -> str:
    captions = found.captions[point.ordinal].captions
    return f"{captions[0][:120]} ({point.note})" if captions else point.note


def _reasons(summary: LedgerSummary, ledger: LedgerTally) -> list[str]:
    """In the order of the rules; others by how many."""
    return [*summary.rules, *sorted(set(ledger.reasons) - set(summary.rules), key=lambda reason: (-ledger.reasons[reason], reason))]


def _decided(summary: LedgerSummary) -> str:
    return f"{len(summary.rules)} {summary.rule}" if summary.rule.startswith("rules ") else summary.rule


def listed(names: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return " and ".join([", ".join(names[:-1]), *names[-1:]] if len(names) > 1 else names)


def _parameters(rule: dict[str, Any]) -> str:
    given = [f"{key} {_value(value)}" for key, value in rule.items() if key != "rule" and value is not None]
    text = ", ".join([*([str(rule["rule"])] if "rule" in rule else []), *given])
    return text if len(text) <= _PARAMETER_CHARACTERS else f"{text[:_PARAMETER_CHARACTERS]}…"


def _value(value: Any) -> str:
    match value:
        case float():
            return f"{value:g}"
        case list():
            return ", ".join(map(_value, value))
        case _:
            return str(value)


def _funnel(samples: int, dropped: Sequence[tuple[str, str, int]]) -> list[dict[str, Any]]:
    rows, left = [], samples
    for name, parameters, count in dropped:
        left -= count
        rows.append({"name": name or "no reason given", "parameters": parameters, "dropped": count, "left": left})
    return rows


def _pairs(rules: list[str], ledger: LedgerTally) -> dict[str, Any]:
    """Of the rules that most samples fail, how many fail two of them."""
    failing = [i for i in np.argsort(-ledger.together.diagonal()[: len(rules)], kind="stable") if ledger.together[i, i]]
    shown = sorted(failing[:_MAX_MATRIX])
    if len(shown) < 2:
        return {"columns": [], "rows": [], "more": ""}
    cells = _tinted([[int(ledger.together[i, j]) for j in shown] for i in shown])
    more = f"The {len(shown)} rules that most samples fail, of {len(failing)} that any fails." if len(failing) > len(shown) else ""
    return {"columns": [rules[i] for i in shown], "rows": [(rules[i], row) for i, row in zip(shown, cells, strict=True)], "more": more}


def _tinted(counts: list[list[int]], notes: list[list[str]] | None = None) -> list[list[dict[str, Any]]]:
    """Cells of a matrix: the more, the darker."""
    most = max((count for row in counts for count in row), default=0)
    return [
        [
            {
                "count": count,
                "tint": round(_FAINT + (_STRONG - _FAINT) * count / most, 2) if count else 0,
                "note": notes[y][x] if notes else "",
            }
            for x, count in enumerate(row)
        ]
        for y, row in enumerate(counts)
    ]


def _by_kept(counts: Counter[tuple[str, bool]], most: int) -> tuple[list[dict[str, Any]], str]:
    """Names by how often they come, and what is said of those left out."""
    names = sorted({name for name, _ in counts}, key=lambda name: (-counts[name, True] - counts[name, False], name))
    rows: list[dict[str, Any]] = [{"name": name, "kept": counts[name, True], "dropped": counts[name, False]} for name in names]
    largest = max((row["kept"] + row["dropped"] for row in rows), default=1)
    rest = sum(row["kept"] + row["dropped"] for row in rows[most:])
    more = f"{len(rows) - most} rarer ones come {rest:,} times." if rest else ""
    return [row | {"of": largest} for row in rows[:most]], more


def _chart(found: Findings, column: Column, name: str) -> dict[str, Any]:
    histogram = found.histograms[column]
    spread = histogram.spread
    says = f"{spread.total:,} values, median {svg.number(spread.quantile(0.5))}" + (
        ", counts by their logarithm" if svg.log_counts(histogram) else ""
    )
    return {"name": name, "says": says, "svg": svg.histogram(histogram, name), "notes": svg.beyond(histogram)}


def _constant(found: Findings, column: Column) -> str:
    spread = found.histograms[column].spread
    return f"{_column_name(column[1])} is {svg.number(spread.low)} for all {spread.total:,}"


def _column_name(column: str) -> str:
    return "sampling weight" if column == "repeat" else column.removeprefix("value.")


def _gallery(found: Findings, kind: Kind, title: str, of: int, says: str = "") -> dict[str, Any]:
    drawn = found.tally.draws.get(kind, [])[: found.question.gallery]
    shown = [(found.samples[one.ordinal], one.note) for one in drawn if one.ordinal in found.samples]
    return {"title": title, "drawn": shown, "of": of, "says": says}


def _duplicates(found: Findings, ledger: LedgerTally) -> dict[str, Any] | None:
    duplicates = ledger.duplicates
    if not duplicates.drawn:
        return None
    groups: list[list[tuple[Shown, str]]] = [
        [(found.samples[kept], "kept"), *((found.samples[copy], "dropped") for copy in copies)]
        for (_, kept), copies in duplicates.drawn.items()
    ]
    says = f"{duplicates.groups:,} groups hold {duplicates.samples:,} samples; {len(groups)} of them, drawn at random, are here."
    return {"says": says, "groups": groups}


def _elsewhere(found: Findings, ledger: str, reason: str, count: int) -> list[dict[str, Any]]:
    """Samples dropped because another index holds them, beside what that has."""
    drawn = found.tally.draws.get(("dropped", ledger, reason), [])[: found.question.gallery]
    pairs = [
        [(found.matches[ledger, reason, one.match], "there"), (found.samples[one.ordinal], "here, dropped")]
        for one in drawn
        if (ledger, reason, one.match) in found.matches
    ]
    return [{"title": f"Beside what they match: {reason}", "says": f"{len(pairs)} of {count:,}.", "groups": pairs}] if pairs else []


def _used(counts: Any) -> slice:
    """From the first class that has any to the last."""
    places = np.flatnonzero(counts)
    return slice(int(places[0]), int(places[-1]) + 1) if len(places) else slice(0, 0)


def _classes() -> list[str]:
    return [f"under {SIDES[0]}", *(f"{low:,} to {high - 1:,}" for low, high in pairwise(SIDES)), f"from {SIDES[-1]:,}"]


def _id(name: str) -> str:
    return f"ledger-{name}"
