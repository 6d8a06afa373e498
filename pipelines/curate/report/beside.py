"""What other commands leave beside a ledger's decisions, as tables: counts per concept, and keep rates per group."""

from __future__ import annotations

import json
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq

from mm_core.data.index import Index
from mm_core.data.ledger import Ledger
from mm_core.store import open_file

_MOST = 20


def concepts_of(index: Index, ledger: str) -> list[dict[str, Any]]:
    """By rule the entries that most samples match, of `concepts.parquet` (rule, entry, matched, kept)."""
    try:
        with open_file(f"{Ledger(index, ledger).url}/concepts.parquet", "rb") as file:
            table = pq.read_table(file, columns=["rule", "entry", "matched", "kept"])
    except FileNotFoundError:
        return []
    found = []
    for rule in pc.unique(table["rule"].cast("string")).to_pylist():
        mine = table.filter(pc.equal(table["rule"].cast("string"), rule))
        rows = mine.sort_by([("matched", "descending"), ("entry", "ascending")]).slice(0, _MOST).to_pylist()
        most = max(1, *(row["matched"] for row in rows))
        shown = [{"name": row["entry"], "matched": row["matched"], "kept": row["kept"], "of": most} for row in rows if row["matched"]]
        matched = pc.sum(pc.greater(mine["matched"], 0)).as_py()
        found.append({"rule": rule, "rows": shown, "more": f"{matched:,} of {mine.num_rows:,} entries match any sample."})
    return found


def group_tables(index: Index, ledger: str) -> list[dict[str, Any]]:
    """Of `groups.json`: a table for every category and crossing, and one of the differences; none of an earlier state of the ledger."""
    found = Ledger(index, ledger)
    try:
        with open_file(f"{found.url}/groups.json", "rt") as file:
            groups = json.load(file)
    except FileNotFoundError:
        return []
    if groups["ledger_fingerprint"] != found.summary().fingerprint:
        return []
    kinds = [(name, cells) for name, cells in groups["categories"].items()]
    kinds += [(" and ".join(names), cells) for names, cells in groups["crosses"]]
    columns = ("group", "samples", "kept", "keep rate", "share of samples", "share of an epoch")
    tables = [{"title": f"Groups: {name}", "columns": columns, "rows": [_group(cell) for cell in cells]} for name, cells in kinds]
    if groups["differences"]:
        title = f"Keep rates that surely differ by more than {groups['max_difference']:.0%}"
        rows = [_difference(row) for row in groups["differences"][:_MOST]]
        tables.append({"title": title, "columns": ("kept more, kept less", "rule", "keep rates", "difference"), "rows": rows})
    return tables


def _group(cell: dict[str, Any]) -> tuple[str, ...]:
    rate = "" if cell["keep_rate"] is None else f"{cell['keep_rate']:.1%}"
    counts = (f"{cell['samples']:,}", f"{cell['kept']:,}")
    return (", ".join(cell["groups"]), *counts, rate, f"{cell['share']:.1%}", f"{cell['epoch_share']:.1%}")


def _difference(row: dict[str, Any]) -> tuple[str, ...]:
    rates = " and ".join(f"{rate:.1%}" for rate in row["keep_rates"])
    category = ", of ".join([row["category"], *([", ".join(row["within"])] if row["within"] else [])])
    return (f"{category}: {', '.join(row['groups'])}", row["rule"] or "all of them", rates, f"{row['difference']:.1%}")
