"""`mm data score`: a thin layer over `measure`, which is imported inside it, so that `mm --help` is quick."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Literal

import typer

from mm_core.console import Console
from pipelines.options import Json, Ledgers, Settings, opened_among


def score(
    index: Annotated[str, typer.Argument(help="An index, or INDEX#LEDGER,…")],
    what: Annotated[
        str,
        typer.Argument(
            help="What to measure: image (sharpness and information of every picture), hash (what dedup compares), similarity (of picture"
            " and captions, by a model), embeddings (similarity, and both sides' vectors), head (a classifier head over embeddings)."
        ),
    ],
    name: Annotated[str | None, typer.Option(help="Of these scores, so that several stand side by side; by default WHAT.")] = None,
    model: Annotated[str | None, typer.Option(help="similarity, embeddings: a bundle's folder, models:/NAME@ALIAS, or a hub id.")] = None,
    fold: Annotated[
        list[str] | None,
        typer.Option(metavar="LEDGER=MODEL", help="similarity: score this ledger's samples by this model; again for each fold."),
    ] = None,
    weights: Annotated[str | None, typer.Option(help="head: its safetensors file, or OWNER/REPOSITORY[:FILE] on the hub.")] = None,
    sha256: Annotated[str | None, typer.Option(help="head: the SHA-256 that the weights must have.")] = None,
    embeddings: Annotated[str | None, typer.Option(help="head: name of the embeddings it is laid over; by default embeddings.")] = None,
    between: Annotated[
        Literal["relu", "identity"] | None, typer.Option(help="head: what stands between its layers; by default relu.")
    ] = None,
    output: Annotated[
        Literal["identity", "sigmoid"] | None,
        typer.Option(help="head: what is made of its outputs; by default identity: they stay as they are."),
    ] = None,
    ledger: Ledgers = None,
    settings: Settings = None,
    as_json: Json = False,
) -> None:
    """Measure of every sample, or of those that ledgers keep, what the index does not hold, for rules that read it. After a stop, the
    same command goes on.

    Example: mm data score index image; mm data score index similarity --model runs/NAME/bundle;
    cross-fitted: mm data score index similarity --fold a=runs/on-b/bundle --fold b=runs/on-a/bundle
    """
    from pipelines.curate.measure import Request, measure

    given = {"name": name, "model": model, "fold": fold, "weights": weights, "sha256": sha256}
    given |= {"embeddings": embeddings, "between": between, "output": output}
    console = Console(as_json)
    request = Request(what, {option: value for option, value in given.items() if value})
    opened, among = opened_among(index, ledger)
    with console.progress("score", opened.summary.rows) as tracker:
        summary = measure(
            opened,
            request,
            among=among,
            resolve=partial(_resolve, settings=settings),
            on_progress=tracker.advance,
            on_note=console.note,
        )
    if summary.unreadable:
        console.table(("could not be measured because", "samples"), list(summary.unreadable.items()))
    columns = [*summary.columns, *summary.vectors]
    console.say(f"{', '.join(columns)} of {opened.summary.samples:,} samples are in {opened.url}/scores/{name or what}")
    console.result(
        {"name": name or what, "columns": columns, "samples": opened.summary.samples, "unreadable": summary.unreadable}
        | {"fingerprint": summary.fingerprint}
    )


def _resolve(model: str, settings: list[str] | None) -> str:
    from pipelines.cli import resolve_model

    return resolve_model(model, settings)
