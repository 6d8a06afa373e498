"""Two towers that others trained, joined: transformers' `VisionTextDualEncoderModel`, with fresh projections into the joint space.

Where the towers come from is looked up once, when a run begins; from then on their configurations are part of the run's, so that workers,
checkpoints and bundles need neither the folders nor the hub.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from mm_core.config import Config
from mm_core.errors import ConfigError
from mm_core.models.sizes import SpecialTokens, TwoTowerConfig, check_padding
from mm_core.models.two_tower import UNMASKED

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, VisionTextDualEncoderModel

_NOTES = frozenset({"_name_or_path", "architectures", "dtype", "id2label", "label2id", "transformers_version"})
"""Entries of a configuration that decide nothing of a tower."""


class TowerConfigs(Config):
    """Both towers' configurations as transformers writes them."""

    vision: dict[str, Any]
    text: dict[str, Any]


class DualConfig(TwoTowerConfig):
    """Where the towers come from, and how they are fed."""

    derived: ClassVar[frozenset[str]] = TwoTowerConfig.derived | {"towers", "image_mean", "image_std"}

    family: Literal["dual"] = "dual"
    vision_source: str = Field(description="Folder or hub id of the image tower, or of a CLIP or SigLIP model that has it.")
    text_source: str = Field(description="Folder or hub id of the text tower, of its tokenizer too, or of a CLIP model that has them.")
    towers: TowerConfigs | None = Field(default=None, description="Set from the sources.")

    @property
    def tokenizer_source(self) -> str | None:
        return self.text_source

    @property
    def is_resolved(self) -> bool:
        return self.towers is not None


def resolve_dual(config: DualConfig) -> DualConfig:
    """The same with both towers' configurations, and the image tower's mean and deviation of pixels, if its source has them. The vocabulary
    is all that the text tower knows, until a tokenizer is loaded.

    Raises:
        ConfigError: a source that is not there, or has no such tower.
    """
    from mm_core.models.pretrained import load_normalisation

    mean, std = load_normalisation(config.vision_source, config.image_mean, config.image_std)
    towers = TowerConfigs(vision=_settings(config.vision_source, "vision"), text=_settings(config.text_source, "text"))
    vocab_size = towers.text.get("vocab_size")
    if not isinstance(vocab_size, int):
        raise ConfigError(f"model.text_source: {config.text_source} is a {towers.text['model_type']} model, which reads no tokens")
    return config.model_copy(update={"towers": towers, "vocab_size": vocab_size, "image_mean": mean, "image_std": std})


def build_dual(config: DualConfig, tokens: SpecialTokens) -> VisionTextDualEncoderModel:
    """A `VisionTextDualEncoderModel` with fresh weights. Parameters that no feature reads are not trained.

    Raises:
        ConfigError: the sources have not been looked up, or towers that cannot be joined or fed like this.
    """
    if config.towers is None:
        raise ConfigError("the towers of a dual model are known once model.vision_source and model.text_source are read")
    _check_text(config, config.towers.text, tokens)
    from transformers import VisionTextDualEncoderConfig, VisionTextDualEncoderModel

    hf_config = VisionTextDualEncoderConfig(
        vision_config=config.towers.vision | {"image_size": config.image_size},
        text_config=config.towers.text | {"pad_token_id": tokens.pad},
        projection_dim=config.embed_dim,
    )
    unread = _unread(hf_config, config)
    model = VisionTextDualEncoderModel(hf_config)
    for name in unread:
        model.get_parameter(name).requires_grad_(False)
    return model


def _check_text(config: DualConfig, text: Mapping[str, Any], tokens: SpecialTokens) -> None:
    if text["model_type"] not in UNMASKED:
        check_padding(config.family, tokens)
    hf_config = _from_dict(text)
    if config.vocab_size > hf_config.vocab_size:
        raise ConfigError(
            f"the tokenizer has {config.vocab_size:,} tokens, and the text tower of {config.text_source} knows {hf_config.vocab_size:,}:"
            " leave tokenizer.source out, and its own is taken"
        )
    places = getattr(hf_config, "max_position_embeddings", config.context_length)
    if config.context_length > places:
        raise ConfigError(f"model.context_length {config.context_length} is above what {config.text_source} has places for, {places}")


def _unread(hf_config: PreTrainedConfig, config: DualConfig) -> list[str]:
    """Names of parameters that no feature depends on, found by a pass on the meta device, where nothing is computed.

    Raises:
        ConfigError: a tower cannot be joined, or gives no pooled vector.
    """
    from transformers import VisionTextDualEncoderModel

    with torch.device("meta"):
        pixels = torch.zeros(2, 3, config.image_size, config.image_size)
        input_ids = torch.zeros(2, config.context_length, dtype=torch.long)
        try:
            model = VisionTextDualEncoderModel(hf_config)
            image = model.get_image_features(pixel_values=pixels).pooler_output
            text = model.get_text_features(input_ids=input_ids, attention_mask=None).pooler_output
        except Exception as error:  # of any tower of transformers, whatever it stumbles over
            raise ConfigError(
                f"{config.vision_source} ({hf_config.vision_config.model_type}) and {config.text_source}"
                f" ({hf_config.text_config.model_type}) cannot be joined: transformers needs a hidden_size and a pooled vector of each,"
                f" as ViT and BERT have them ({type(error).__name__}: {next(iter(str(error).splitlines()), '')})"
            ) from None
        names, parameters = zip(*((name, p) for name, p in model.named_parameters() if name != "logit_scale"), strict=True)
        gradients = torch.autograd.grad(image.sum() + text.sum(), parameters, allow_unused=True)
    return [name for name, gradient in zip(names, gradients, strict=True) if gradient is None]


def tower_weights(config: DualConfig) -> dict[str, Tensor]:
    """What the sources have of both towers, by the joined model's names.

    Raises:
        ConfigError: weights that cannot be read.
    """
    assert config.towers is not None, "the driver looks them up"
    towers = {"vision_model": (config.vision_source, config.towers.vision), "text_model": (config.text_source, config.towers.text)}
    return {f"{prefix}.{name}": tensor for prefix, tower in towers.items() for name, tensor in _weights(*tower).items()}


def _weights(source: str, settings: Mapping[str, Any]) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from transformers import AutoModel

    from mm_core.models.quiet import quiet

    try:
        with quiet():
            tower, report = AutoModel.from_pretrained(
                source,
                config=_from_dict(settings),
                use_safetensors=True,
                trust_remote_code=False,
                dtype=torch.float32,
                output_loading_info=True,
            )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ConfigError(f"no tower that can be loaded at {source}: {next(iter(str(error).splitlines()), repr(error))}") from None
    made_up = set(report["missing_keys"])
    return {name: tensor for name, tensor in tower.state_dict().items() if name not in made_up}


def _settings(source: str, tower: Literal["vision", "text"]) -> dict[str, Any]:
    """Of a tower itself, or of the one that a two-tower model has."""
    from transformers import AutoConfig

    from mm_core.models.quiet import quiet

    try:
        with quiet():
            config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        reason = next(iter(str(error).splitlines()), repr(error))
        raise ConfigError(f"model.{tower}_source: no model at {source} ({reason}): give a folder or a hub id") from None
    settings = getattr(config, f"{tower}_config", config).to_diff_dict()
    return {key: value for key, value in settings.items() if key not in _NOTES}


def _from_dict(settings: Mapping[str, Any]) -> PreTrainedConfig:
    from transformers import AutoConfig

    return AutoConfig.for_model(**settings)
