"""The command line's composition root: joins the packages' commands, holds `mm demo`, and turns errors into one clear line."""

from __future__ import annotations

import os
import signal
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from glob import glob
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

import typer

import cluster.cli
import pipelines.cli
import serve.cli
from mm_core.errors import MMError
from pipelines.options import model_store
from pipelines.session import ray_session

if TYPE_CHECKING:
    import ray.serve

    from mm_core.console import Console
    from serve.client import AsyncClient as AsyncClient
    from serve.client import Client as Client
    from serve.client import RefusedError as RefusedError
    from serve.run import Server

app = typer.Typer(
    name="mm",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Multimodal pretraining on Ray: shards in; a trained, tracked, registered and served model out.",
)
_INTERRUPTED = 130
_CLIENTS = ("AsyncClient", "Client", "RefusedError")


def __getattr__(name: str) -> Any:
    """`mm.Client`, `mm.AsyncClient` and `mm.RefusedError`, imported when somebody asks: commands need none of them."""
    if name in _CLIENTS:
        import serve.client

        return getattr(serve.client, name)
    raise AttributeError(f"module 'mm' has no attribute {name!r}")


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"mm {version('mm-pretrain')}")
        raise typer.Exit


@app.callback()
def _root(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    show_version: Annotated[bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    if debug:
        os.environ["MM_DEBUG"] = "1"


@app.command()
def demo(
    data: Annotated[str | None, typer.Option(help="Your own shards, e.g. 'path/*.tar'; by default scenes are rendered.")] = None,
    folder: Annotated[str, typer.Option(help="Where everything is put.")] = "demo",
    keep: Annotated[bool, typer.Option("--keep", help="Leave the page and the endpoint up at the end, until Ctrl-C.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="End standard output with one JSON object.")] = False,
) -> None:
    """The main job, end to end, on this machine: shards, index, training, evaluation, registry, endpoint.

    Example: mm demo; mm demo --data "shards/*.tar"
    """
    from mm_core.console import Console
    from pipelines.shards import expand_shards

    console = Console(as_json)
    if data is not None:
        expand_shards(glob(data) or [data])  # what is wrong with them is told before anything starts
    with ray_session():
        result = _run_demo(console, data, Path(folder) / f"{datetime.now():%Y%m%d-%H%M%S}", keep)
    console.result(result)
    raise typer.Exit(0 if result["passed"] else 1)


def above_chance(report: Mapping[str, Mapping[str, tuple[float, float]]]) -> bool:
    """Whether zero-shot top-1 and recall at 5 both ways are each at least three times what guessing gives."""
    checked = {"zeroshot": ("top1",), "retrieval": ("t2i_r5", "i2t_r5")}
    return all(report[kind][key][0] >= 3 * report[kind][key][1] for kind in report for key in checked[kind])


def _run_demo(console: Console, shards: str | None, folder: Path, keep: bool) -> dict[str, Any]:
    """Every stage calls what the command of that name calls."""
    from dataclasses import asdict

    from mm_core.data.ledger import Source
    from pipelines.evaluate import evaluate_model
    from pipelines.registry import register_bundle
    from pipelines.tracking import describe_run
    from pipelines.train.driver import TrainRequest, train

    index, ledger, retrieval, zeroshot = _demo_data(console, shards, folder)

    console.stage("3/7 train clip-tiny with two workers: Ray Data → Ray Train → MLflow")
    run, _ = pipelines.cli.resolve_run("clip-tiny", [f"storage={folder}/runs", "resources.workers=2"])
    trained = train(TrainRequest(run, (Source(index=index, ledgers=ledger),), name="clip-demo"), console)
    tracking, bundle = run.tracking.resolved(), Path(trained.bundle)

    console.stage("4/7 evaluate what was held out")
    held_out = ("heldout",) if ledger else ()
    report = evaluate_model(
        str(bundle), zeroshot=zeroshot, retrieval=[retrieval], ledgers=held_out, tracking=tracking, plots=folder / "plots", console=console
    )

    console.stage("5/7 register the bundle as clip-demo@champion")
    metrics = {f"{kind}/{key}": value for kind, values in report.items() for key, (value, _) in values.items()}
    model = register_bundle(tracking, name="clip-demo", bundle_folder=bundle, alias="champion", metrics=metrics)
    console.note(f"{model.reference} is version {model.version}")

    console.stage("6/7 embed what was held out, serve it with Ray Serve, ask it over HTTP")
    vectors = _searchable(console, model.reference, retrieval, held_out, folder / "vectors")
    with _endpoint(model.reference, vectors) as server:
        served = _ask(console, server.url, *_question(retrieval, held_out))

        console.stage("7/7 figures")
        rows = [
            (f"{kind} {key}", f"{value:.3f}", f"{chance:.3f}") for kind, values in report.items() for key, (value, chance) in values.items()
        ]
        console.table(("held-out scenes" if shards is None else "held-out samples", "model", "chance"), rows)
        above = above_chance(report)
        if shards is None:
            console.say("passed: at least 3 × chance" if above else "FAILED: below 3 × chance")
        elif not above:
            console.say("Below 3 × chance: a few minutes are little for photographs; mm train clip-tiny-photo is made for them")
        console.say(f"\nSee the run:    .venv/bin/{describe_run(tracking, trained.run_id)}")
        console.say(f"See the plots:  {folder}/plots")
        console.say(f"Serve it again: .venv/bin/mm serve {model.reference} --search {vectors}")
        console.say("Your own data:  make demo DATA='path/*.tar', or follow the README from `mm data index`")
        if keep:
            console.say(f"The page:       {server.url} until Ctrl-C")
            server.wait()
        else:
            console.say("The page:       http://127.0.0.1:8000 once it is served again; `mm demo --keep` leaves it up")
    return {
        "passed": above or shards is not None,
        "train": asdict(trained),
        "eval": {kind: {key: value for key, (value, _) in values.items()} for kind, values in report.items()},
        "register": asdict(model),
        "serve": served,
    }


def _demo_data(console: Console, shards: str | None, folder: Path) -> tuple[str, tuple[str, ...], str, str | None]:
    """Index, ledgers to train on, what retrieval is measured on, and the zero-shot folder where there is one."""
    from mm_core.data.split import split
    from mm_core.data.synth.corpus import SynthConfig, write_corpus
    from pipelines.index import build_index

    corpus = folder / "corpus"
    if shards is None:
        console.stage("1/7 render scenes with captions")
        settings = SynthConfig(samples=8000)
        with console.progress("draw scenes", settings.samples + settings.heldout_samples + settings.zeroshot_samples) as tracker:
            write_corpus(corpus, settings, workers=2, on_progress=tracker.advance)
    else:
        console.stage(f"1/7 your shards: {shards}")
    console.stage("2/7 index: every sample becomes addressable")
    sources = [str(corpus / "train")] if shards is None else glob(shards) or [shards]
    with console.progress("index", unit="shards") as tracker:
        index = build_index(sources, str(folder / "index"), on_progress=tracker.advance)
    for reason, count in index.summary.bad.items():
        console.note(f"{count:,} samples cannot be used: {reason}")
    if shards is None:
        return index.url, (), str(corpus / "heldout"), str(corpus / "zeroshot")
    ours, theirs = split(index, heldout=0.1, seed=0)
    console.note(f"{ours.kept:,} samples to train on, {theirs.kept:,} held out")
    return index.url, ("train",), index.url, None


def _question(retrieval: str, ledgers: tuple[str, ...]) -> tuple[bytes, list[str]]:
    """A held-out image with its caption among the captions of others: what the endpoint is asked."""
    import numpy as np

    from mm_core.data.index import Index
    from mm_core.data.ledger import compile_kept
    from mm_core.data.reader import IndexReader
    from mm_core.data.sample import Sample
    from pipelines.index import build_index

    with TemporaryDirectory() as temporary:
        index = Index.open(retrieval) if ledgers else build_index([retrieval], f"{temporary}/index")
        kept = compile_kept(index, ledgers).ordinals
        chosen = np.asarray(kept[:: max(1, len(kept) // 5)][:5])
        samples = [sample for sample in IndexReader(index).read(chosen) if isinstance(sample, Sample)]
    return samples[0].image or b"", [sample.captions[0] for sample in samples]


def _searchable(console: Console, reference: str, shards: str, ledgers: tuple[str, ...], out: Path) -> Path:
    """What `mm embed` and `mm search-index` do."""
    from pipelines.embed import embed
    from pipelines.search_index import SearchOptions, make_searchable

    store = model_store()
    pinned = store.pin(reference)
    with console.progress("embed") as tracker:
        embed(store.fetch(pinned), pinned, [shards], out, ledgers=ledgers, on_progress=tracker.advance)
    make_searchable(out, SearchOptions())
    return out


@contextmanager
def _endpoint(reference: str, vectors: Path) -> Iterator[Server]:
    """What `mm serve` does, on a free port."""
    from mm_core.ports import free_port
    from serve.cli import wanted_models
    from serve.config import ServeConfig
    from serve.run import look_at, start

    config = ServeConfig(port=free_port(), search=str(vectors.absolute()))
    server = start(look_at(wanted_models([reference], ()), config, model_store()))
    try:
        yield server
    finally:
        server.stop()


def _ask(console: Console, url: str, image: bytes, labels: list[str]) -> dict[str, Any]:
    """Send the image with the labels, and the first of them as a search; print the answers."""
    from serve.client import Client

    with Client(url) as client:
        scores = client.classify(image, labels)
        found = client.search(labels[0], limit=3).results
    console.say(f"POST {url}/v1/classify   a held-out picture that shows: {labels[0]}")
    console.table(("the endpoint's answer", "score"), [(score.label, f"{score.score:.3f}") for score in scores])
    console.say(f"POST {url}/v1/search   {labels[0]}")
    console.table(("a picture was found of which the caption is", "cosine"), [(one.caption, f"{one.score:.3f}") for one in found])
    return {"url": url, "asked": labels[0], "answer": scores[0].label, "found": found[0].caption if found else None}


def serving(args: Mapping[str, Any]) -> ray.serve.Application:
    """The application of a serve.yaml that `mm serve --write-config` wrote: `import_path: mm:serving`."""
    return serve.cli.from_yaml(args, model_store())


pipelines.cli.attach(app)
serve.cli.attach(app, model_store, ray_session)
cluster.cli.attach(app)


def main() -> None:
    """Run a command. Exit codes: 0 done, 1 failed, 2 wrong use, 130 interrupted."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    debug = "--debug" in sys.argv or bool(os.environ.get("MM_DEBUG"))
    if not debug:
        warnings.simplefilter("ignore")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what a cluster sends to stop a job ends it as Ctrl-C does
    try:
        app()
    except MMError as error:
        if debug:
            raise
        _fail(f"error: {error}", error.exit_code)
    except KeyboardInterrupt:
        _fail("interrupted", _INTERRUPTED)
    except SystemExit as end:
        if end.code == _INTERRUPTED:  # typer turns Ctrl-C in a command into this, without a word
            _fail("interrupted", _INTERRUPTED)
        raise
    except Exception as error:
        if debug:
            raise
        what = " ".join(str(error).split())
        _fail(f"internal error: {type(error).__name__}: {what} (mm --debug … shows where; please report it)", 1)


def _fail(line: str, code: int) -> None:
    sys.stderr.write(f"{line}\n")
    sys.exit(code)


if __name__ == "__main__":
    main()
