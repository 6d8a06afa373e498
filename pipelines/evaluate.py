"""`mm eval`: zero-shot classification and retrieval of a bundle, over any number of samples.

Samples are read and decoded as Ray Data tasks and encoded by actors that hold the bundle; only features come back, so memory is
samples x embedding dimension. The metrics themselves are pure functions of `mm_core.evaluation`.
"""

from __future__ import annotations

import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from mm_core.bundle import Bundle, load_bundle
from mm_core.console import Console
from mm_core.data.columns import vectors_of
from mm_core.data.image import decode_centre
from mm_core.data.index import Index
from mm_core.data.labels import check_labels
from mm_core.data.ledger import Source, compile_kept
from mm_core.data.permutation import U64
from mm_core.data.problems import SampleProblem
from mm_core.data.reader import IndexReader
from mm_core.errors import ConfigError, DataError
from mm_core.evaluation.chance import chance
from mm_core.evaluation.classify import class_metrics, sides_of
from mm_core.evaluation.encoded import check_skipped
from mm_core.evaluation.retrieval import retrieval_metrics
from mm_core.evaluation.tasks import HeldOut, held_out, task_metrics
from mm_core.evaluation.zeroshot import class_embeddings, read_classnames, read_templates, zeroshot_metrics
from mm_core.models.fused import Fused
from mm_core.store import open_store
from pipelines.causes import own_errors
from pipelines.encode import Block, Model, encode, image_features, index_reader, text_features
from pipelines.index import build_index
from pipelines.plots import recall_bars, retrieval_gallery
from pipelines.session import ray_session
from pipelines.tracking import TrackingConfig, has_run, last_step, log_artifacts, log_metrics, log_tags

_ROWS_PER_BLOCK = 128
_MAX_GALLERY_QUERIES = 6
_GALLERY_COLUMNS = 5
Progress = Callable[[int], None]
Skipped = Callable[[dict[str, int]], None]
"""Called with the samples that are left out of the figures, by reason."""
Measured = dict[str, tuple[float, float]]
"""Metric → its value, and what guessing would give."""


@dataclass(frozen=True)
class Features:
    """What a bundle makes of an index's samples, in the index's order."""

    ordinals: NDArray[np.uint64]
    images: NDArray[np.float32]
    """[n, d], L2-normalised."""
    captions: list[list[str]]
    labels: NDArray[np.int64]
    """[n]; -1 where a sample has none."""
    skipped: dict[str, int]
    """Samples that are not usable or could not be decoded, by reason."""


def evaluate_model(
    model: str,
    *,
    zeroshot: str | None,
    retrieval: Sequence[str],
    tasks: str | None = None,
    classify: str | None = None,
    ledgers: Sequence[str] = (),
    tracking: TrackingConfig,
    plots: Path | None = None,
    console: Console,
) -> dict[str, Measured]:
    """Evaluate, draw, and log to the run the model was trained in, where the bundle names one.

    Raises:
        BundleError, DataError: a model, folder or shard that cannot be used.
        ConfigError: ledgers, and shards that are no index.
    """
    bundle = load_bundle(model)
    held = None if tasks is None else _held_out(bundle, tasks)
    labelled = None if classify is None else _labelled(bundle, classify)
    if zeroshot is not None:
        classes_of(zeroshot)
    if retrieval and (source := _source(retrieval, ledgers)):
        compile_kept(Index.open(source.index), source.ledgers)
    report: dict[str, Measured] = {}
    with ray_session(), tempfile.TemporaryDirectory(prefix="mm-plots-") as temporary:
        drawn, skipped = Path(temporary), dict[str, int]()
        if zeroshot is not None:
            with console.progress("zero-shot") as tracker:
                metrics = evaluate_zeroshot(bundle, model, zeroshot, tracker.advance, skipped.update)
            _show(console, skipped)
            report["zeroshot"] = _beside_chance(metrics)
        if retrieval:
            with console.progress("retrieval") as tracker:
                found = evaluate_retrieval(bundle, model, retrieval, ledgers, tracker.advance, skipped.update)
            _show(console, skipped)
            report["retrieval"] = _beside_chance(found.metrics)
            chances = {key: value[1] for key, value in report["retrieval"].items()}
            recall_bars(found.metrics, drawn / "recall.png", chance=chances)
            retrieval_gallery(found.queries, found.results, found.correct, drawn / "retrieval.png")
        if held is not None:
            report["tasks"] = evaluate_tasks(bundle, held)
        if labelled is not None:
            report["classify"] = _beside_constant(class_metrics(bundle, *labelled))
        if plots is not None:
            shutil.copytree(drawn, plots, dirs_exist_ok=True)
        run_id = bundle.manifest.run_id if bundle.manifest else None
        if run_id is None:
            return report
        if not has_run(tracking, run_id):
            console.note(f"the run {run_id} that this model was trained in is not in {tracking.uri}: the figures were not logged")
            return report
        values = {f"eval/{kind}/{key}": value for kind, metrics in report.items() for key, (value, _) in metrics.items()}
        log_metrics(tracking, run_id, values, step=last_step(tracking, run_id))
        measured_on = {
            "tasks": tasks,
            "classify": classify,
            "zeroshot": zeroshot,
            "retrieval": " ".join([*retrieval, *(f"--ledger {name}" for name in ledgers)]),
        }
        log_tags(tracking, run_id, {f"eval.{kind}.data": str(measured_on[kind]) for kind in report})
        log_artifacts(tracking, run_id, drawn, "plots")
    return report


