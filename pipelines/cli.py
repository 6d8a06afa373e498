"""`mm data`, `mm train`, `mm eval`, `mm register`, `mm config`. Each command is a thin layer over the module that does the work; those
that choose among samples are in `curate/cli.py`, those of search in `search_cli.py`.

Ray, torch and MLflow are imported inside the commands, so that `mm --help` is quick.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from mm_core.console import Console
from mm_core.errors import ConfigError
from pipelines.curate.cli import attach as attach_curation
from pipelines.options import Json, Ledgers, Settings, model_store, opened_among, tracking_config
from pipelines.search_cli import attach as attach_search

if TYPE_CHECKING:
    from mm_core.data.ledger import Source
    from pipelines.tracking import TrackingConfig
    from pipelines.train.config import TrainRun
    from pipelines.train.read_cost import Prices

_CUT_SHOWN = 5

data = typer.Typer(no_args_is_help=True, help="Make, index and divide image-text shards.")
imports = typer.Typer(no_args_is_help=True, help="Turn models of other programs into bundles.")
config = typer.Typer(no_args_is_help=True, help="Show recipes and resolved configurations.")


def attach(app: typer.Typer) -> None:
    """Add this package's commands to the program."""
    attach_curation(data)
    app.add_typer(data, name="data")
    app.command("train")(train)
    app.command("eval")(evaluate)
    attach_search(app)
    app.add_typer(imports, name="import")
    app.command("register")(register)
    app.add_typer(config, name="config")


@data.command("synth")
def synth(
    out: Annotated[Path, typer.Argument(help="Folder to make.")],
    samples: Annotated[int, typer.Option(min=0, help="Training samples.")] = 8000,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    image_size: Annotated[int, typer.Option(min=32, max=1024, help="Side of the pictures, pixels.")] = 96,
    questions: Annotated[int, typer.Option(min=0, help="Training scenes that have a question too, its answer as class.")] = 0,
    matching: Annotated[int, typer.Option(min=0, help="Training scenes that have a true or false caption too, which one as class.")] = 0,
    workers: Annotated[int, typer.Option(min=1, help="Processes that draw.")] = 2,
    as_json: Json = False,
) -> None:
    """Make an offline corpus of rendered scenes with captions, as shards.

    Example: mm data synth corpus --samples 8000 --seed 0
    """
    from mm_core.data.synth.corpus import SynthConfig, write_corpus

    console = Console(as_json)
    settings = SynthConfig(samples=samples, seed=seed, image_size=image_size, question_samples=questions, matching_samples=matching)
    with console.progress("draw scenes", sum(settings.parts.values())) as tracker:
        write_corpus(out, settings, workers=workers, on_progress=tracker.advance)
    console.table((str(out), "samples"), [(part, f"{count:,}") for part, count in settings.parts.items()])
    console.say(f"next: mm data index {out}/{next((part for part in settings.parts if part.endswith('train')), 'heldout')} --out INDEX")
    made = {"heldout": settings.heldout_samples, "zeroshot": settings.zeroshot_samples, "questions": questions, "matching": matching}
    console.result({"samples": samples} | made | {"out": str(out)})


