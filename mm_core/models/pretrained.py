"""Two-tower models as others wrote them: from a folder in transformers' layout or the hub. Safetensors alone, no pickle, no remote code."""

from __future__ import annotations

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, CLIPModel, PreTrainedModel, PreTrainedTokenizerFast, SiglipModel
from transformers.image_processing_base import ImageProcessingMixin

from mm_core.errors import BundleError, ConfigError
from mm_core.models.clip import LEGACY_EOS
from mm_core.models.quiet import quiet
from mm_core.models.tokenizer import special_tokens
from mm_core.models.two_tower import OPENAI_MEAN, OPENAI_STD

_TOWER_KEYS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "hidden_act", "layer_norm_eps")


_CLASSES: dict[str, type[PreTrainedModel]] = {"clip": CLIPModel, "siglip": SiglipModel}
"""By `model_type` of config.json."""


def load_two_tower(source: str) -> PreTrainedModel:
    """A model in fp32, every weight of which is in the file: transformers would make up the missing ones.

    Raises:
        BundleError: there is no such model, it is of another kind, or it is not whole.
    """
    try:
        with quiet():
            config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        if config.model_type not in _CLASSES:
            raise BundleError(f"{source} is a {config.model_type} model; this command takes {' and '.join(_CLASSES)} models")
        with quiet():
            model, report = _CLASSES[config.model_type].from_pretrained(
                source, use_safetensors=True, dtype=torch.float32, output_loading_info=True
            )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = next(iter(str(error).splitlines()), repr(error))
        raise BundleError(f"no model that can be loaded at {source}: {reason}") from None
    if missing := sorted(report["missing_keys"]):
        raise BundleError(f"{source} lacks {len(missing)} of the model's tensors, {missing[0]} first: copy it again from where it came")
    return model


def hub_commit(source: str) -> str:
    """The commit of a hub id, as this machine has it or would fetch it.

    Raises:
        BundleError: it cannot be known.
    """
    try:
        with quiet():
            commit = getattr(AutoConfig.from_pretrained(source, trust_remote_code=False), "_commit_hash", None)
    except (OSError, ValueError, KeyError) as error:
        reason = next(iter(str(error).splitlines()), repr(error))
        raise BundleError(f"no model that can be loaded at {source}: {reason}") from None
    if commit is None:
        raise BundleError(f"which commit of {source} is loaded cannot be known: download it, and give its folder")
    return str(commit)


def load_normalisation(source: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of the pixels a model was trained on, [0, 1]; OpenAI's where it does not say."""
    try:
        values, _ = ImageProcessingMixin.get_image_processor_dict(source)
    except (OSError, ValueError):
        return OPENAI_MEAN, OPENAI_STD
    return tuple(values.get("image_mean", OPENAI_MEAN)), tuple(values.get("image_std", OPENAI_STD))


def architecture(model: PreTrainedModel) -> dict[str, object]:
    """What two models must agree on for the weights of one to work in the other: sizes, and what changes no shape. Not the image size:
    position embeddings can be resized."""
    config = model.config
    text = {f"text_config.{key}": getattr(config.text_config, key) for key in (*_TOWER_KEYS, "vocab_size", "max_position_embeddings")}
    vision = {f"vision_config.{key}": getattr(config.vision_config, key) for key in (*_TOWER_KEYS, "patch_size")}
    return {"model_type": config.model_type, "embed_dim": joint_width(model)} | text | vision


def joint_width(model: PreTrainedModel) -> int:
    """Of the joint space; SigLIP's image tower has no projection."""
    return int(model.config.projection_dim if model.config.model_type == "clip" else model.config.vision_config.hidden_size)


def check_pooling(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    """The token at which a CLIP model pools is the one that the tokenizer puts at the end of a text.

    Raises:
        ConfigError: it is another, so that text features would be of the wrong token.
    """
    if model.config.model_type != "clip":
        return
    pooled, eos = model.config.text_config.eos_token_id, special_tokens(tokenizer).eos
    if pooled == LEGACY_EOS:
        pooled = max(tokenizer.get_vocab().values())
    if pooled != eos:
        raise ConfigError(f"it pools at token {pooled}, and its tokenizer ends a text with {eos}: the two do not belong together")
