"""The part of `mm data` that chooses among an index's samples: scores, rules, ledgers. Each command is a thin layer over the module that
does the work, which is imported inside it, so that `mm --help` is quick."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mm_core.console import Console
from mm_core.errors import ConfigError
from pipelines.options import Json


def attach(data: typer.Typer) -> None:
    """Add these commands to `mm data`."""
    data.command("score")(score)
    data.command("filter")(filter_samples)
    data.command("rules")(rules)


def score(
    index: Annotated[str, typer.Argument(help="An index.")],
    what: Annotated[str, typer.Argument(help="What to measure: image (sharpness and information of every picture).")],
    as_json: Json = False,
) -> None:
    """Measure of every sample what the index does not hold, for rules that read it. After a stop, the same command goes on.

    Example: mm data score index image
    """
    from mm_core.data.index import Index
    from pipelines.curate.score import score_images

    console, opened = Console(as_json), Index.open(index)
    if what != "image":
        raise ConfigError(f"there is nothing called {what!r} to measure; known: image")
    with console.progress("score", opened.summary.rows) as tracker:
        summary = score_images(opened, on_progress=tracker.advance)
    if summary.unreadable:
        console.table(("could not be measured because", "samples"), list(summary.unreadable.items()))
    console.say(f"{', '.join(summary.columns)} of {opened.summary.samples:,} samples are in {opened.url}/scores/{what}")
    console.result({"columns": summary.columns, "samples": opened.summary.samples, "unreadable": summary.unreadable})


def filter_samples(
    index: Annotated[str, typer.Argument(help="An index.")],
    rules: Annotated[Path, typer.Option(help="YAML file of named rules; mm data rules lists them.")],
    name: Annotated[str, typer.Option(help="Name of the ledger to write.")],
    replace: Annotated[bool, typer.Option("--replace", help="Put it in the place of a ledger of this name by other rules.")] = False,
    as_json: Json = False,
) -> None:
    """Lay rules over an index and write a ledger: who is kept, and else the first rule that a sample fails. No shard is copied.

    Example: mm data filter index --rules rules.yaml --name clean, then mm train clip-tiny --data index --ledger clean
    """
    from mm_core.curation.ruleset import RuleSet
    from mm_core.data.index import Index
    from pipelines.curate.filter import filter_index

    console, rule_set, opened = Console(as_json), RuleSet.read(rules), Index.open(index)
    with console.progress("filter", opened.summary.rows) as tracker:
        summary = filter_index(opened, rule_set, name, replace_ledger=replace, on_progress=tracker.advance)
    of = max(1, opened.summary.samples)
    rows = [
        (rule, dropped := summary.dropped.get(rule, 0), f"{dropped / of:.1%}", fails, f"{fails / of:.1%}")
        for rule, fails in summary.failed.items()
    ]
    console.table(("rule", "dropped by it first", "", "fail it in all", ""), rows)
    console.say(
        f"ledger {name} keeps {summary.kept:,} of {opened.summary.samples:,} samples; next: mm train RECIPE --data {index} --ledger {name}"
    )
    console.result(
        {"kept": summary.kept, "dropped": summary.dropped, "failed": summary.failed, "ledger": name, "fingerprint": summary.fingerprint}
    )


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
