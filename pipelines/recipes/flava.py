"""FLAVA recipes. Hyperparameters: Singh et al. 2022, section 3.4: a large batch, a large weight decay, a long warm-up. The sources come
with `--data`, pairs, images or texts; a step is of one of them, in the proportions of `data.mix.weights`."""

from __future__ import annotations

from mm_core.data.augment import AugmentConfig
from mm_core.data.masking import MaskingConfig
from mm_core.data.mix import Choice, MixConfig
from mm_core.models import flava as models
from mm_core.objectives.classify import ClassifyConfig
from mm_core.objectives.multitask import MultitaskConfig
from mm_core.optim import OptimizerConfig
from mm_core.schedule import ScheduleConfig
from pipelines.train.config import CheckpointConfig, DataConfig, TokenizerConfig, TrainRun

_BY_STEP = MixConfig(choice=Choice.STEP)
_WHOLE = {"mix": MixConfig(), "masking": None}
"""Of the data where samples are classified: nothing is hidden of them."""


def flava_tiny() -> TrainRun:
    """Rendered scenes, a quarter of an hour on two CPU cores. Blocks and shares suit 16 patches and captions of ten words."""
    return TrainRun(
        recipe="flava-tiny",
        model=models.flava_tiny(),
        objective=MultitaskConfig(),
        tokenizer=TokenizerConfig(vocab_size=1024),
        data=DataConfig(
            chunk=16,
            mix=_BY_STEP,
            augment=AugmentConfig(crop_area=(0.9, 1.0)),
            masking=MaskingConfig(min_block=2, text_share=0.3),
        ),
        optimizer=OptimizerConfig(lr=1e-3, weight_decay=0.1),
        schedule=ScheduleConfig(warmup_steps=100),
        steps=1500,
        global_batch_size=64,
        checkpoint=CheckpointConfig(every_steps=250),
    )


def flava_base() -> TrainRun:
    """The paper's: 8,192 samples a step, 150,000 steps; BERT's tokenizer, DALL-E's codebook.

    What differs: towers begin fresh, where the paper's last model begins from ones trained on images and on texts alone; sources are mixed
    by their sizes unless `data.mix.weights` says otherwise; 78 of 196 patches are hidden at most, BEiT's 0.4, where its code stops at 75;
    matching looks at whole sides. Nothing cuts a step into pieces: it takes GPUs for 8,192 pairs, or fewer with
    `parallel.activation_checkpointing` and fsdp.
    """
    return TrainRun(
        recipe="flava-base",
        model=models.flava_base(),
        objective=MultitaskConfig(),
        tokenizer=TokenizerConfig(source="google-bert/bert-base-uncased"),
        data=DataConfig(chunk=64, run_length=64, mix=_BY_STEP, masking=MaskingConfig()),
        optimizer=OptimizerConfig(lr=1e-3, beta2=0.999, eps=1e-8, weight_decay=0.1),
        schedule=ScheduleConfig(warmup_steps=10_000),
        steps=150_000,
        global_batch_size=8_192,
        checkpoint=CheckpointConfig(every_steps=1000),
    )


def flava_tiny_classify() -> TrainRun:
    """`flava-tiny`, fine-tuned with `--init` to classify pairs: by the answer to a question, or whether a caption is true."""
    base = flava_tiny()
    return base.model_copy(
        update={
            "recipe": "flava-tiny-classify",
            "objective": ClassifyConfig(),
            "tokenizer": TokenizerConfig(),
            "data": base.data.model_copy(update=_WHOLE),
            "optimizer": OptimizerConfig(lr=5e-4, weight_decay=0.1),
            "schedule": ScheduleConfig(warmup_steps=50),
            "steps": 600,
            "checkpoint": CheckpointConfig(every_steps=200),
        }
    )


def flava_base_classify() -> TrainRun:
    """`flava-base`, fine-tuned to classify pairs: ten epochs of VQAv2's training questions by its 3,129 commonest answers.

    Batch, rate, decay and epochs are ViLT's (Kim et al. 2021, arXiv 2102.03334, section 4.2). What differs: one answer is right, by
    cross-entropy, where ViLT scores several; the head learns at the rate of the rest.
    """
    base = flava_base()
    return base.model_copy(
        update={
            "recipe": "flava-base-classify",
            "model": base.model.model_copy(update={"codebook_source": None}),
            "objective": ClassifyConfig(num_classes=3129),
            "tokenizer": TokenizerConfig(),
            "data": base.data.model_copy(update=_WHOLE | {"chunk": 32, "run_length": 1}),
            "optimizer": OptimizerConfig(lr=1e-4, beta2=0.999, eps=1e-8, weight_decay=0.01),
            "schedule": ScheduleConfig(warmup_steps=1_700),
            "steps": 17_000,
            "global_batch_size": 256,
        }
    )
