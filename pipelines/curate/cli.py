"""The part of `mm data` that chooses among an index's samples: scores, rules, ledgers. Each command is a thin layer over the module that
does the work, which is imported inside it, so that `mm --help` is quick."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from mm_core.console import Console
from mm_core.errors import ConfigError
from pipelines.curate.score_command import score
from pipelines.curate.show_commands import peek, report
from pipelines.options import Json, Ledgers, opened_among, parse_bytes


class ExportFormat(StrEnum):
    SHARDS = "shards"
    UIDS = "uids"
    PARQUET = "parquet"


def attach(data: typer.Typer) -> None:
    """Add these commands to `mm data`."""
    data.command("score")(score)
    data.command("filter")(filter_samples)
    data.command("groups")(groups)
    data.command("rules")(rules)
    data.command("ledgers")(list_ledgers)
    data.command("export")(export)
    data.command("import")(import_ledger)
    data.command("dedup")(dedup)
    data.command("report")(report)
    data.command("peek")(peek)


def filter_samples(
    index: Annotated[str, typer.Argument(help="An index, or INDEX#LEDGER,…")],
    rules: Annotated[Path, typer.Option(help="YAML file of named rules; mm data rules lists them.")],
    name: Annotated[str, typer.Option(help="Name of the ledger to write.")],
    ledger: Ledgers = None,
    replace: Annotated[bool, typer.Option("--replace", help="Put it in the place of a ledger of this name by other rules.")] = False,
    as_json: Json = False,
) -> None:
    """Lay rules over an index and write a ledger: who is kept, and else the first rule that a sample fails. No shard is copied.
    With --ledger over what other ledgers keep.

    Example: mm data filter index --rules rules.yaml --name clean, then mm train clip-tiny --data index --ledger clean
    """
    from mm_core.curation.concepts import read_concepts
    from mm_core.curation.ruleset import RuleSet
    from mm_core.data.ledger import Ledger
    from pipelines.curate.filter import filter_index
    from pipelines.curate.tables import show_concepts

    console, rule_set = Console(as_json), RuleSet.read(rules)
    opened, among = opened_among(index, ledger)
    with console.progress("filter", opened.summary.rows * (1 + rule_set.passes), unit="rows") as tracker:
        summary = filter_index(opened, rule_set, name, among=among, replace_ledger=replace, on_progress=tracker.advance)
    of = max(1, opened.summary.samples)
    rows: list[tuple[str, int, str, int | str, str]]
    rows = [(reason, n, f"{n / of:.1%}", "", "") for reason, n in summary.dropped.items() if reason not in summary.rules]
    rows += [
        (rule, dropped := summary.dropped.get(rule, 0), f"{dropped / of:.1%}", fails, f"{fails / of:.1%}")
        for rule, fails in summary.failed.items()
    ]
    console.table(("rule", "dropped by it first", "", "fail it in all", ""), rows)
    show_concepts(console, read_concepts(Ledger(opened, name)))
    console.say(
        f"ledger {name} keeps {summary.kept:,} of {opened.summary.samples:,} samples; next: mm train RECIPE --data {index} --ledger {name}"
    )
    console.result(
        {"kept": summary.kept, "dropped": summary.dropped, "failed": summary.failed, "ledger": name, "fingerprint": summary.fingerprint}
    )


def groups(
    index: Annotated[str, typer.Argument(help="An index, or INDEX#LEDGER,…")],
    terms: Annotated[Path, typer.Option(help="YAML file of groups and their terms.")],
    ledger: Annotated[list[str] | None, typer.Option(help="A ledger; again for more. What all of them keep is counted too.")] = None,
    max_difference: Annotated[float, typer.Option(min=0, max=1, help="Between keep rates; pairs surely above it are shown.")] = 0.05,
    as_json: Json = False,
) -> None:
    """Count groups of samples, told by terms in their captions, before and after ledgers, and show whom a rule keeps less of than others.

    Example: mm data groups index --terms groups.yaml --ledger clean
    """
    from mm_core.curation.text_file import TextFile
    from pipelines.curate.groups import report_index
    from pipelines.curate.tables import show_groups

    console = Console(as_json)
    opened, among = opened_among(index, ledger)
    try:
        file = TextFile.read(str(terms))
    except ValueError as error:
        raise ConfigError(str(error)) from None
    with console.progress("groups", opened.summary.rows, unit="rows") as tracker:
        reports = report_index(opened, file, among.ledgers, max_difference=max_difference, on_progress=tracker.advance)
    for each in reports:
        show_groups(console, each, among.ledgers)
    console.result({"reports": [each.model_dump(mode="json") for each in reports]})


def rules(
    schema: Annotated[bool, typer.Option("--schema", help="The JSON Schema of a file of rules.")] = False, as_json: Json = False
) -> None:
    """The rules there are, and their parameters.

    Example: mm data rules, or mm data rules --schema > rules.schema.json
    """
    import json

    from mm_core.curation.ruleset import RULES
    from mm_core.curation.ruleset import schema as rules_schema

    if schema:
        typer.echo(json.dumps(rules_schema(), indent=1))
        return
    console = Console(as_json)
    rows = [
        (name, ", ".join(key for key in kind.model_fields if key != "rule"), (kind.__doc__ or "").split("\n")[0])
        for name, kind in RULES.items()
    ]
    console.table(("rule", "parameters", ""), rows)
    console.result({"rules": list(RULES)})


def list_ledgers(
    index: Annotated[str, typer.Argument(help="An index, or INDEX#LEDGER,…")], ledger: Ledgers = None, as_json: Json = False
) -> None:
    """The ledgers of an index; with --ledger, what those keep together, and by which of them a sample is dropped first.

    Example: mm data ledgers index, or mm data ledgers index --ledger clean --ledger train
    """
    from mm_core.data.index import Index
    from mm_core.data.ledger import Ledger, Source, ledger_names
    from pipelines.curate.combine import combined

    console, source = Console(as_json), Source.parse(index, ledger or ())
    opened = Index.open(source.index)
    if not source.ledgers:
        found = {name: Ledger(opened, name).summary() for name in ledger_names(opened)}
        console.table(("ledger", "keeps", "drops", "by"), [(n, s.kept, sum(s.dropped.values()), s.rule) for n, s in found.items()])
        console.say(f"{len(found)} ledgers of {opened.summary.samples:,} samples in {opened.url}")
        console.result({"ledgers": {n: {"kept": s.kept, "dropped": s.dropped, "rule": s.rule} for n, s in found.items()}})
        return
    kept, dropped = combined(opened, source.ledgers)
    of = max(1, opened.summary.samples)
    console.table(("ledger", "reason", "dropped first by it", ""), [(*why, n, f"{n / of:.1%}") for why, n in dropped.items()])
    console.say(f"{' and '.join(source.ledgers)} keep {kept:,} of {opened.summary.samples:,} samples together")
    console.result({"kept": kept, "dropped": {f"{name}: {reason}": n for (name, reason), n in dropped.items()}})


def export(
    index: Annotated[str, typer.Argument(help="An index, or INDEX#LEDGER,…")],
    out: Annotated[str, typer.Option(help="Folder or URL of the shards to write; of uids, the file.")],
    ledger: Ledgers = None,
    format: Annotated[ExportFormat, typer.Option(help="Shards, or uids alone: DataComp's subset file, or Parquet.")] = ExportFormat.SHARDS,
    shard_bytes: Annotated[
        int | None, typer.Option(parser=parse_bytes, metavar="SIZE", help="Of a shard, about; 256MB where it has no other bound.")
    ] = None,
    shard_samples: Annotated[int | None, typer.Option(min=1, help="Of a shard, at most.")] = None,
    shuffle: Annotated[bool, typer.Option("--shuffle", help="In an order drawn from --seed; else as in the index.")] = False,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    repeat: Annotated[bool, typer.Option("--repeat", help="Write a sample as often as an epoch reads it; else once.")] = False,
    max_bad_fraction: Annotated[float, typer.Option(min=0, max=1, help="Stop if a larger share cannot be read.")] = 0.1,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be written, and stop.")] = False,
    as_json: Json = False,
) -> None:
    """Write what ledgers keep as new shards, or as a list of uids. After a stop, the same command goes on where it was.

    Example: mm data export index --ledger clean --out clean-shards --shard-bytes 256MB, or --format uids --out clean.npy
    """
    from mm_core.data.ledger import Source
    from pipelines.curate.export import Export
    from pipelines.curate.subset import export_uids

    console = Console(as_json)
    plan = Export.of(
        Source.parse(index, ledger or ()), max_bytes=shard_bytes, max_samples=shard_samples, repeat=repeat, shuffle=shuffle, seed=seed
    )
    if plan.weighted:
        console.note(f"{plan.weighted:,} samples have a sampling weight, which the export does not keep; --repeat writes them as often")
    if format is not ExportFormat.SHARDS:
        if dry_run:
            console.say(f"would write the uids of {len(plan.order):,} samples to {out}")
            console.result({"samples": len(plan.order), "out": out})
            return
        with console.progress("export", plan.index.summary.rows) as tracker:
            count = export_uids(plan.index, plan.order, out, parquet=format is ExportFormat.PARQUET, on_progress=tracker.advance)
        console.say(f"{out} lists {count:,} uids; next: mm data import INDEX {out} --name NAME")
        console.result({"samples": count, "out": out})
        return
    if dry_run:
        console.say(f"would write {len(plan.order):,} samples, {plan.bytes / 1e6:,.1f} MB, in {len(plan.ends):,} shards to {out}")
        console.result({"shards": len(plan.ends), "samples": len(plan.order), "bytes": plan.bytes, "out": out})
        return
    with console.progress("export", len(plan.order)) as tracker:
        summary = plan.write(out, max_bad_fraction=max_bad_fraction, on_progress=tracker.advance)
    if summary.skipped:
        console.table(("not exported because", "samples"), list(summary.skipped.items()))
    if plan.plan.mask:
        console.note(f"captions are masked ({', '.join(plan.plan.mask)}), as the ledgers say")
    need = "" if len(plan.index.summary.need) > 1 else f" --modality {plan.index.summary.need[0]}"
    console.say(
        f"{summary.samples:,} samples are in {summary.shards:,} shards ({summary.bytes / 1e6:,.1f} MB) in {out};"
        f" next: mm data index {out} --out INDEX{need}"
    )
    console.result({"shards": summary.shards, "samples": summary.samples, "bytes": summary.bytes, "skipped": summary.skipped, "out": out})


def import_ledger(
    index: Annotated[str, typer.Argument(help="An index.")],
    file: Annotated[str, typer.Argument(help="Uids: DataComp's subset file (.npy), Parquet with a column uid, or text, one a line.")],
    name: Annotated[str, typer.Option(help="Name of the ledger to write.")],
    replace: Annotated[bool, typer.Option("--replace", help="Put it in the place of a ledger of this name by other rules.")] = False,
    as_json: Json = False,
) -> None:
    """Make a ledger of a list of uids: what it lists is kept. A uid that is listed twice weighs 2.

    Example: mm data import index subset.npy --name subset, then mm train clip-tiny --data index --ledger subset
    """
    from mm_core.data.index import Index
    from pipelines.curate.subset import import_uids

    console, opened = Console(as_json), Index.open(index)
    with console.progress("import", opened.summary.rows) as tracker:
        found = import_uids(opened, file, name, replace_ledger=replace, on_progress=tracker.advance)
    if found.absent:
        console.note(f"{found.absent:,} of the {found.listed:,} uids are of no usable sample of this index")
    if found.repeated:
        console.note(f"{found.repeated:,} uids are listed more than once: their samples weigh as often as they are listed")
    summary = found.ledger
    console.say(
        f"ledger {name} keeps {summary.kept:,} of {opened.summary.samples:,} samples; next: mm train RECIPE --data {index} --ledger {name}"
    )
    console.result(
        {"kept": summary.kept, "dropped": summary.dropped, "listed": found.listed, "absent": found.absent, "repeated": found.repeated}
        | {"ledger": name, "fingerprint": summary.fingerprint}
    )


def dedup(
    index: Annotated[str, typer.Argument(help="An index, or INDEX#LEDGER,…")],
    name: Annotated[str, typer.Option(help="Name of the ledger to write.")],
    against: Annotated[
        list[str] | None,
        typer.Option(metavar="INDEX[#LEDGER,…]", help="Another index, such as a test set: what is in it is dropped. Again for several."),
    ] = None,
    ledger: Ledgers = None,
    method: Annotated[
        list[str] | None,
        typer.Option(help="exact (every byte), picture (every byte of the picture), perceptual, semantic; again for several."),
    ] = None,
    distance: Annotated[int, typer.Option(help="perceptual: bits in which the hashes may differ.")] = 8,
    similarity: Annotated[float, typer.Option(help="semantic: the least cosine of the embeddings.")] = 0.95,
    embeddings: Annotated[str, typer.Option(help="semantic: name of the scores that hold them.")] = "embeddings",
    keep: Annotated[str, typer.Option(help="Of a group keep pixels (the largest picture), bytes, similarity or first.")] = "pixels",
    only_against: Annotated[bool, typer.Option("--only-against", help="Look for no duplicates within the index.")] = False,
    replace: Annotated[bool, typer.Option("--replace", help="Put it in the place of a ledger of this name by other rules.")] = False,
    as_json: Json = False,
) -> None:
    """Find duplicates, and what is in another index, and write a ledger that keeps one sample of each group.

    Example: mm data dedup index --name unique --against test-index, after mm data score index hash
    """
    from mm_core.config import validate
    from pipelines.curate.dedup import DedupConfig, dedup_index

    console = Console(as_json)
    settings = {"distance": distance, "similarity": similarity, "embeddings": embeddings, "keep": keep, "only_against": only_against}
    config = validate(DedupConfig, settings | ({"methods": method} if method else {}))
    (opened, among), others = opened_among(index, ledger), [opened_among(each, None) for each in against or ()]
    with console.progress("dedup", unit="tasks") as tracker:
        summary = dedup_index(
            opened,
            name,
            config,
            against=others,
            among=among,
            replace_ledger=replace,
            on_progress=lambda what: tracker.advance(1, what),
        )
    counted = list(dict.fromkeys(key for counts in summary.counts.values() for key in counts))
    console.table(("by", *counted), [(by, *(counts.get(key, "") for key in counted)) for by, counts in summary.counts.items()])
    console.say(
        f"ledger {name} keeps {summary.kept:,} of {opened.summary.samples:,} samples; next: mm train RECIPE --data {index} --ledger {name}"
    )
    groups = {by: counts["groups"] for by, counts in summary.counts.items() if "groups" in counts}
    console.result({"kept": summary.kept, "dropped": summary.dropped, "groups": groups, "ledger": name, "counts": summary.counts})
