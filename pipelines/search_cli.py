"""`mm embed` and `mm search-index`."""

from __future__ import annotations

from typing import Annotated

import typer

from mm_core.console import Console
from mm_core.errors import ConfigError
from pipelines.options import Json, Ledgers, Settings, model_store


def attach(app: typer.Typer) -> None:
    """Add the commands."""
    app.command("embed")(embed)
    app.command("search-index")(search_index)


def embed(
    model: Annotated[str, typer.Argument(help="A bundle's folder, models:/NAME@ALIAS, or a hub id.")],
    shards: Annotated[list[str], typer.Argument(help="An index, or shards as for mm data index.")],
    out: Annotated[str, typer.Option(help="Folder of the vectors.")],
    ledger: Ledgers = None,
    settings: Settings = None,
    as_json: Json = False,
) -> None:
    """Vectors of all pictures and captions, as float16. After a kill, the same command goes on where it was.

    Example: mm embed models:/clip-demo@champion corpus/heldout --out vectors, then mm search-index vectors
    """
    from mm_core.search.embeddings import vectors_folder
    from pipelines.embed import embed as embed_samples

    console, store, place = Console(as_json), model_store(settings), vectors_folder(out)
    reference = store.pin(model)
    with console.progress("embed") as tracker:

        def total(rows: int) -> None:
            tracker.total = rows

        summary = embed_samples(
            store.fetch(reference), reference, shards, place, ledgers=ledger or (), on_progress=tracker.advance, on_rows=total
        )
    if summary.unreadable:
        console.table(("cannot be embedded because", "samples"), list(summary.unreadable.items()))
    console.say(f"{out} holds vectors of {summary.samples:,} samples by {summary.model}; next: mm search-index {out}")
    console.result({"samples": summary.samples, "out": out, "unreadable": summary.unreadable, "dimensions": summary.embed_dim})


def search_index(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="What mm embed made.")],
    kind: Annotated[str, typer.Option(help="exact, ivf or hnsw; auto is exact below 100,000 vectors, else ivf.")] = "auto",
    codes: Annotated[str, typer.Option(help="fp16, or smaller: int8, pq.")] = "fp16",
    recall: Annotated[float, typer.Option(min=0.1, max=1, help="At 10, that a search is tuned to.")] = 0.95,
    as_json: Json = False,
) -> None:
    """Make vectors searchable; what the search leaves out beside an exact one is measured and stored with it.

    Example: mm search-index vectors, then mm serve MODEL --search vectors
    """
    from typing import get_args

    from mm_core.search.embeddings import vectors_folder
    from mm_core.search.nearest import Codes, Kind
    from pipelines.search_index import SearchOptions, make_searchable, table_rows

    for option, value, known in (("--kind", kind, get_args(Kind)), ("--codes", codes, get_args(Codes))):
        if value not in known:
            raise ConfigError(f"{option} {value!r} is not one of {', '.join(known)}")
    console = Console(as_json)
    options = SearchOptions(kind, codes, recall)  # type: ignore[arg-type]  # both were looked at above
    with console.progress("read vectors") as tracker:

        def total(rows: int) -> None:
            tracker.total = rows

        summary = make_searchable(vectors_folder(folder), options, on_progress=tracker.advance, on_rows=total, on_note=console.note)
    console.table(("", "vectors", "kind", "probes", "recall@10", "size"), list(table_rows(summary)))
    console.say(f"next: mm serve {summary.model} --search {folder}")
    console.result(summary.model_dump(mode="json"))
