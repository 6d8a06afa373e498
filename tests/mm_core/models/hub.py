"""Tiny towers in folders as the hub has them, one of each kind that a dual model may be asked to join."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import torch
from transformers import (
    BertConfig,
    BertModel,
    BertTokenizerFast,
    CLIPConfig,
    CLIPModel,
    Dinov2Config,
    Dinov2Model,
    DistilBertConfig,
    DistilBertModel,
    PreTrainedModel,
    ResNetConfig,
    ResNetModel,
    RobertaConfig,
    RobertaForMaskedLM,
    ViTConfig,
    ViTModel,
    Wav2Vec2Config,
    Wav2Vec2Model,
)

from mm_core.models.quiet import quiet

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "blue", "circle", "square", "above", *string.ascii_lowercase[1:]]
WIDTH: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
GRID: dict[str, Any] = {"image_size": 32, "patch_size": 8}
PLACES: dict[str, Any] = {"vocab_size": len(WORDS), "max_position_embeddings": 18}


def towers() -> dict[str, PreTrainedModel]:
    clip_text = {**WIDTH, **PLACES, "bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0}
    return {
        "vit": ViTModel(ViTConfig(**WIDTH, **GRID)),
        "dinov2": Dinov2Model(Dinov2Config(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, **GRID)),
        "resnet": ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1])),
        "bert": BertModel(BertConfig(**WIDTH, **PLACES, hidden_dropout_prob=0, attention_probs_dropout_prob=0)),
        "roberta": RobertaForMaskedLM(RobertaConfig(**WIDTH, **PLACES, pad_token_id=0, bos_token_id=2, eos_token_id=3)),
        "distilbert": DistilBertModel(DistilBertConfig(dim=32, n_layers=1, n_heads=2, hidden_dim=64, vocab_size=len(WORDS))),
        "wav2vec2": Wav2Vec2Model(Wav2Vec2Config(**WIDTH, conv_dim=[8], conv_stride=[2], conv_kernel=[3], num_feat_extract_layers=1)),
        "clip": CLIPModel(CLIPConfig(text_config=clip_text, vision_config={**WIDTH, **GRID})),
    }


def write_hub(folder: Path) -> None:
    torch.manual_seed(0)
    with quiet():
        for name, tower in towers().items():
            tower.save_pretrained(folder / name)
    tokenizer = BertTokenizerFast(vocab={word: number for number, word in enumerate(WORDS)}, model_max_length=18)
    for name in ("bert", "clip"):
        tokenizer.save_pretrained(folder / name)
