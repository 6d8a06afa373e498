"""What can be wrong with a run, and is found in the driver before Ray starts: sizes that do not fit, models it names that are others."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedTokenizerFast

from mm_core.bundle import init_from, load_teacher
from mm_core.errors import ConfigError
from mm_core.models.dual import DualConfig, tower_weights
from mm_core.models.family import build_model
from mm_core.models.pretrained import check_pooling
from mm_core.models.sizes import TwoTowerConfig
from mm_core.models.tokenizer import load_tokenizer, special_tokens
from mm_core.models.warm_start import WarmStart, take_over
from mm_core.training.parallel import Parallelism
from pipelines.train.config import TrainRun
from pipelines.train.run_data import RunData


def check_run(run: TrainRun, data: RunData) -> None:
    """
    Raises:
        ConfigError: data without pairs; a batch, chunk, mix or number of workers that do not fit one another.
    """
    data.check_modalities()
    data.plan(run)
    check_parallel(run, run.resources.workers)


def check_parallel(run: TrainRun, ranks: int) -> None:
    """
    Raises:
        ConfigError: a model that is to be divided among ranks has one rank.
    """
    if run.parallel.kind is Parallelism.FSDP and ranks == 1:
        raise ConfigError(
            "parallel.kind=fsdp divides the model among ranks, and there is one: give more with --workers, or leave it at ddp, which can"
            " continue the same run"
        )


@dataclass(frozen=True)
class Start:
    """What others have made of a new run."""

    tokenizer: PreTrainedTokenizerFast
    weights: dict[str, Tensor] | None
    """By the model's names; None: fresh ones."""
    taken: WarmStart | None
    """What they are of those that were named."""


def start_of(run: TrainRun) -> Start | None:
    """The tokenizer and the weights that a new run names; None: its tokenizer is to be trained, and its weights are fresh.

    Raises:
        ConfigError, BundleError: they, or the teacher, are not there or do not fit the run's model.
    """
    # The weights of another model belong to its token ids.
    source = run.tokenizer.source or run.init or run.objective.teacher or run.model.tokenizer_source
    if not source:
        return None
    tokenizer = load_tokenizer(source)
    run = fed_by(run, tokenizer)
    weights, taken = named_weights(run, tokenizer)
    if run.objective.teacher is not None:
        load_teacher(run.objective.teacher, run.model, tokenizer)
    return Start(tokenizer, weights, taken)


def fed_by(run: TrainRun, tokenizer: PreTrainedTokenizerFast) -> TrainRun:
    """The run with its tokenizer's vocabulary."""
    model: TwoTowerConfig = run.model.model_copy(update={"vocab_size": len(tokenizer)})
    return run.model_copy(update={"model": model})


def named_weights(run: TrainRun, tokenizer: PreTrainedTokenizerFast) -> tuple[dict[str, Tensor] | None, WarmStart | None]:
    """A state of the run's model with what `--init` names, or the towers' sources, and what was taken of them; None: all is fresh.

    Raises:
        ConfigError, BundleError: sizes or tokenizer that do not fit the model.
    """
    model = build_model(run.model, special_tokens(tokenizer))
    if run.init is not None:
        taken = init_from(model, run.init, tokenizer=tokenizer, match=run.init_match)
    elif isinstance(run.model, DualConfig):
        check_pooling(model, tokenizer)
        taken = take_over(model, tower_weights(run.model))
    else:
        return None, None
    return model.state_dict(), taken
