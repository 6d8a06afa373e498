"""Samples of an index through the towers of a model, as a Ray Data job: read and decoded by tasks, encoded by actors that hold the model.

Rows come out as they went in, and in that order; what a row becomes does not depend on how many tasks and actors there are.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import ray
import ray.data
from numpy.typing import NDArray
from ray.util.annotations import RayDeprecationWarning

from mm_core.bundle import Bundle, load_bundle
from mm_core.data.columns import column_of, rows_of, vectors_column
from mm_core.data.decoded import decode_samples
from mm_core.data.index import Index
from mm_core.data.permutation import U64
from mm_core.data.reader import IndexReader
from mm_core.errors import BundleError, ConfigError
from mm_core.model_digest import model_digest

LEFT_OUT = -1
"""The model of rows that are not read."""
_BLOCKS_PER_ACTOR = 8
"""At least: to start an actor takes as long as a small model takes for some thousand samples."""
_CPUS_PER_ACTOR = 0.5
"""Without GPUs the towers take most of the time: an actor for every processor, of which half stay free for the tasks that decode. It is
one thread all the same, so that features do not depend on how many there are."""
_IMAGES, _TEXTS = 128, 256


class Model(NamedTuple):
    """A model that encodes."""

    source: str
    """A bundle's folder, a folder in transformers' layout, or a hub id."""
    digest: str
    image_size: int
    embed_dim: int

    @classmethod
    def of(cls, source: str, bundle: Bundle) -> Model:
        return cls(source, model_digest(source), bundle.image_size, bundle.embed_dim)


class Block(NamedTuple):
    """Rows of an index that go through the job together."""

    ordinals: U64
    models: NDArray[np.int8]
    """The number of each row's model, or LEFT_OUT."""


Measure = Callable[[Bundle, NDArray[np.uint8], list[list[str]]], Mapping[str, NDArray[Any]]]
"""Of a model, decoded images [n, h, w, 3] and their captions: columns of n numbers, n vectors or n byte strings, by name."""


