"""`mm data report` and `mm data peek`: thin layers over what does the work, which is imported inside them, so that `mm --help` is quick."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from mm_core.console import Console
from pipelines.options import Json, Ledgers, Settings, opened_among, tracking_config


def report(
    index: Annotated[str, typer.Argument(help="An index, or INDEX#LEDGER,…")],
    ledger: Ledgers = None,
    compare: Annotated[tuple[str, str] | None, typer.Option(help="Two ledgers: what both keep, one alone, the other alone, none.")] = None,
    embeddings: Annotated[str | None, typer.Option(help="Scores with embeddings of the pictures: adds a map of them.")] = None,
    out: Annotated[str, typer.Option(help="The HTML file to write.")] = "report.html",
    samples_per_gallery: Annotated[int, typer.Option(min=1, max=100, help="Pictures of each kind.")] = 12,
    seed: Annotated[int, typer.Option(min=0, help="Of the draw of samples.")] = 0,
    run_id: Annotated[str | None, typer.Option(help="The MLflow run to keep it with, too.")] = None,
    settings: Settings = None,
    as_json: Json = False,
) -> None:
    """Write one HTML file about an index and its ledgers: what was dropped and why, values with their thresholds, samples of each kind.

    Example: mm data report index --ledger clean --out report.html
    """
    from contextlib import ExitStack
    from dataclasses import asdict

    from mm_core.data.index import Index
    from mm_core.data.ledger import Source
    from pipelines.curate.report.write import add_to_run, check_run, write_report

    console, source = Console(as_json), Source.parse(index, ledger or ())
    opened = Index.open(source.index)
    if run_id is not None:
        check_run(tracking_config(settings), run_id)
    with ExitStack() as counting:
        tracker = counting.enter_context(console.progress("report", 2 * opened.summary.rows, "rows"))

        def step(text: str) -> None:
            counting.close()
            console.note(text)

        found = write_report(
            opened,
            source.ledgers,
            out,
            compare=compare,
            embeddings=embeddings,
            gallery=samples_per_gallery,
            seed=seed,
            on_progress=tracker.advance,
            on_step=step,
        )
    if found.unreadable:
        console.table(("samples drawn that cannot be shown", ""), list(found.unreadable.items()))
    if run_id is not None:
        add_to_run(tracking_config(settings), run_id, found)
    console.say(f"{out} ({found.bytes / 1e6:.1f} MB, {found.pictures} pictures) is one file: open it in a browser, or pass it on")
    console.result(asdict(found))


def peek(
    index: Annotated[str, typer.Argument(help="An index, or INDEX#LEDGER,…")],
    ledger: Ledgers = None,
    reason: Annotated[str | None, typer.Option(help="Show what is dropped for this reason; else what is kept.")] = None,
    n: Annotated[int, typer.Option("--n", min=1, max=500, help="Samples.")] = 8,
    seed: Annotated[int, typer.Option(min=0, help="Of the draw.")] = 0,
    out: Annotated[str | None, typer.Option(help="Write them with their pictures to this HTML file.")] = None,
    as_json: Json = False,
) -> None:
    """Show a few samples as training sees them, or some that ledgers drop for one reason.

    Example: mm data peek index --ledger clean, or mm data peek index --ledger clean --reason few_words --out dropped.html
    """
    from pipelines.curate.peek import peek as look
    from pipelines.curate.report.page import render_samples
    from pipelines.curate.report.write import check_page, write_page

    console = Console(as_json)
    opened, among = opened_among(index, ledger)
    if out is not None:
        check_page(out)
    found = look(opened, among, n, reason=reason, seed=seed, pictures=out is not None)
    rows = [
        (one.shown.place, one.picture, one.bytes, one.decided or "kept", "\n".join(one.shown.captions) or one.shown.problem or "")
        for one in found
    ]
    console.table(("sample", "picture", "bytes", "decided", "captions"), rows, lines=True)
    result: dict[str, Any] = {"samples": [one.facts() for one in found]}
    if out is not None:
        title = f"Dropped for {reason}" if reason else "Kept"
        samples = [(one.shown, one.decided) for one in found]
        size = write_page(out, render_samples(opened, among.ledgers, title, samples, among.mask, seed))
        console.say(f"{out} ({size / 1e3:,.0f} kB) has their pictures: open it in a browser")
        result["out"] = out
    console.result(result)
