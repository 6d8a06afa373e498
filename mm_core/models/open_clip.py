"""open_clip's ViT CLIP weights (safetensors; `CLIP` and, with standard towers, `CustomTextCLIP`) as a `CLIPModel` of equal features.

Sizes follow from the tensors' shapes. What shapes do not tell (heads, activation, normalisation) is read from `open_clip_config.json`
beside the file, where the hub's repositories have it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPModel, PreTrainedTokenizerFast

from mm_core.errors import BundleError
from mm_core.models.clip import Activation, ClipConfig, build_clip
from mm_core.models.sizes import OPENAI_MEAN, OPENAI_STD, TowerConfig
from mm_core.models.tokenizer import special_tokens

_CONFIG = "open_clip_config.json"
_HEAD_WIDTH = 64
"""Of a head, in every model that does not say otherwise."""
_NAMES = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.ln_pre": "vision_model.pre_layrnorm",
    "visual.transformer.resblocks": "vision_model.encoder.layers",
    "visual.ln_post": "vision_model.post_layernorm",
    "visual.proj": "visual_projection.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "transformer.resblocks": "text_model.encoder.layers",
    "ln_final": "text_model.final_layer_norm",
    "text_projection": "text_projection.weight",
    "logit_scale": "logit_scale",
}
"""Of tensors and of modules."""
_BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_PROJECTIONS = ("visual.proj", "text_projection")
"""Kept as (from, to), where transformers has (to, from)."""
_BUFFERS = ("attn_mask",)


def read_open_clip(file: Path, tokenizer: PreTrainedTokenizerFast, *, activation: Activation | None = None) -> tuple[CLIPModel, ClipConfig]:
    """The model in `file`, in fp32.

    Args:
        tokenizer: that it was trained with; it becomes part of the model's configuration.
        activation: of the MLPs, where no configuration lies beside the file: gelu for most, quick_gelu for OpenAI's weights.

    Raises:
        BundleError: no safetensors, another kind of model, or an activation that nothing tells.
    """
    weights = _weights(file)
    settings = _settings(file.with_name(_CONFIG))
    config = _config(file, weights, settings, len(tokenizer), activation)
    model = build_clip(config, special_tokens(tokenizer))
    state = {new: tensor for name, tensor in weights.items() for new, tensor in _renamed(file, name, tensor)}
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise BundleError(f"{file} is no ViT CLIP as open_clip builds it: {' '.join(str(error).split())[:300]}") from None
    return model, config


def _weights(file: Path) -> dict[str, Tensor]:
    """By open_clip's names for `CLIP`, whose text tower has no prefix of its own."""
    if file.suffix != ".safetensors":
        raise BundleError(
            f"{file} is no .safetensors file; a pickle can run code when it is read: take the hub's open_clip_model.safetensors, or convert"
            " it with safetensors.torch.save_file where you trust it"
        )
    try:
        loaded = load_file(file)
    except (OSError, SafetensorError) as error:
        raise BundleError(f"cannot read {file}: {error}") from None
    named = {name.removeprefix("module.").removeprefix("text."): tensor.float() for name, tensor in loaded.items()}
    return {name: tensor for name, tensor in named.items() if name not in _BUFFERS}