def _held_out(bundle: Bundle, named: str) -> HeldOut:
    reader, ordinals = _opened_one(named)
    check_need(reader.index, ("image", "text"))
    return held_out(bundle, reader, ordinals)


def _labelled(bundle: Bundle, named: str) -> tuple[IndexReader, U64]:
    """
    Raises:
        BundleError: the model was not fine-tuned to classify.
        DataError: samples have no class, or one it does not know, or nothing that it is trained on.
    """
    head, (reader, ordinals) = bundle.class_head, _opened_one(named)
    if not sides_of(bundle, reader.index.summary.need):
        check_need(reader.index, tuple(sorted(head.sides.modalities)))
    check_labels(reader.index, ordinals, head.num_classes)
    return reader, ordinals


def _opened_one(named: str) -> tuple[IndexReader, U64]:
    source = Source.parse(named)
    index = Index.open(source.index)
    return IndexReader(index), compile_kept(index, source.ledgers).ordinals


def evaluate_tasks(bundle: Bundle, held: HeldOut) -> Measured:
    """Loss and accuracy of each task on held-out pairs, in this process, each with that of the best constant answer."""
    assert isinstance(bundle.towers, Fused), "`held_out` has looked at it"
    return _beside_constant(task_metrics(bundle.towers, held, bundle.device))


def _beside_constant(found: dict[str, dict[str, float]]) -> Measured:
    """Losses and accuracies, each with that of the best constant answer."""
    return {
        f"{name}/{key}": (values[key], values[f"constant_{key}"])
        for name, values in found.items()
        for key in ("loss", "accuracy")
        if key in values
    }


def _show(console: Console, skipped: dict[str, int]) -> None:
    if skipped:
        console.table(("left out because", "samples"), list(skipped.items()))
        skipped.clear()


def evaluate_zeroshot(
    bundle: Bundle, model: str, folder: str, on_progress: Progress = lambda n: None, on_skipped: Skipped = lambda reasons: None
) -> dict[str, float]:
    """Zero-shot top-1, top-5 and mean per class on a folder in CLIP_benchmark's layout.

    `folder` holds `classnames.txt`, `zeroshot_classification_templates.txt` and the shards, in `test/` where there is one.
    """
    classnames, templates = classes_of(folder)
    with _opened([shards_of(folder)], need=("image",)) as (index, _):
        check_labels(index, compile_kept(index).ordinals, name=folder)
        features = encode_images(model, index, on_progress=on_progress)
    on_skipped(features.skipped)
    metrics = zeroshot_metrics(features.images, features.labels, class_embeddings(bundle, classnames, templates))
    return metrics | {"samples": len(features.labels), "classes": len(classnames)}


def shards_of(folder: str) -> str:
    """Where the shards of a folder in CLIP_benchmark's layout lie."""
    shards = Path(folder) / "test"
    return str(shards if shards.is_dir() else folder)


def classes_of(folder: str) -> tuple[list[str], list[str]]:
    """Class names and prompt templates, of `folder` or of the one it is in."""
    if not Path(folder).is_dir():
        raise DataError(f"no folder {folder}: --zeroshot takes one with classnames.txt and shards, in CLIP_benchmark's layout")
    where = next((path for path in (Path(folder), Path(folder).parent) if (path / "classnames.txt").is_file()), Path(folder))
    return read_classnames(where), read_templates(where)


@dataclass(frozen=True)
class Retrieval:
    metrics: dict[str, float]
    queries: list[str]
    results: list[list[NDArray[np.uint8]]]
    """For each of a few queries the images found, best first."""
    correct: list[list[bool]]


def evaluate_retrieval(
    bundle: Bundle,
    model: str,
    shards: Sequence[str],
    ledgers: Sequence[str] = (),
    on_progress: Progress = lambda n: None,
    on_skipped: Skipped = lambda reasons: None,
) -> Retrieval:
    """Recall at 1, 5 and 10 both ways on shards, or on an index; every caption of an image is a query, any counts as found."""
    with _opened(shards, need=("image", "text"), ledgers=ledgers) as (index, chosen_by):
        features = encode_images(model, index, ledgers=chosen_by, on_progress=on_progress)
        on_skipped(features.skipped)
        texts = [caption for captions in features.captions for caption in captions]
        owners = np.repeat(np.arange(len(features.captions)), [len(captions) for captions in features.captions])
        queries = text_features(bundle, texts)
        metrics = retrieval_metrics(features.images, queries, owners)
        chosen = np.linspace(0, len(texts) - 1, min(_MAX_GALLERY_QUERIES, len(texts)), dtype=int)
        best = np.argsort(-queries[chosen] @ features.images.T, axis=1, kind="stable")[:, :_GALLERY_COLUMNS]
        shown = _pictures(index, features.ordinals[best.reshape(-1)], bundle.image_size)
    return Retrieval(
        metrics | {"images": len(features.images), "texts": len(texts)},
        [texts[i] for i in chosen],
        [shown[row * best.shape[1] : (row + 1) * best.shape[1]] for row in range(len(chosen))],
        [[bool(owners[i] == found) for found in row] for i, row in zip(chosen, best, strict=True)],
    )


