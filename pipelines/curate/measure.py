"""What `mm data score INDEX WHAT` can measure, and the options that each takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from mm_core.config import nearest
from mm_core.curation.head import Between, Output
from mm_core.curation.score_rules import EMBEDDINGS, HASH, HEAD, IMAGE, SIMILARITY
from mm_core.data.among import Among
from mm_core.data.index import Index
from mm_core.data.scores import ScoresSummary
from mm_core.errors import ConfigError
from pipelines.curate.folds import Fold

OPTIONS: dict[str, tuple[str, ...]] = {
    IMAGE: (),
    HASH: (),
    SIMILARITY: ("name", "model", "fold"),
    EMBEDDINGS: ("name", "model"),
    HEAD: ("name", "weights", "sha256", "embeddings", "between", "output"),
}
"""By what is measured."""
Progress = Callable[[int], None]


@dataclass(frozen=True)
class Request:
    """What a person asked for."""

    what: str
    options: Mapping[str, Any]
    """Those that were given, by name."""

    def check(self) -> None:
        """
        Raises:
            ConfigError: there is nothing of this name to measure, or an option is not one of its.
        """
        if self.what not in OPTIONS:
            raise ConfigError(f"there is nothing called {self.what!r} to measure{nearest(self.what, list(OPTIONS))}")
        for option in self.options:
            if option not in OPTIONS[self.what]:
                raise ConfigError(f"{self.what} takes no --{option}; it takes {_listed(OPTIONS[self.what])}")

    def folds(self, resolve: Callable[[str], str]) -> list[Fold]:
        """
        Raises:
            ConfigError: neither one model nor folds, both, or one that is not of the form LEDGER=MODEL.
        """
        model, folds = self.options.get("model"), self.options.get("fold") or ()
        if (model is None) == (not folds):
            raise ConfigError(
                f"{self.what} needs a model: give " + ("--model, or --fold for each fold, not both" if model else "--model MODEL")
            )
        if model is not None:
            return [Fold(None, resolve(model))]
        return [Fold(ledger, resolve(source)) for ledger, source in map(Fold.parse, folds)]


def measure(
    index: Index,
    request: Request,
    *,
    among: Among,
    resolve: Callable[[str], str],
    on_progress: Progress,
    on_note: Callable[[str], None],
) -> ScoresSummary:
    """Measure what was asked for, of the samples `among` some. `resolve`: from what stands for a model to its folder or hub id.

    Raises:
        ConfigError, BundleError, DataError: what cannot be done, before anything is written.
    """
    request.check()
    name = request.options.get("name")
    match request.what:
        case "image":
            from pipelines.curate.score import score_images

            return score_images(index, among=among, on_progress=on_progress)
        case "hash":
            from pipelines.curate.score import score_hashes

            return score_hashes(index, among=among, on_progress=on_progress)
        case "head":
            from pipelines.curate.head_scores import score_by_head

            return score_by_head(index, _head(request.options), name=name, among=among, on_progress=on_progress)
        case what:
            from pipelines.curate.model_scores import score_by_models

            return score_by_models(index, what, request.folds(resolve), name=name, among=among, on_progress=on_progress, on_note=on_note)


def _head(options: Mapping[str, Any]) -> Any:
    from pipelines.curate.head_scores import HeadScore

    for option in ("weights", "sha256"):
        if option not in options:
            raise ConfigError(f"a head needs --{option}: its weights, and the SHA-256 they must have (sha256sum FILE)")
    return HeadScore(
        options["weights"],
        options["sha256"],
        options.get("embeddings", EMBEDDINGS),
        Between(options.get("between", Between.RELU)),
        Output(options.get("output", Output.IDENTITY)),
    )


def _listed(options: tuple[str, ...]) -> str:
    return ", ".join(f"--{option}" for option in options) or "no options"