@data.command("index")
def index(
    shards: Annotated[list[str], typer.Argument(help="Shards: files, folders, globs, ranges like {00000..00012}.tar, URLs.")],
    out: Annotated[str, typer.Option(help="Folder or URL of the index to write.")],
    base: Annotated[str | None, typer.Option(help="An earlier index: shards it holds unchanged are not read again.")] = None,
    modality: Annotated[str, typer.Option(help="What a usable sample has: image-text, image or text.")] = "image-text",
    max_bad_fraction: Annotated[float, typer.Option(min=0, max=1, help="Stop if a larger share cannot be used.")] = 0.1,
    as_json: Json = False,
) -> None:
    """Read every shard once and write an index of its samples. After a kill, the same command goes on where it was.

    Example: mm data index "shards/{00000..00099}.tar" --out index, then, with more shards, mm data index shards --out index2 --base index
    """
    import time

    from pipelines.index import build_index

    console, started = Console(as_json), time.monotonic()
    need = _need(modality)
    with console.progress("index", unit="shards") as tracker:

        def total(shard_count: int) -> None:
            tracker.total = shard_count

        summary = build_index(
            shards, out, base=base, need=need, max_bad_fraction=max_bad_fraction, on_progress=tracker.advance, on_shards=total
        ).summary
    if summary.bad:
        console.table(("cannot be used because", "samples"), list(summary.bad.items()))
    for url, start in list(summary.cut.items())[:_CUT_SHOWN]:
        console.note(
            f"{url} was cut off at byte {start:,}, and what came behind is missing: copy it again, and index it anew with --base {out}"
        )
    if summary.duplicate_uids:
        console.note(f"{summary.duplicate_uids:,} samples have the uid of another one")
    console.say(f"{summary.samples:,} samples of {summary.shards:,} shards ({summary.bytes / 1e6:,.1f} MB) are indexed in {out}")
    result = {"shards": summary.shards, "samples": summary.samples, "bad": summary.bad, "bytes": summary.bytes}
    console.result(result | {"seconds": round(time.monotonic() - started, 2), "fingerprint": summary.fingerprint})


@data.command("split")
def split(
    index: Annotated[str, typer.Argument(help="An index, or INDEX#LEDGER,…")],
    heldout: Annotated[float, typer.Option(min=0.0, max=1.0, help="Share that is held out.")] = 0.1,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    names: Annotated[str, typer.Option(help="Of the two ledgers; the second has what is held out.")] = "train,heldout",
    ledger: Ledgers = None,
    replace: Annotated[bool, typer.Option("--replace", help="Put them in the place of ledgers of these names by other rules.")] = False,
    as_json: Json = False,
) -> None:
    """Divide an index, or what ledgers keep of it, into two ledgers, by default `train` and `heldout`.

    Example: mm data split index --heldout 0.1, then mm train clip-tiny --data index --ledger train;
    two folds: mm data split index --heldout 0.5 --names a,b
    """
    from mm_core.data.split import split as divide

    console = Console(as_json)
    one, comma, other = names.partition(",")
    if not comma:
        raise ConfigError(f"--names {names!r} are not two names, for example --names a,b")
    opened, among = opened_among(index, ledger)
    ours, theirs = divide(opened, heldout=heldout, seed=seed, names=(one, other), among=among, replace_ledgers=replace)
    console.say(f"ledger {one} keeps {ours.kept:,} samples, ledger {other} {theirs.kept:,}")
    console.result({one: ours.kept, other: theirs.kept})