def encode(
    index: Index, blocks: Sequence[Block], models: Sequence[Model], measure: Measure, *, actors: int | None = None
) -> ray.data.Dataset:
    """`ordinal, captions, label, reason` of every row and what `measure` gives, null where there is a reason, or the row was left out.

    Raises:
        ConfigError: models that take images of different sizes.
    """
    size = check_sizes(models)
    gpus, cpus = (int(ray.cluster_resources().get(kind, 0)) for kind in ("GPU", "CPU"))
    actors = actors or max(1, min(gpus or cpus, len(blocks) // _BLOCKS_PER_ACTOR))
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.raise_original_map_exception = True  # what Ray would put in its place has lost the cause, on its way from the worker
    items = [{"ordinals": block.ordinals, "models": block.models} for block in blocks]
    decoded = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
        _decode_block,
        fn_kwargs={"url": index.url, "size": size},
        batch_size=None,
        batch_format="pyarrow",
        num_cpus=0.5 if cpus == 1 else 1,  # beside an actor there must be room for one on a single processor too
    )
    with warnings.catch_warnings():
        # Deprecated in 2.60 and with no successor yet: without it Ray prints an error for each actor it ends (ray#53727).
        warnings.simplefilter("ignore", RayDeprecationWarning)
        return decoded.map_batches(
            Encoder,
            fn_constructor_kwargs={"models": list(models), "measure": measure, "cuda": gpus > 0},
            batch_size=None,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(size=min(actors, len(items))),
            num_gpus=1 if gpus else 0,
            num_cpus=_CPUS_PER_ACTOR,
            ray_remote_args_fn=lambda: {"max_restarts": 0},
        )


def check_sizes(models: Sequence[Model]) -> int:
    """The size of images that all of them take.

    Raises:
        ConfigError: they take different ones.
    """
    sizes = sorted({model.image_size for model in models})
    if len(sizes) > 1:
        raise ConfigError(f"the models take images of {' and '.join(map(str, sizes))} pixels, and those of one job must agree")
    return sizes[0]


class Encoder:
    """An actor that holds the models."""

    def __init__(self, models: Sequence[Model], measure: Measure, cuda: bool) -> None:
        self._models, self._measure, self._device = models, measure, "cuda" if cuda else "cpu"
        self._size = models[0].image_size

    @cached_property
    def _bundles(self) -> list[Bundle]:
        """Loaded by the first call: what a constructor raises is lost in Ray's report of a dead actor."""
        for model in self._models:
            if model_digest(model.source) != model.digest:
                raise BundleError(f"{model.source} is another model here than where the job was started, or was changed meanwhile")
        return [load_bundle(model.source, device=self._device) for model in self._models]

    @cached_property
    def _columns(self) -> Mapping[str, NDArray[Any]]:
        """Of one row that is thrown away: their names and types, also for blocks with nothing to encode."""
        return self._measure(self._bundles[0], np.zeros((1, self._size, self._size, 3), dtype=np.uint8), [["a"]])

    def __call__(self, rows: pa.Table) -> pa.Table:
        """
        Raises:
            BundleError: a model is not the one that the job was started with.
        """
        models = rows["model"].to_numpy()
        decoded = rows["reason"].combine_chunks().is_null().to_numpy(zero_copy_only=False) & (models != LEFT_OUT)
        columns = {name: np.zeros((len(models), *one.shape[1:]), dtype=one.dtype) for name, one in self._columns.items()}
        if decoded.any():
            images = rows_of(
                rows["image"] if decoded.all() else rows["image"].filter(pa.array(decoded)), (self._size, self._size, 3), np.uint8
            )
            assert images is not None
            captions = rows["captions"].filter(pa.array(decoded)).to_pylist()
            for number, bundle in enumerate(self._bundles):
                mine = np.flatnonzero(models[decoded] == number)
                if len(mine):
                    measured = self._measure(bundle, images if len(mine) == len(images) else images[mine], [captions[i] for i in mine])
                    for name, values in measured.items():
                        columns[name][np.flatnonzero(decoded)[mine]] = values
        rows = rows.drop_columns(["image", "model"])
        for name, values in columns.items():
            rows = rows.append_column(name, _column(values, decoded))
        return rows


def _column(values: NDArray[Any], present: NDArray[np.bool_]) -> pa.Array:
    if values.ndim == 2:
        return vectors_column(values, present)
    return pa.array(values, pa.binary() if values.dtype == object else None, mask=~present)


def image_features(bundle: Bundle, images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Of any number of images, a hundred at a time."""
    return np.concatenate([bundle.image_features(images[i : i + _IMAGES]) for i in range(0, len(images), _IMAGES)])


def text_features(bundle: Bundle, texts: list[str]) -> NDArray[np.float32]:
    """Of any number of texts, some hundred at a time."""
    return np.concatenate([bundle.text_features(texts[i : i + _TEXTS]) for i in range(0, len(texts), _TEXTS)])


def _decode_block(blocks: pa.Table, url: str, size: int) -> pa.Table:
    """Ordinals to decoded images, captions and labels; a sample that cannot be decoded is a row with a reason."""
    import torch

    torch.set_num_threads(1)
    ordinals = np.concatenate([np.asarray(o, dtype=np.uint64) for o in blocks["ordinals"].to_pylist()])
    models = np.concatenate([np.asarray(m, dtype=np.int8) for m in blocks["models"].to_pylist()])
    wanted = np.flatnonzero(models != LEFT_OUT)
    found = decode_samples(index_reader(url), ordinals[wanted], size)
    decoded = np.zeros(len(ordinals), dtype=bool)
    captions: list[list[str]] = [[] for _ in ordinals]
    labels, reasons = np.full(len(ordinals), -1), np.full(len(ordinals), None, dtype=object)
    decoded[wanted], labels[wanted], reasons[wanted] = found.good, found.labels, found.reasons
    for row, of_row in zip(wanted, found.captions, strict=True):
        captions[row] = of_row
    return pa.table(
        {
            "ordinal": ordinals,
            "model": models,
            "image": column_of(found.images, decoded),
            "captions": pa.array(captions, pa.list_(pa.string())),
            "label": labels,
            "reason": pa.array(reasons, pa.string()),
        }
    )


@lru_cache(maxsize=4)
def index_reader(url: str) -> IndexReader:
    """One for each process: it keeps the index mapped and shards open."""
    return IndexReader(Index.open(url))