def encode_images(
    model: str, index: Index, *, ledgers: Sequence[str] = (), actors: int | None = None, on_progress: Progress = lambda n: None
) -> Features:
    """Image features, captions and labels of the kept samples of an index, as a Ray Data job.

    Raises:
        DataError: more than a tenth of the samples cannot be decoded.
    """
    kept = compile_kept(index, ledgers).ordinals
    if not len(kept):
        raise DataError(f"nothing of {index.url} is kept by {', '.join(ledgers) or 'the index'}: there is nothing to evaluate")
    blocks = [kept[i : i + _ROWS_PER_BLOCK] for i in range(0, len(kept), _ROWS_PER_BLOCK)]
    seen = Model.of(model, load_bundle(model, verify=False))
    encoded = encode(
        index, [Block(np.asarray(block), np.zeros(len(block), dtype=np.int8)) for block in blocks], [seen], _of_images, actors=actors
    )
    tables = []
    with own_errors():
        for table in encoded.iter_batches(batch_size=None, batch_format="pyarrow"):
            tables.append(table)
            on_progress(table.num_rows)
    return _features(pa.concat_tables(tables), index)


def _of_images(bundle: Bundle, images: NDArray[np.uint8], captions: list[list[str]]) -> dict[str, NDArray[np.float32]]:
    """Measure: the images alone."""
    return {"features": image_features(bundle, images)}


def _features(rows: pa.Table, index: Index) -> Features:
    reasons = [r for r in rows["reason"].to_pylist() if r]
    rows = rows.filter(pa.compute.is_null(rows["reason"])).combine_chunks()
    check_skipped(reasons, rows.num_rows, index.url)
    return Features(
        ordinals=rows["ordinal"].to_numpy(),
        images=np.array(vectors_of(rows["features"], np.float32)),
        captions=rows["captions"].to_pylist(),
        labels=rows["label"].to_numpy(),
        skipped=dict(Counter(index.summary.bad) + Counter(reasons)),
    )


def _pictures(index: Index, ordinals: U64, size: int) -> list[NDArray[np.uint8]]:
    blank = np.full((size, size, 3), 255, dtype=np.uint8)
    return [
        blank if isinstance(sample, SampleProblem) else decode_centre(sample.image or b"", size)
        for sample in index_reader(index.url).read(np.asarray(ordinals, dtype=np.uint64))
    ]


def _source(paths: Sequence[str], ledgers: Sequence[str]) -> Source | None:
    """The index that `paths` is, or INDEX#LEDGER,…, with its ledgers; None where it names shards.

    Raises:
        ConfigError: ledgers, and shards.
    """
    source = Source.parse(paths[0], ledgers)
    if len(paths) == 1 and open_store(source.index)[0].exists(f"{source.index.rstrip('/')}/index.json"):
        return source
    if ledgers:
        raise ConfigError(f"--ledger {ledgers[0]} chooses among the samples of an index, and {', '.join(paths)} is not one index")
    return None


def check_need(index: Index, need: tuple[str, ...]) -> None:
    """
    Raises:
        DataError: samples of the index lack one of the modalities that are needed.
    """
    if missing := [modality for modality in need if modality not in index.summary.need]:
        raise DataError(
            f"the index at {index.url} was made for {'-'.join(index.summary.need)}, and this needs {' and '.join(missing)}: index"
            f" the shards with --modality {'-'.join(need)}, or name the shards themselves"
        )


@contextmanager
def _opened(paths: Sequence[str], need: tuple[str, ...], ledgers: Sequence[str] = ()) -> Iterator[tuple[Index, tuple[str, ...]]]:
    """The index that `paths` is, or one of the shards it names, for the length of the evaluation; and the ledgers that choose from it."""
    source = _source(paths, ledgers)
    if source is not None:
        index = Index.open(source.index)
        check_need(index, need)
        yield index, source.ledgers
        return
    with tempfile.TemporaryDirectory(prefix="mm-eval-") as temporary:
        yield build_index(paths, f"{temporary}/index", need=need), ()


def _beside_chance(metrics: dict[str, float]) -> Measured:
    """Each metric with what a model that guesses gets; counts with themselves left out."""
    expected = chance(metrics)
    return {key: (metrics[key], expected[key]) for key in expected}
