"""`mm embed`: every sample of an index through a model's towers, as a Ray Data job: pictures' and captions' vectors as float16."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mm_core.bundle import Bundle, load_bundle
from mm_core.data.index import Index
from mm_core.data.ledger import compile_kept
from mm_core.data.side_table import SideTable
from mm_core.errors import ConfigError, DataError
from mm_core.search.embeddings import EmbeddingsSummary, read_embeddings_summary, values_of, write_embeddings_summary
from pipelines.encode import LEFT_OUT, Model, image_features, text_features
from pipelines.encoded_table import PROBLEM, Progress, fill
from pipelines.index import build_index
from pipelines.session import ray_session
from pipelines.shards import expand_shards
from pipelines.tasks import run_tasks


def embed(
    source: str,
    reference: str,
    shards: Sequence[str],
    out: Path,
    *,
    ledgers: Sequence[str] = (),
    actors: int | None = None,
    on_progress: Progress = lambda rows: None,
    on_rows: Callable[[int], None] = lambda rows: None,
) -> EmbeddingsSummary:
    """After a stop the same call goes on.

    Args:
        source: the model's folder or hub id.
        reference: what names it tomorrow too, `models:/NAME/VERSION` for one.
        shards: an index, or shards, of which an index is made in `out`.

    Raises:
        ConfigError: `out` holds vectors of other samples or by another model.
        BundleError, DataError: a model, shards or ledger that cannot be used.
    """
    out = out.absolute()  # workers have working folders of their own
    with ray_session():
        index = _index_of(shards, out)
        if "image" not in index.summary.need:
            raise ConfigError(f"the samples of {index.url} need not have images: index them with --modality image or image-text")
        kept = compile_kept(index, ledgers)
        model = Model.of(source, load_bundle(source))
        summary = EmbeddingsSummary(
            model=reference,
            model_digest=model.digest,
            embed_dim=model.embed_dim,
            index_url=index.url,
            index_fingerprint=index.summary.fingerprint,
            kept_fingerprint=kept.fingerprint,
            rows=index.summary.rows,
        )
        found = read_embeddings_summary(out)
        if found is not None and found.fingerprint != summary.fingerprint:
            raise ConfigError(f"{out} holds vectors of other samples or by another model ({found.model}): give another --out")
        on_rows(summary.rows)
        if found is not None and found.complete:
            on_progress(summary.rows)
            return found
        write_embeddings_summary(out, summary)
        table = values_of(out, summary)
        fill(index, table, [model], partial(_models_of, kept.ordinals), vectors, actors=actors, on_progress=on_progress)
        counts: Counter[str] = Counter()
        for _, one in run_tasks(partial(_counted, table), range(len(table))):
            counts.update(one)
    samples = counts.pop(_SAMPLES, 0)
    done = summary.model_copy(update={"samples": samples, "unreadable": dict(sorted(counts.items())), "complete": True})
    if not samples:
        raise DataError(f"not one sample of {index.url} could be embedded: {dict(counts) or 'there are none'}")
    write_embeddings_summary(out, done)
    return done


def vectors(bundle: Bundle, images: NDArray[np.uint8], captions: list[list[str]]) -> dict[str, NDArray[Any]]:
    """Measure: each image's features, and of its captions' theirs one after the other, as bytes."""
    counts = [len(each) for each in captions]
    texts = [text for each in captions for text in each]
    features = text_features(bundle, texts) if texts else np.zeros((0, bundle.embed_dim), dtype=np.float32)
    of_each = np.split(features.astype("<f2"), np.cumsum(counts)[:-1])
    joined = np.empty(len(captions), dtype=object)
    joined[:] = [part.tobytes() for part in of_each]
    return {"image": image_features(bundle, images).astype("<f2"), "texts": joined}


_SAMPLES = "_samples"


def _index_of(shards: Sequence[str], out: Path) -> Index:
    """The index that `shards` is, or the one of them in `out`."""
    if len(shards) == 1:
        try:
            return Index.open(shards[0])
        except DataError:
            pass  # no index: shards
    place = out / "index"
    if not (place / "index.json").is_file():
        return build_index(shards, str(place), need=("image",))
    index = Index.open(str(place))
    if sorted(index.shard_urls) != sorted(expand_shards(shards)):
        raise ConfigError(f"{place} is the index of other shards: give another --out")
    return index


def _models_of(kept: NDArray[np.uint64], first: int, last: int) -> NDArray[np.int8]:
    models = np.full(last - first, LEFT_OUT, dtype=np.int8)
    some = kept[np.searchsorted(kept, first) : np.searchsorted(kept, last)]
    models[some.astype(np.int64) - first] = 0
    return models


def _counted(table: SideTable, chunk: int) -> Counter[str]:
    rows = table.read(chunk, ["image", PROBLEM])
    return Counter(rows[PROBLEM].drop_null().to_pylist()) + Counter({_SAMPLES: len(rows) - rows["image"].null_count})
