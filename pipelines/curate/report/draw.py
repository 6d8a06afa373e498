"""Samples drawn at random, the same however the index is divided: of each kind those whose keys, a hash of (seed, ordinal), are lowest."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Bool

from mm_core.data.permutation import U64, mix
from pipelines.curate.report.view import Question, View, counted, text

_DRAW = 11
"""Keeps these keys apart from the other draws made of a seed."""
Kind = tuple[str, ...]
KEPT: Kind = ("kept",)
POINTS: Kind = ("points",)
COMPARED = ("both", "one", "other", "neither")
"""Which of two ledgers keep."""


class Drawn(NamedTuple):
    """One sample."""

    key: int
    ordinal: int
    kept: bool
    note: str
    """What decided about it, for people."""
    match: int = -1
    """Of a sample that another index holds, the ordinal there."""


Draws = dict[Kind, list[Drawn]]
Note = Callable[[int], str]


def keys_of(ordinals: U64, seed: int) -> U64:
    """No two ordinals have the same."""
    return mix(seed, _DRAW, ordinals)


def of(view: View, question: Question) -> Draws:
    """Kept samples, for every reason of every ledger dropped ones, points of the map, and the four sides of a comparison."""
    kept = view.kept()
    found: Draws = {KEPT: _some(view, question, kept, kept, lambda i: "")}
    if question.points:
        every = np.ones(len(kept), dtype=bool)
        found[POINTS] = _some(view, question, every, kept, _first_reason(view, len(question.together) > 1), question.points)
    for name in question.ledgers:
        flags, reasons = view.kept(name), pc.fill_null(view.reasons(name), "")
        found["kept", name] = _some(view, question, flags, flags, _weight(view, name))
        for reason in counted(reasons.filter(pa.array(~flags))):
            chosen = pc.equal(reasons, reason).to_numpy(zero_copy_only=False) & ~flags
            drawn = _some(view, question, chosen, flags, _value(view, name, reason))
            found["dropped", name, reason] = _matched(view, name, drawn)
    return found | (_compared(view, question, *question.compare) if question.compare else {})


def merge(draws: Draws, more: Draws, question: Question) -> None:
    """Add to `draws` those of another part: what is left are the lowest of both."""
    for kind, drawn in more.items():
        draws[kind] = sorted([*draws.get(kind, ()), *drawn])[: question.points if kind == POINTS else question.gallery]


def _some(
    view: View, question: Question, chosen: Bool[np.ndarray, " rows"], kept: Bool[np.ndarray, " rows"], note: Note, count: int | None = None
) -> list[Drawn]:
    """Of the rows chosen those with the lowest keys, in the keys' order."""
    count = question.gallery if count is None else count
    places = np.flatnonzero(chosen)
    keys = keys_of(view.ordinals[places], question.seed)
    lowest = np.argpartition(keys, count)[:count] if len(keys) > count else np.arange(len(keys))
    lowest = lowest[np.argsort(keys[lowest])]
    return [
        Drawn(int(key), int(view.ordinals[i]), bool(kept[i]), note(int(i))) for key, i in zip(keys[lowest], places[lowest], strict=True)
    ]


def _matched(view: View, ledger: str, drawn: list[Drawn]) -> list[Drawn]:
    """With what a search for duplicates found of them in another index."""
    table = view.decisions[ledger]
    if "against" not in table.column_names:
        return drawn
    places = np.searchsorted(view.ordinals, [one.ordinal for one in drawn])
    matches = pc.fill_null(table["against"].take(places).cast(pa.int64()), -1).to_pylist()
    return [one._replace(match=match) for one, match in zip(drawn, matches, strict=True)]


def _compared(view: View, question: Question, one: str, other: str) -> Draws:
    ours, theirs = view.kept(one), view.kept(other)
    reasons = {name: view.reasons(name) for name in (one, other)}

    def note(i: int) -> str:
        return "; ".join(f"{name}: {reason}" for name in (one, other) if (reason := reasons[name][i].as_py()))

    sides = dict(zip(COMPARED, (ours & theirs, ours & ~theirs, ~ours & theirs, ~ours & ~theirs), strict=True))
    return {("compared", side): _some(view, question, chosen, ours, note) for side, chosen in sides.items()}


def _first_reason(view: View, several: bool) -> Note:
    kept, ledgers, reasons = view.kept(), text(view.together, "ledger"), text(view.together, "reason")
    return lambda i: "kept" if kept[i] else f"{ledgers[i]}: {reasons[i]}" if several else str(reasons[i])


def _weight(view: View, ledger: str) -> Note:
    weights = view.decisions[ledger]["repeat"]
    return lambda i: "" if (weight := weights[i].as_py()) == 1 else f"weight {weight:.3g}"


def _value(view: View, ledger: str, reason: str) -> Note:
    """What the rule of this name measured, and what it found."""
    table = view.decisions[ledger]
    columns = [table[f"{part}.{reason}"] for part in ("label", "value") if f"{part}.{reason}" in table.column_names]

    def note(i: int) -> str:
        found = [column[i].as_py() for column in columns]
        return " ".join(f"{value:,.4g}" if isinstance(value, float) else str(value) for value in found if value is not None) or "no value"

    return note if columns else lambda i: ""