def train(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE_OR_FILE", help="A recipe's name, or a YAML file with `recipe:` and changes.")],
    data: Annotated[
        list[str] | None, typer.Option(help="The index to train on, or INDEX#LEDGER,…; again for several, mixed as `data.mix` says.")
    ] = None,
    ledger: Ledgers = None,
    init: Annotated[str | None, typer.Option(help="Start from the weights of a bundle or hub id.")] = None,
    workers: Annotated[
        str | None, typer.Option(metavar="N|N..M", help="Ranks; 2..8: as many as the cluster has room for, at least two.")
    ] = None,
    settings: Settings = None,
    name: Annotated[str | None, typer.Option(help="Name of the run; by default recipe and time.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue a run from its last checkpoint.")] = False,
    or_resume: Annotated[
        bool,
        typer.Option("--or-resume", help="Continue the run called --name if there is one, else start it: for jobs that are started again."),
    ] = False,
    audit: Annotated[str | None, typer.Option(help="Write which sample was consumed when, as Parquet, to this folder.")] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Compare every sample read with its digest; the same as data.verify.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would run and what its reads cost, and stop.")] = False,
    samples_per_s: Annotated[float | None, typer.Option(min=0, help="Of the dry run: the rate for which requests/s are given.")] = None,
    request_price: Annotated[float, typer.Option(min=0, help="Of the dry run: dollars for 1,000 GET requests.")] = 0.0004,
    gb_price: Annotated[float, typer.Option(min=0, help="Of the dry run: dollars for a GB read; 0 in the store's own region.")] = 0.0,
    gpus: Annotated[int | None, typer.Option(min=1, help="Of the dry run: what a step would cost on so many GPUs.")] = None,
    gpu_type: Annotated[str, typer.Option(help="Of --gpus: a100-40, a100-80, h100 or h200.")] = "h100",
    mfu: Annotated[
        float, typer.Option(min=0.01, max=1, help="Of --gpus: share of a GPU's operations that training is taken to reach.")
    ] = 0.3,
    as_json: Json = False,
) -> None:
    """Train a model; every restart continues the same run.

    Example: mm train clip-tiny --data index --workers 2 --set steps=500;
    two indexes, three chunks of A to one of B: mm train clip-tiny --data A --data B --set "data.mix.weights=[3, 1]"
    """
    from mm_core.data.ledger import Source
    from pipelines.tracking import describe_run

    console = Console(as_json)
    overrides = list(settings or [])
    overrides += worker_settings(workers) if workers else []
    overrides += [f"init={init}"] if init else []
    overrides += ["data.verify=true"] if verify else []
    run, origins = resolve_run(recipe, overrides)
    if dry_run and gpus is not None:
        from pipelines.train.scale import describe_scale

        report = describe_scale(run, gpus, gpu_type, mfu=mfu)
        console.table(("", ""), list(report.items()))
        console.result(report)
        return
    if not data:
        raise ConfigError("nothing to train on: give --data INDEX")
    sources = tuple(Source.parse(text, ledger or ()) for text in data)
    if dry_run:
        from pipelines.train.read_cost import Prices

        console.table(("key", "value", "from"), [(k, v, origins.get(k, "default")) for k, v in _flat(run)])
        _dry_run(run, sources, Prices(request_price, gb_price), samples_per_s, console)
        return
    from pipelines.train.driver import TrainRequest
    from pipelines.train.driver import train as run_training

    result = run_training(TrainRequest(run, sources, name=name, resume=resume, or_resume=or_resume, audit=audit), console)
    rows = {key: value for key, value in asdict(result).items() if key not in ("run_id", "name")}
    console.table(("", result.name), list(rows.items()))
    console.say(f"follow: {describe_run(run.tracking.resolved(), result.run_id)}")
    console.say(f"next: {_next(run.objective.kind, result.bundle)}")
    console.result(asdict(result))


def _next(objective: str, bundle: str) -> str:
    """What a run's bundle is for."""
    match objective:
        case "classify":
            return f"mm eval {bundle} --classify INDEX"
        case "codebook":
            return f"mm train flava-tiny --data INDEX --set model.codebook_source={bundle}"
        case _:
            return f"mm eval {bundle} --retrieval SHARDS; mm serve {bundle}"


def _dry_run(run: TrainRun, sources: Sequence[Source], prices: Prices, samples_per_s: float | None, console: Console) -> None:
    from pipelines.train.dry_run import describe
    from pipelines.train.read_cost import EXPORT_ABOVE

    report = describe(run, sources, prices=prices, samples_per_s=samples_per_s)
    console.table(("", ""), list(report.items()))
    if (times := report.get("read_amplification", 0)) > EXPORT_ABOVE:
        console.note(
            f"reads {times} times the bytes it needs: a smaller data.gap_bytes reads less in more requests; shards of the kept samples"
            f" alone read nothing in vain: {'; '.join(f'mm data export {source} --out SHARDS' for source in sources)}, then"
            " mm data index SHARDS --out INDEX"
        )
    console.result(report)


def worker_settings(workers: str) -> list[str]:
    """`--workers N` or `N..M` as settings.

    Raises:
        ConfigError: it is neither.
    """
    found = re.fullmatch(r"(\d+)(?:\.\.(\d+))?", workers)
    if found is None:
        raise ConfigError(f"--workers {workers} is no number of ranks: give 4, or 2..8 for as many as there is room for")
    fewest, most = found.groups()
    return [f"resources.workers={most}", f"resources.min_workers={fewest}"] if most else [f"resources.workers={fewest}"]


