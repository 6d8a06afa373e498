"""A bundle: a trained model as a folder that serving, evaluation and the registry read, and that knows nothing of training.

transformers' own layout (config.json, model.safetensors, tokenizer, preprocessor_config.json), plus `mm.json` (task, recipe, data
fingerprint, metrics, SHA-256 of every file) and a model card. Loaded from safetensors after the digests are checked; no pickle,
no remote code. A plain CLIP folder or hub id loads too, without digests to check.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float32, UInt8
from pydantic import ValidationError
from transformers import CLIPModel, PreTrainedTokenizerFast
from transformers.utils import logging as hf_logging

from mm_core.config import Config
from mm_core.errors import BundleError, ConfigError
from mm_core.models.clip import OPENAI_MEAN, OPENAI_STD, ClipConfig, TwoTower
from mm_core.models.tokenizer import caption_tokenizer, load_tokenizer

hf_logging.disable_progress_bar()

FORMAT = 1
MANIFEST = "mm.json"
_CARD = "README.md"


class BundleManifest(Config):
    """mm.json."""

    format: int = FORMAT
    task: Literal["contrastive"] = "contrastive"
    recipe: str
    data_fingerprint: str
    run_id: str | None = None
    metrics: dict[str, float] = {}
    model: ClipConfig
    files: dict[str, str]
    """SHA-256 of every other file of the bundle, by name."""

    @property
    def digest(self) -> str:
        """Names the bundle's content: SHA-256 over the files' digests."""
        return hashlib.sha256("".join(f"{n}{d}" for n, d in sorted(self.files.items())).encode()).hexdigest()


@dataclass
class Bundle:
    """A loaded model with its tokenizer and preprocessing."""

    name: str
    manifest: BundleManifest | None
    """None for a model that mm did not write."""
    towers: TwoTower
    tokenizer: PreTrainedTokenizerFast
    image_size: int
    device: torch.device

    def __post_init__(self) -> None:
        self._tokenise = caption_tokenizer(self.tokenizer, int(self.model.config.text_config.max_position_embeddings))

    @property
    def model(self) -> CLIPModel:
        return self.towers.clip

    @property
    def embed_dim(self) -> int:
        return int(self.model.config.projection_dim)

    @property
    def logit_scale(self) -> float:
        return float(self.towers.logit_scale)

    @torch.inference_mode()
    def image_features(self, images: UInt8[np.ndarray, "b h w 3"]) -> Float32[np.ndarray, "b d"]:
        """L2-normalised. `images` come from `decode_centre(…, bundle.image_size)`."""
        pixels = torch.from_numpy(np.array(images)).to(self.device)
        return self.towers.image_features(pixels).cpu().numpy()

    @torch.inference_mode()
    def text_features(self, texts: Sequence[str]) -> Float32[np.ndarray, "b d"]:
        """L2-normalised."""
        input_ids = torch.from_numpy(self._tokenise(texts)).to(self.device).long()
        return self.towers.text_features(input_ids).cpu().numpy()


def write_bundle(
    folder: Path,
    *,
    model: CLIPModel,
    tokenizer: PreTrainedTokenizerFast,
    config: ClipConfig,
    recipe: str,
    data_fingerprint: str,
    metrics: Mapping[str, float],
    run_id: str | None = None,
) -> BundleManifest:
    """Write a bundle, whole or not at all.

    Raises:
        BundleError: `folder` exists.
    """
    if folder.exists():
        raise BundleError(f"{folder} exists; a bundle is never changed: give another folder, or remove it first")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        model.save_pretrained(temporary, safe_serialization=True)
        tokenizer.save_pretrained(temporary)
        _write_json(temporary / "preprocessor_config.json", _preprocessor(config))
        facts = {"recipe": recipe, "data_fingerprint": data_fingerprint, "run_id": run_id, "metrics": dict(metrics), "model": config}
        (temporary / _CARD).write_text(_card(folder.name, config, recipe, data_fingerprint, metrics), encoding="utf-8")
        manifest = BundleManifest.model_validate(facts | {"files": _digests(temporary)})
        (temporary / MANIFEST).write_text(manifest.model_dump_json(indent=1), encoding="utf-8")
        os.replace(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return manifest


def read_manifest(folder: Path, *, verify: bool = True) -> BundleManifest:
    """The manifest of a bundle, its files' digests checked.

    Raises:
        BundleError: no bundle, one of another format, or a file that is missing or is not what was written.
    """
    try:
        values = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BundleError(f"{folder} is no bundle: {MANIFEST} cannot be read ({error})") from None
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise BundleError(f"the bundle {folder} has another format than {FORMAT}, which this mm reads: export the model again")
    try:
        manifest = BundleManifest.model_validate(values)
    except ValidationError as error:
        raise BundleError(f"{folder / MANIFEST} is not valid: {error.errors()[0]['msg']}") from None
    if verify:
        found = _digests(folder, list(manifest.files))
        for name, digest in manifest.files.items():
            if name not in found:
                raise BundleError(f"the bundle {folder} lacks {name}: copy it again from where it came")
            if found[name] != digest:
                raise BundleError(f"{folder / name} is not the file that was written (SHA-256 differs): copy the bundle again")
    return manifest


def load_bundle(source: str | Path, *, verify: bool = True, device: str | torch.device = "cpu") -> Bundle:
    """Load a bundle, a plain transformers CLIP folder, or a hub id.

    Raises:
        BundleError: there is no such model, it is damaged, or it is of another kind.
    """
    folder = Path(source)
    manifest = read_manifest(folder, verify=verify) if (folder / MANIFEST).is_file() else None
    if manifest is None and not folder.is_dir() and (folder.is_absolute() or str(source).startswith(".") or str(source).count("/") > 1):
        raise BundleError(f"no bundle at {source}: give a bundle's folder, models:/NAME@ALIAS, or a hub id")
    model = _load_clip(str(source))
    mean, std = (manifest.model.image_mean, manifest.model.image_std) if manifest else _hub_normalisation(str(source))
    towers = TwoTower(model, mean=mean, std=std).to(device).eval()
    try:
        tokenizer = load_tokenizer(str(source))
    except ConfigError as error:
        raise BundleError(f"{source}: {error}") from None
    image_size = int(model.config.vision_config.image_size)
    return Bundle(folder.name, manifest, towers, tokenizer, image_size, torch.device(device))


def init_from(model: CLIPModel, source: str) -> None:
    """Start `model` from the weights of a bundle, folder or hub id.

    Raises:
        BundleError: no such model, or a tensor of another shape.
    """
    if (Path(source) / MANIFEST).is_file():
        read_manifest(Path(source))
    theirs, ours = _load_clip(source).state_dict(), model.state_dict()
    for name, tensor in ours.items():
        if name not in theirs:
            raise BundleError(f"{source} has no tensor {name}: it is of another architecture than the recipe's model")
        if theirs[name].shape != tensor.shape:
            raise BundleError(
                f"{source} does not fit the recipe's model: {name} is {tuple(theirs[name].shape)} there, {tuple(tensor.shape)} here;"
                " choose the recipe it was trained with, and its tokenizer with --set tokenizer.source=…"
            )
    model.load_state_dict({name: theirs[name] for name in ours})


def _load_clip(source: str) -> CLIPModel:
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        if config.model_type != "clip":
            raise BundleError(f"{source} is a {config.model_type} model; this command takes CLIP models")
        return CLIPModel.from_pretrained(source, use_safetensors=True, torch_dtype=torch.float32)
    except (OSError, ValueError, KeyError) as error:
        lines = str(error).splitlines()
        raise BundleError(f"no model that can be loaded at {source}: {lines[0] if lines else error!r}") from None


def _hub_normalisation(source: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    from transformers import CLIPImageProcessor

    try:
        values, _ = CLIPImageProcessor.get_image_processor_dict(source)
    except (OSError, ValueError):
        return OPENAI_MEAN, OPENAI_STD
    return tuple(values.get("image_mean", OPENAI_MEAN)), tuple(values.get("image_std", OPENAI_STD))


def _preprocessor(config: ClipConfig) -> dict[str, Any]:
    """What `decode_centre` and `normalise` do, in transformers' words."""
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": config.image_size},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": config.image_size, "width": config.image_size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(config.image_mean),
        "image_std": list(config.image_std),
        "do_convert_rgb": True,
    }