def _settings(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BundleError(f"{path} is not valid JSON: {error}") from None
    return values if isinstance(values, dict) else {}


def _config(
    file: Path, weights: Mapping[str, Tensor], settings: Mapping[str, Any], vocab_size: int, activation: Activation | None
) -> ClipConfig:
    model, preprocess = settings.get("model_cfg", {}), settings.get("preprocess_cfg", {})
    if activation is None and not model:
        raise BundleError(
            f"nothing tells the activation of {file}: put {_CONFIG} beside it, or give --activation gelu (quick_gelu: OpenAI's)"
        )
    try:
        patches, width = weights["visual.positional_embedding"].shape
        patch_size = weights["visual.conv1.weight"].shape[-1]
        context_length, text_width = weights["positional_embedding"].shape
        embed_dim = weights["visual.proj"].shape[1]
        vocabulary = weights["token_embedding.weight"].shape[0]
    except KeyError as error:
        raise BundleError(f"{file} has no tensor {error}: only ViT CLIP models of open_clip can be imported") from None
    if vocabulary != vocab_size:
        raise BundleError(f"{file} has {vocabulary:,} tokens, the tokenizer {vocab_size:,}: give the one it was trained with, --tokenizer")
    heads = width // model.get("vision_cfg", {}).get("head_width", _HEAD_WIDTH)
    text_heads = model.get("text_cfg", {}).get("heads", text_width // _HEAD_WIDTH)
    return ClipConfig(
        image_size=round((patches - 1) ** 0.5) * patch_size,
        patch_size=patch_size,
        context_length=context_length,
        vocab_size=vocab_size,
        embed_dim=embed_dim,
        vision=_tower(weights, "visual.transformer", width, heads),
        text=_tower(weights, "transformer", text_width, text_heads),
        hidden_act=activation or ("quick_gelu" if model.get("quick_gelu") else "gelu"),
        image_mean=tuple(preprocess.get("mean", OPENAI_MEAN)),
        image_std=tuple(preprocess.get("std", OPENAI_STD)),
    )


def _tower(weights: Mapping[str, Tensor], prefix: str, width: int, heads: int) -> TowerConfig:
    mlp = weights.get(f"{prefix}.resblocks.0.mlp.c_fc.weight")
    mlp_width = None if mlp is None or len(mlp) == 4 * width else len(mlp)
    return TowerConfig(width=width, layers=_layers(weights, prefix), heads=heads, mlp_width=mlp_width)


def _layers(weights: Mapping[str, Tensor], tower: str) -> int:
    found = [re.match(rf"{re.escape(tower)}\.resblocks\.(\d+)\.", name) for name in weights]
    return 1 + max((int(match[1]) for match in found if match), default=-1)


def _renamed(file: Path, name: str, tensor: Tensor) -> list[tuple[str, Tensor]]:
    """One tensor's names and values in transformers; an attention's common input projection becomes three."""
    old = next((old for old in sorted(_NAMES, key=len, reverse=True) if name == old or name.startswith(f"{old}.")), None)
    if old is None:
        raise BundleError(f"{file} has a tensor {name!r} that no ViT CLIP has: only such models of open_clip can be imported")
    rest = name[len(old) :]
    if not old.endswith("resblocks"):
        return [(_NAMES[old] + rest, tensor.T.contiguous() if old in _PROJECTIONS else tensor)]
    _, layer, inner = rest.split(".", 2)
    prefix = f"{_NAMES[old]}.{layer}."
    if inner.startswith("attn.in_proj_"):
        kind = inner.removeprefix("attn.in_proj_")
        return [(f"{prefix}self_attn.{part}_proj.{kind}", piece) for part, piece in zip("qkv", tensor.chunk(3), strict=True)]
    module, _, kind = inner.rpartition(".")
    if module not in _BLOCK:
        raise BundleError(f"{file} has a tensor {name!r} that no block of a ViT CLIP has: only such models of open_clip can be imported")
    return [(f"{prefix}{_BLOCK[module]}.{kind}", tensor)]


def import_open_clip(file: Path, out: Path, tokenizer: PreTrainedTokenizerFast, *, activation: Activation | None = None) -> ClipConfig:
    """Write the model in `file` as a bundle.

    Raises:
        BundleError: as `read_open_clip`, or `out` exists.
    """
    from mm_core.bundle import write_bundle

    model, config = read_open_clip(file, tokenizer, activation=activation)
    write_bundle(
        out, model=model, tokenizer=tokenizer, config=config, recipe=f"open_clip:{file.name}", data_fingerprint="unknown", metrics={}
    )
    return config