def evaluate(
    model: Annotated[str, typer.Argument(help="A bundle's folder, models:/NAME@ALIAS, or a hub id.")],
    zeroshot: Annotated[str | None, typer.Option(help="Folder in CLIP_benchmark's layout.")] = None,
    retrieval: Annotated[list[str] | None, typer.Option(help="Shards, an index, or INDEX#LEDGER,…; again for several.")] = None,
    tasks: Annotated[
        str | None, typer.Option(help="Of a flava model: an index of pairs, or INDEX#LEDGER, for each task's figures.")
    ] = None,
    classify: Annotated[
        str | None, typer.Option(help="Of a model fine-tuned to classify: an index of labelled pairs, or INDEX#LEDGER.")
    ] = None,
    ledger: Ledgers = None,
    plots: Annotated[Path | None, typer.Option(help="Folder for the recall bars and the gallery.")] = None,
    settings: Settings = None,
    as_json: Json = False,
) -> None:
    """Measure a model: zero-shot classification, retrieval. The figures go to the run it was trained in, if that is known.

    Example: mm eval runs/NAME/bundle --zeroshot corpus/zeroshot --retrieval corpus/heldout
    """
    if zeroshot is None and not retrieval and tasks is None and classify is None:
        raise ConfigError(
            "nothing to evaluate: give --zeroshot FOLDER, --retrieval SHARDS, or of a flava model --tasks INDEX or --classify INDEX"
        )
    from pipelines.evaluate import evaluate_model

    console = Console(as_json)
    report = evaluate_model(
        resolve_model(model, settings),
        zeroshot=zeroshot,
        retrieval=retrieval or (),
        tasks=tasks,
        classify=classify,
        ledgers=ledger or (),
        tracking=tracking_config(settings),
        plots=plots,
        console=console,
    )
    for kind, metrics in report.items():
        console.table((kind, "", "chance"), [(key, f"{value:.4f}", f"{chance:.4f}") for key, (value, chance) in metrics.items()])
    console.result({kind: {key: value for key, (value, _) in metrics.items()} for kind, metrics in report.items()})


def register(
    source: Annotated[str, typer.Argument(metavar="RUN_OR_BUNDLE", help="A run's folder or a bundle's.")],
    name: Annotated[str, typer.Option(help="Name of the registered model.")],
    alias: Annotated[str | None, typer.Option(help="Alias to point at the new version.")] = None,
    settings: Settings = None,
    as_json: Json = False,
) -> None:
    """Make a bundle the next version of a registered model.

    Example: mm register runs/NAME --name clip-demo --alias champion
    """
    from pipelines.registry import register_bundle

    console = Console(as_json)
    folder = bundle_of(source)
    model = register_bundle(
        tracking_config(settings),
        name=name,
        bundle_folder=folder,
        alias=alias,
        metrics=evaluation_metrics(folder, tracking_config(settings)),
    )
    console.say(f"{folder} is version {model.version} of {name}; use it as {model.reference}")
    console.result({"name": model.name, "version": model.version, "alias": model.alias})