def _card(name: str, config: ClipConfig, recipe: str, data_fingerprint: str, metrics: Mapping[str, float]) -> str:
    rows = "".join(f"| {key} | {value:.4f} |\n" for key, value in sorted(metrics.items()))
    table = f"\n## Metrics\n\n| metric | value |\n|---|---|\n{rows}" if rows else ""
    return f"""---
library_name: transformers
pipeline_tag: zero-shot-image-classification
tags: [clip, mm]
---

# {name}

A CLIP model trained with mm, recipe `{recipe}`: images of {config.image_size} pixels in patches of {config.patch_size}, captions of up
to {config.context_length} tokens, features of {config.embed_dim} dimensions. Fingerprint of its training data: `{data_fingerprint}`.
{table}
## Use

    from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel
    model = CLIPModel.from_pretrained(".")

or `mm serve .`, `mm eval .`. `mm.json` holds the SHA-256 of every file.
"""


def _digests(folder: Path, names: Sequence[str] | None = None) -> dict[str, str]:
    paths = [folder / n for n in names] if names is not None else sorted(p for p in folder.rglob("*") if p.is_file())
    result = {}
    for path in paths:
        if path.is_file():
            with path.open("rb") as file:
                result[path.relative_to(folder).as_posix()] = hashlib.file_digest(file, "sha256").hexdigest()
    return result


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=1), encoding="utf-8")
