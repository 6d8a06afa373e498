"""Everything that decides a training run: one frozen tree, built by a recipe, changed by file, environment and `--set`."""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from mm_core.config import Config
from mm_core.data.augment import AugmentConfig
from mm_core.data.image import MAX_PIXELS
from mm_core.data.masking import MaskingConfig
from mm_core.data.mix import MixConfig
from mm_core.data.ranged import GAP_BYTES
from mm_core.data.text import TEMPLATE_MARK
from mm_core.errors import ConfigError
from mm_core.models.dvae import DvaeConfig
from mm_core.models.family import AnyModelConfig, ModelConfig
from mm_core.models.two_tower import Tower
from mm_core.models.warm_start import InitMatch
from mm_core.objectives.classify import ClassifyConfig
from mm_core.objectives.codebook import CodebookObjectiveConfig
from mm_core.objectives.config import ObjectiveConfig
from mm_core.objectives.multitask import MultitaskConfig
from mm_core.optim import OptimizerConfig
from mm_core.schedule import ScheduleConfig
from mm_core.training.checkpoints import Retention
from mm_core.training.guard import GuardConfig
from mm_core.training.parallel import Parallelism
from mm_core.training.precision import Precision
from pipelines.stream import StreamConfig
from pipelines.tracking import TrackingConfig


class DataConfig(Config):
    """What is read, in which order and form."""

    chunk: int = Field(default=16, ge=1, le=64, description="Samples that are handed to a rank together.")
    run_length: int = Field(
        default=1, ge=1, description="Neighbouring samples read in one go: 1 on a local disk, 16 to 64 on a remote store."
    )
    mix: MixConfig = Field(default=MixConfig(), description="Proportions of several indexes.")
    augment: AugmentConfig = AugmentConfig()
    captions: int = Field(default=1, ge=1, le=16, description="Texts of each image in a step, each one of its captions.")
    prompt_templates: tuple[str, ...] = Field(default=(), description="Texts with {c} for the caption; one is drawn each time.")
    masking: MaskingConfig | None = Field(default=None, description="What is hidden of a sample, for models that predict it.")
    max_pixels: int = Field(default=MAX_PIXELS, gt=0, description="Images above this are not decoded.")
    gap_bytes: int = Field(
        default=GAP_BYTES, ge=0, description="Bytes between two samples of a remote shard that are read along rather than asked for apart."
    )
    verify: bool = Field(default=False, description="Compare every sample that is read with the digest that the index has of it.")
    max_bad_fraction: float = Field(default=0.1, ge=0, le=1, description="The run stops if a larger share of samples has to be replaced.")

    @field_validator("prompt_templates")
    @classmethod
    def _have_a_place(cls, templates: tuple[str, ...]) -> tuple[str, ...]:
        for template in templates:
            if TEMPLATE_MARK not in template:
                raise ValueError(f"{template!r} has no {TEMPLATE_MARK} where the caption goes")
        return templates


class TokenizerConfig(Config):
    """A byte-level BPE trained on the corpus, or one from elsewhere."""

    source: str | None = Field(default=None, description="Folder or hub id of a Hugging Face tokenizer; by default one is trained.")
    vocab_size: int = Field(default=8192, ge=300, description="Of a trained one, at most.")
    max_captions: int = Field(default=200_000, gt=0, description="Captions a tokenizer is trained on, at most.")


class CheckpointConfig(Retention):
    """When a checkpoint is written, and which stay. They are written beside training."""

    every_steps: int = Field(default=500, gt=0, description="Steps between checkpoints; the last step makes one too.")


class FaultsConfig(GuardConfig):
    """What is done when something goes wrong."""

    step_timeout_s: float = Field(
        default=1800.0,
        gt=0,
        description="A rank that takes longer for a step, checkpoint and evaluation included, tells where it stands and is started again.",
    )
    max_failures: int = Field(
        default=8, ge=0, description="How often in a row workers may be lost, without a checkpoint between, before the run gives up."
    )


class EvaluationConfig(Config):
    """What is measured on held-out data while training. Changes nothing of what is learned."""

    every_steps: int | None = Field(default=None, gt=0, description="Steps between evaluations, and at the last step; null: none.")
    retrieval: str | None = Field(default=None, description="An index of held-out pairs, or INDEX#LEDGER.")
    zeroshot: str | None = Field(default=None, description="A folder in CLIP_benchmark's layout.")
    max_samples: int = Field(default=5000, gt=0, description="Of each; of more, some at equal distances, always the same.")
    background: bool = Field(default=False, description="Measure on a GPU, or without GPUs a processor, that the ranks do not use.")

    @model_validator(mode="after")
    def _measures_something(self) -> EvaluationConfig:
        if self.every_steps is not None and self.retrieval is None and self.zeroshot is None:
            raise ValueError("every_steps needs held-out data: set evaluation.retrieval to an index, or evaluation.zeroshot to a folder")
        return self

    def due(self, done: int, steps: int) -> bool:
        """After `done` of `steps` steps."""
        return self.every_steps is not None and (done % self.every_steps == 0 or done == steps)


class TowersConfig(Config):
    """How the towers take part in training."""

    frozen: Tower | None = Field(default=None, description="A tower that is not trained: vision, with --init, is LiT.")
    patch_dropout: float = Field(default=0.0, ge=0, lt=1, description="Share of an image's patches that is left out at random (FLIP).")

    @model_validator(mode="after")
    def _drops_where_it_trains(self) -> TowersConfig:
        if self.patch_dropout and self.frozen is Tower.VISION:
            raise ValueError(
                "patch_dropout leaves patches out in training, and frozen=vision does not train that tower: set one of the two"
            )
        return self


