"""What `mm data filter` and `mm data groups` show of concepts and groups."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import pyarrow as pa
import pyarrow.compute as pc

from mm_core.console import Console
from mm_core.curation.fairness import Difference, GroupCounts, GroupReport

_SHOWN = 10
_COMBINATIONS_SHOWN = 40


def show_concepts(console: Console, concepts: pa.Table) -> None:
    """Of every rule the most frequent, and the shares that weights give."""
    for rule in pc.unique(concepts["rule"]).to_pylist():
        table = concepts.filter(pc.equal(concepts["rule"], rule))
        weighed = table.filter(pc.is_valid(table["weight"]))
        if not weighed.num_rows:
            seen = pc.sum(pc.greater(table["matched"], 0)).as_py()
            title = f"{rule}: {seen:,} of {table.num_rows:,} entries have samples; the most frequent"
            most = [(row["entry"], row["matched"], row["kept"]) for row in table.slice(0, _SHOWN).to_pylist()]
            console.table(("entry", "samples before", "after"), most, title)
        else:
            matched, weights = weighed["matched"].to_numpy(), weighed["weight"].to_numpy()
            after = weighed["kept"].to_numpy() * weights
            columns = (matched / max(1, matched.sum()), after / max(1e-9, after.sum()))
            shares = [[f"{share:.1%}" for share in column] for column in columns]
            groups = zip(weighed["entry"].to_pylist(), matched.tolist(), shares[0], weights.tolist(), shares[1], strict=True)
            console.table(("group", "samples before", "share", "weight", "share after"), list(groups), f"{rule}: those in one group alone")


def show_groups(console: Console, report: GroupReport, ledgers: Sequence[str]) -> None:
    together = f"{' and '.join(ledgers)} together" if ledgers else "the whole index"
    console.say(f"{report.ledger or together}: {report.kept:,} of {report.samples:,} samples")
    for kind, table in [*(((category,), table) for category, table in report.categories.items()), *report.crosses]:
        shown = sorted(table, key=lambda cell: -cell.samples)[:_COMBINATIONS_SHOWN] if len(kind) > 1 else table
        title = " × ".join(kind) + (f", the {len(shown)} largest of {len(table)}" if len(shown) < len(table) else "")
        if not ledgers:
            console.table((*kind, "samples", ""), [(*cell.groups, cell.samples, f"{cell.share:.1%}") for cell in shown], title)
        else:
            columns = (*kind, "samples", "", "kept", "keep rate", "share of an epoch", "fewest kept by")
            console.table(columns, list(map(_row, shown)), title)
    if ledgers:
        _show_differences(console, report.differences, report.max_difference)


def _row(cell: GroupCounts) -> tuple[str | int, ...]:
    rates = {rule: rate for rule, rate in cell.rules.items() if rate is not None}
    least = min(rates, key=rates.__getitem__, default=None)
    return (
        *cell.groups,
        *(cell.samples, f"{cell.share:.1%}", cell.kept),
        *("" if cell.keep_rate is None else f"{cell.keep_rate:.1%}", f"{cell.epoch_share:.1%}"),
        f"{least} {rates[least]:.1%}" if least is not None else "",
    )


def _show_differences(console: Console, differences: Iterable[Difference], bound: float) -> None:
    found = list(differences)
    if not found:
        console.say(f"no rule's keep rates surely differ by more than {bound:.1%} between groups that differ in one category")
        return
    rows = []
    for each in found[:_COMBINATIONS_SHOWN]:
        (more, less), (high, low) = each.groups, (f"{rate:.1%}" for rate in each.keep_rates)
        between = " to ".join(f"{100 * end:.1f}" for end in each.interval)
        category = f"{each.category}, of {', '.join(each.within)}" if each.within else each.category
        rows.append((each.rule or "all rules", category, more, high, less, low, f"{each.difference:.1%} ({between})"))
    title = f"keep rates that surely differ by more than {bound:.1%}: {len(found):,}"
    console.table(("rule", "category", "keeps more of", "", "than of", "", "difference (95 times in 100)"), rows, title)