@imports.command("open_clip")
def import_open_clip(
    file: Annotated[Path, typer.Argument(help="Weights, .safetensors; open_clip_config.json is read where it lies beside them.")],
    out: Annotated[Path, typer.Option(help="Folder of the bundle to write.")],
    tokenizer: Annotated[str, typer.Option(help="Folder or hub id of the tokenizer it was trained with.")] = "openai/clip-vit-base-patch32",
    activation: Annotated[
        Literal["gelu", "quick_gelu"] | None, typer.Option(help="Of the MLPs, where no configuration lies beside the file.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write a ViT CLIP model of open_clip as a bundle of equal features.

    Example: mm import open_clip open_clip_model.safetensors --out bundle
    """
    from mm_core.models.family import parameter_count
    from mm_core.models.open_clip import import_open_clip as convert
    from mm_core.models.tokenizer import load_tokenizer

    console = Console(as_json)
    config = convert(file, out, load_tokenizer(tokenizer), activation=activation)
    console.say(f"{out} holds {parameter_count(config) / 1e6:.1f} M parameters; next: mm eval {out} --retrieval SHARDS, mm serve {out}")
    console.result({"bundle": str(out), "parameters": parameter_count(config)})


@config.command("show")
def config_show(recipe: Annotated[str, typer.Argument(metavar="RECIPE_OR_FILE")], settings: Settings = None, as_json: Json = False) -> None:
    """The resolved configuration, and where each value came from.

    Example: mm config show clip-tiny --set optimizer.lr=5e-4
    """
    console = Console(as_json)
    run, origins = resolve_run(recipe, settings or ())
    console.table(("key", "value", "from"), [(key, value, origins.get(key, "default")) for key, value in _flat(run)])
    console.result(run.model_dump(mode="json"))


@config.command("schema")
def config_schema() -> None:
    """The JSON Schema of a configuration file.

    Example: mm config schema > train.schema.json
    """
    import json

    from pipelines.train.config import TrainRun

    typer.echo(json.dumps(TrainRun.model_json_schema(), indent=1))


@config.command("recipes")
def config_recipes(as_json: Json = False) -> None:
    """The recipes there are.

    Example: mm config recipes
    """
    from mm_core.models.family import parameter_count
    from pipelines.recipes import RECIPES

    console = Console(as_json)
    rows = []
    for name, make in RECIPES.items():
        run = make()
        summary = (make.__doc__ or "").split("\n")[0]
        parameters = f"{parameter_count(run.model) / 1e6:.1f} M" if run.model.is_resolved else "by source"
        rows.append((name, parameters, run.steps, run.global_batch_size, summary))
    console.table(("recipe", "parameters", "steps", "batch", ""), rows)
    console.result({"recipes": [row[0] for row in rows]})


def resolve_run(recipe_or_file: str, overrides: Sequence[str]) -> tuple[TrainRun, dict[str, str]]:
    """A recipe's run with file, environment and overrides laid over it, and where each value came from."""
    from mm_core.config import read_file, resolve
    from pipelines.recipes import recipe

    path = Path(recipe_or_file)
    if path.suffix not in (".yaml", ".yml", ".json"):
        return resolve(recipe(recipe_or_file), base_name=f"recipe {recipe_or_file}", overrides=overrides)
    named = read_file(path).get("recipe")
    if not isinstance(named, str):
        raise ConfigError(f"{path} does not say which recipe it changes: add a line `recipe: clip-tiny`")
    return resolve(recipe(named), base_name=f"recipe {named}", file=path, overrides=overrides)


def bundle_of(source: str) -> Path:
    """The bundle's folder for a bundle or a run.

    Raises:
        BundleError: it is neither.
    """
    from mm_core.bundle import MANIFEST
    from mm_core.bundle_cache import bundle_at
    from mm_core.errors import BundleError

    if "://" in source:
        return bundle_at(source)
    for folder in (Path(source), Path(source) / "bundle"):
        if (folder / MANIFEST).is_file():
            return folder
    raise BundleError(f"{source} is neither a bundle nor the folder of a finished run: give runs/NAME or runs/NAME/bundle")


def evaluation_metrics(bundle: Path, tracking: TrackingConfig) -> dict[str, float]:
    """What `mm eval` found of this bundle's run."""
    from mm_core.bundle import read_manifest
    from pipelines.tracking import final_metrics

    run_id = read_manifest(bundle, verify=False).run_id
    return final_metrics(tracking.resolved(), run_id, "eval/") if run_id else {}


def resolve_model(reference: str, settings: Sequence[str] | None = None) -> str:
    """The local folder, from the root, as workers have working folders of their own; or hub id, that a MODEL argument stands for."""
    return model_store(settings).fetch(reference)


def _need(modality: str) -> tuple[str, ...]:
    choices = {"image-text": ("image", "text"), "image": ("image",), "text": ("text",)}
    if modality not in choices:
        raise ConfigError(f"--modality {modality!r} is not one of {', '.join(choices)}")
    return choices[modality]


def _flat(run: TrainRun) -> list[tuple[str, Any]]:
    from mm_core.config import flatten

    return [(key, str(value)) for key, value in flatten(run.model_dump(mode="json"))]