class ParallelConfig(Config):
    """How a step is computed. Changes neither the samples nor, but for rounding, the mathematics."""

    kind: Parallelism = Field(default=Parallelism.DDP, description="ddp: every rank holds the model; fsdp: the ranks divide it.")
    micro_batch_size: int | None = Field(
        default=None,
        ge=1,
        description="Samples of a rank that go through the model at a time; by default all. Less memory, a second forward.",
    )
    activation_checkpointing: bool = Field(default=False, description="Keep only a block's input and compute the rest again: less memory.")
    compile: bool = Field(default=False, description="Compile the transformer blocks (torch.compile): faster on GPUs, after a minute.")
    logit_block_mb: int = Field(default=128, ge=1, description="The largest part of the similarity matrix that is held at a time, MB.")


class ResourceConfig(Config):
    """What the run may use. Changes neither the samples nor the mathematics."""

    workers: int = Field(default=1, ge=1, description="Ranks.")
    min_workers: int | None = Field(
        default=None, ge=1, description="With so many the run goes on where the cluster has no room for all; by default it waits."
    )
    resize_every_s: float = Field(
        default=60.0, ge=0, description="With min_workers: seconds between looks for room for more. A change starts the workers again."
    )
    gpus_per_worker: float | None = Field(default=None, ge=0, description="By default 1 where the cluster has that many GPUs now, else 0.")

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.min_workers is not None and self.min_workers > self.workers:
            raise ValueError(f"min_workers {self.min_workers} is above workers {self.workers}")
        return self

    @property
    def elastic(self) -> tuple[int, int] | None:
        """The fewest and the most workers, where they may change."""
        return None if self.min_workers is None else (self.min_workers, self.workers)


def _objective_tag(value: Any) -> str:
    """Of kinds that need a model of their own their name; all others are of two towers."""
    kind = value.get("kind") if isinstance(value, dict) else value.kind
    return str(kind) if kind in ("multitask", "codebook", "classify") else "two_towers"


Objectives = Annotated[
    Annotated[ObjectiveConfig, Tag("two_towers")]
    | Annotated[MultitaskConfig, Tag("multitask")]
    | Annotated[CodebookObjectiveConfig, Tag("codebook")]
    | Annotated[ClassifyConfig, Tag("classify")],
    Discriminator(_objective_tag),
]


class TrainRun(Config):
    """A complete training run."""

    recipe: str = Field(description="Name of the recipe this came from.")
    model: AnyModelConfig
    towers: TowersConfig = TowersConfig()
    init: str | None = Field(default=None, description="Bundle folder or hub id whose weights training starts from.")
    init_match: InitMatch = Field(default=InitMatch.EXACT, description="exact, or partial: take what fits, and leave the rest fresh.")
    tokenizer: TokenizerConfig = TokenizerConfig()
    data: DataConfig = DataConfig()
    objective: Objectives = ObjectiveConfig()
    optimizer: OptimizerConfig
    schedule: ScheduleConfig
    ema_decay: float | None = Field(
        default=None, gt=0, lt=1, description="Export an exponential mean of the weights with this decay, 0.999 say, in place of the last."
    )
    steps: int = Field(gt=0, description="Optimiser steps of the whole run.")
    global_batch_size: int = Field(gt=0, description="Samples per optimiser step, over all ranks.")
    seed: int = Field(default=0, ge=0)
    precision: Precision = Precision.AUTO
    parallel: ParallelConfig = ParallelConfig()
    log_every_steps: int = Field(default=10, gt=0)
    checkpoint: CheckpointConfig = CheckpointConfig()
    faults: FaultsConfig = FaultsConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    stream: StreamConfig = StreamConfig()
    resources: ResourceConfig = ResourceConfig()
    tracking: TrackingConfig = TrackingConfig()
    storage: str = Field(default="runs", description="Folder or URL under which each run has a folder of its own.")

    @model_validator(mode="after")
    def _measures_what_there_is(self) -> Self:
        if self.evaluation.every_steps is not None and not self.model.reads_text:
            raise ValueError("evaluation compares images with texts, and a codebook reads none: set evaluation.every_steps=null")
        if (self.checkpoint.best_metric or "").startswith("eval/") and self.evaluation.every_steps is None:
            raise ValueError(f"checkpoint.best_metric={self.checkpoint.best_metric} is measured by evaluation: set evaluation.every_steps")
        return self

    @property
    def joint_model(self) -> ModelConfig:
        """The model, where it puts images and texts into one space.

        Raises:
            ConfigError: it does not.
        """
        if isinstance(self.model, DvaeConfig):
            raise ConfigError(f"{self.recipe} trains a codebook, which reads no texts: this is for models of images and texts")
        return self.model

    @property
    def teacher(self) -> str | None:
        """The model that a distillation learns from."""
        return self.objective.teacher if isinstance(self.objective, ObjectiveConfig) else None

    def identity(self) -> dict[str, Any]:
        """The part that decides what is learned: two runs equal in it, on equal data, are the same run."""
        whole = {"parallel", "log_every_steps", "checkpoint", "evaluation", "faults", "stream", "resources", "tracking", "storage"}
        return self.model_dump(mode="json", exclude=dict.fromkeys(whole, True) | {"data": {"gap_bytes", "verify", "max_bad_fraction"}})
