"""Two-tower models as others wrote them: from a folder in transformers' layout or the hub. Safetensors alone, no pickle, no remote code."""

from __future__ import annotations

from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AlignModel,
    AutoConfig,
    CLIPModel,
    FlavaForPreTraining,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    SiglipModel,
    VisionTextDualEncoderModel,
)
from transformers.image_processing_base import ImageProcessingMixin

from mm_core.errors import BundleError, ConfigError
from mm_core.models.clip import LEGACY_EOS
from mm_core.models.quiet import quiet
from mm_core.models.sizes import OPENAI_MEAN, OPENAI_STD
from mm_core.models.tokenizer import special_tokens

_TRANSFORMER = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "hidden_act", "layer_norm_eps")
_EFFICIENTNET = (
    *("width_coefficient", "depth_coefficient", "depth_divisor", "kernel_sizes", "in_channels", "out_channels", "depthwise_padding"),
    *("strides", "num_block_repeats", "expand_ratios", "squeeze_expansion_ratio", "pooling_type", "batch_norm_eps"),
)
_ARCHITECTURE = (
    *("model_type", *_TRANSFORMER, "vocab_size", "max_position_embeddings", "type_vocab_size", "patch_size"),
    *_EFFICIENTNET,
)
"""What of a tower's configuration decides its shapes and what its weights mean, where it has it."""

_CLASSES: dict[str, type[PreTrainedModel]] = {
    "clip": CLIPModel,
    "siglip": SiglipModel,
    "align": AlignModel,
    "vision-text-dual-encoder": VisionTextDualEncoderModel,
    "flava": FlavaForPreTraining,
}
"""By `model_type` of config.json."""


_TOWERS = ("text_config", "vision_config", "image_config", "multimodal_config", "image_codebook_config")
"""Parts of a configuration, those that a model has."""


def read_config(source: str) -> PreTrainedConfig:
    """config.json of a model, nothing else loaded.

    Raises:
        BundleError: there is no such model, or it is of another kind.
    """
    try:
        with quiet():
            config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise _not_loadable(source, error) from None
    if config.model_type not in _CLASSES:
        raise BundleError(f"{source} is a {config.model_type} model; this command takes {', '.join(_CLASSES)} models")
    return config


def outline_of(source: str) -> PreTrainedModel:
    """A model on the meta device: no weights are read, nothing is allocated.

    Raises:
        BundleError: there is no such model, or it is of another kind.
    """
    config = read_config(source)
    with torch.device("meta"):
        return _CLASSES[config.model_type](config)


def load_two_tower(source: str) -> PreTrainedModel:
    """A model in fp32, every weight of which is in the file: transformers would make up the missing ones.

    Raises:
        BundleError: there is no such model, it is of another kind, or it is not whole.
    """
    kind = _CLASSES[read_config(source).model_type]
    try:
        with quiet():
            model, report = kind.from_pretrained(source, use_safetensors=True, dtype=torch.float32, output_loading_info=True)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise _not_loadable(source, error) from None
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
        raise _not_loadable(source, error) from None
    if commit is None:
        raise BundleError(f"which commit of {source} is loaded cannot be known: download it, and give its folder")
    return str(commit)


def _not_loadable(source: str, error: Exception) -> BundleError:
    reason = next(iter(str(error).splitlines()), repr(error))
    return BundleError(f"no model that can be loaded at {source}: {reason}")


def load_normalisation(
    source: str, mean: tuple[float, ...] = OPENAI_MEAN, std: tuple[float, ...] = OPENAI_STD
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of the pixels a model was trained on, [0, 1]; the given ones where it does not say."""
    values = _preprocessing(source)
    return tuple(values.get("image_mean", mean)), tuple(values.get("image_std", std))


def fed_image_size(model: PreTrainedModel, source: str) -> int:
    """Side of the images a model was trained on. An EfficientNet takes any, so ALIGN's is the one that its preprocessing crops to."""
    size = int(_image_tower(model).image_size)
    if model.config.model_type != "align":
        return size
    return int(_preprocessing(source).get("crop_size", {}).get("height", size))


def _image_tower(model: PreTrainedModel) -> PreTrainedConfig:
    return model.config.image_config if model.config.model_type == "flava" else model.config.vision_config


def _preprocessing(source: str) -> dict[str, Any]:
    try:
        values, _ = ImageProcessingMixin.get_image_processor_dict(source)
    except (OSError, ValueError):
        return {}
    return values


def fed_context_length(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> int:
    """Tokens of a text, at most, of a model that mm did not train: what it and its tokenizer allow."""
    return min(int(model.config.text_config.max_position_embeddings), tokenizer.model_max_length)


def architecture(model: PreTrainedModel) -> dict[str, object]:
    """What two models must agree on for the weights of one to work in the other: sizes, and what changes no shape. Not the image size:
    position embeddings can be resized."""
    config = model.config
    towers = {
        f"{name}.{key}": getattr(tower, key)
        for name, tower in ((name, getattr(config, name)) for name in _TOWERS if hasattr(config, name))
        for key in _ARCHITECTURE
        if hasattr(tower, key)
    }
    return {"model_type": config.model_type, "embed_dim": joint_width(model)} | towers


def joint_width(model: PreTrainedModel) -> int:
    """Of the joint space; SigLIP's image tower has no projection."""
    return int(model.config.vision_config.hidden_size if model.config.model_type == "siglip" else model.config.projection_dim)


def is_fused(config: PreTrainedConfig) -> bool:
    """Whether it is of a model with a fusion over its two towers."""
    return bool(config.model_type == "flava")


def fused_width(config: PreTrainedConfig) -> int | None:
    """Of the fusion's features, which are in a space of their own; None of two towers alone."""
    return int(config.multimodal_config.hidden_size) if is_fused(config) else None


def check_pooling(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    """The token at which CLIP's text tower pools is the one that the tokenizer puts at the end of a text.

    Raises:
        ConfigError: it is another, so that text features would be of the wrong token.
    """
    if model.config.text_config.model_type != "clip_text_model":
        return
    pooled, eos = model.config.text_config.eos_token_id, special_tokens(tokenizer).eos
    if pooled == LEGACY_EOS:
        pooled = max(tokenizer.get_vocab().values())
    if pooled != eos:
        raise ConfigError(f"it pools at token {pooled}, and its tokenizer ends a text with {eos}: the two do not belong together")
