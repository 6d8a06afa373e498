"""What can be wrong with a run, and is found in the driver before Ray starts: sizes that do not fit, models it names that are others."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from mm_core.bundle import init_from, load_teacher
from mm_core.data.masking import Masking
from mm_core.errors import ConfigError
from mm_core.models.codebook import load_codebook
from mm_core.models.dual import DualConfig, tower_weights
from mm_core.models.family import ModelConfig, build_model, resolved
from mm_core.models.flava import FlavaConfig
from mm_core.models.pretrained import check_pooling
from mm_core.models.tokenizer import load_tokenizer, mask_token, special_tokens
from mm_core.models.two_tower import TwoTower
from mm_core.models.warm_start import WarmStart, take_over
from mm_core.training.parallel import Parallelism
from mm_core.training.precision import Precision, check_fp8_installed
from pipelines.train.config import TrainRun
from pipelines.train.parts import masking_of
from pipelines.train.run_data import RunData


def check_run(run: TrainRun, data: RunData) -> None:
    """
    Raises:
        ConfigError: data without pairs, or without classes where those are learned; a batch, chunk, mix or number of workers that do not
            fit one another; fp8 without torchao.
    """
    data.check_modalities(run)
    data.check_labels(run)
    data.plan(run)
    check_parallel(run, run.resources.min_workers or run.resources.workers)
    if run.precision is Precision.FP8:
        check_fp8_installed()


def check_parallel(run: TrainRun, ranks: int) -> None:
    """
    Raises:
        ConfigError: a model that is to be divided among ranks has one rank.
    """
    if run.parallel.kind is Parallelism.FSDP and ranks == 1:
        raise ConfigError(
            "parallel.kind=fsdp divides the model among ranks, and there is one, or may be: give more with --workers, or leave it at ddp,"
            " which can continue the same run"
        )


def with_codebook(run: TrainRun) -> TrainRun:
    """The run with the codebook of the model that training starts from, where none is named."""
    if not isinstance(run.model, FlavaConfig) or run.model.codebook_source is not None:
        return run
    return run.model_copy(update={"model": run.model.model_copy(update={"codebook_source": run.init})})


def with_sources(run: TrainRun) -> TrainRun:
    """The run with what its model's sources decide.

    Raises:
        ConfigError: a source that is not there or does not fit.
    """
    run = with_codebook(run)
    return run.model_copy(update={"model": resolved(run.model)})


@dataclass(frozen=True)
class Start:
    """What others have made of a new run."""

    tokenizer: PreTrainedTokenizerFast | None
    """None: the model reads no text."""
    weights: dict[str, Tensor] | None
    """By the model's names; None: fresh ones."""
    taken: WarmStart | None
    """What they are of those that were named."""


def start_of(run: TrainRun) -> Start | None:
    """The tokenizer and the weights that a new run names; None: its tokenizer is to be trained.

    Raises:
        ConfigError, BundleError: they, or the teacher, are not there or do not fit the run's model.
    """
    if not run.model.reads_text:
        return Start(None, *named_weights(run, None))
    # The weights of another model belong to its token ids.
    source = run.tokenizer.source or run.init or run.teacher or run.joint_model.tokenizer_source
    if not source:
        return None
    tokenizer = load_tokenizer(source)
    run = fed_by(run, tokenizer)
    masking_for(run, tokenizer)
    weights, taken = named_weights(run, tokenizer)
    teacher_of(run, tokenizer)
    return Start(tokenizer, weights, taken)


def fed_by(run: TrainRun, tokenizer: PreTrainedTokenizerFast | None) -> TrainRun:
    """The run with its tokenizer's vocabulary."""
    if tokenizer is None:
        return run
    model: ModelConfig = run.joint_model.model_copy(update={"vocab_size": len(tokenizer)})
    return run.model_copy(update={"model": model})


def masking_for(run: TrainRun, tokenizer: PreTrainedTokenizerFast) -> Masking | None:
    """
    Raises:
        ConfigError: words are to be hidden, and the tokenizer has no mark for that.
    """
    return None if run.data.masking is None else masking_of(run, mask_token(tokenizer), special_tokens(tokenizer).pad)


def teacher_of(run: TrainRun, tokenizer: PreTrainedTokenizerFast | None) -> TwoTower | None:
    """
    Raises:
        ConfigError, BundleError: it does not fit the run's model.
    """
    if run.teacher is None:
        return None
    assert tokenizer is not None, "two towers read text"
    return load_teacher(run.teacher, run.model, tokenizer)


def named_weights(run: TrainRun, tokenizer: PreTrainedTokenizerFast | None) -> tuple[dict[str, Tensor] | None, WarmStart | None]:
    """A state of the run's model with what `--init` names, or the model's sources, and what was taken of them; None: all is fresh.

    Raises:
        ConfigError, BundleError: sizes or tokenizer that do not fit the model.
    """
    if tokenizer is None:
        if run.init is not None:
            raise ConfigError(f"--init is for models that bundles can be loaded as, and a {run.model.family} is none: leave it out")
        return None, None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.seed)  # what no source has is fresh, and the same in every start of the run
        model = build_model(run.model, special_tokens(tokenizer))
    if run.init is not None:
        taken = init_from(model, run.init, tokenizer=tokenizer, match=run.init_match)
    elif isinstance(run.model, DualConfig):
        check_pooling(model, tokenizer)
        taken = take_over(model, tower_weights(run.model))
    elif isinstance(run.model, FlavaConfig):
        assert run.model.codebook_source is not None, "the driver has looked at it"
        codebook = load_codebook(run.model.codebook_source).state_dict()
        taken = take_over(model, {f"image_codebook.{name}": tensor for name, tensor in codebook.items()})
    else:
        return None, None
    return model.state_dict(), taken
