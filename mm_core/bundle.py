"""A bundle: a trained model as a folder that serving, evaluation and the registry read, and that knows nothing of training.

transformers' own layout (config.json, model.safetensors, tokenizer, preprocessor_config.json), plus `mm.json` (task, recipe, data
fingerprint, metrics, SHA-256 of every file) and a model card. Loaded from safetensors after the digests are checked; no pickle,
no remote code. A plain folder or hub id of such a model loads too, without digests to check.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float32, UInt8
from pydantic import Field, ValidationError
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from mm_core.config import Config
from mm_core.errors import BundleError, ConfigError
from mm_core.model_card import model_card
from mm_core.models.dvae import DvaeConfig
from mm_core.models.family import AnyModelConfig, ModelConfig
from mm_core.models.flava import FlavaConfig
from mm_core.models.fused import Fused
from mm_core.models.fused_classifier import CLASSIFIER, ClassHead, FusedClassifier, load_class_head
from mm_core.models.hallucination import load_hallucination
from mm_core.models.pretrained import (
    architecture,
    check_pooling,
    fed_context_length,
    fed_image_size,
    fused_width,
    is_fused,
    joint_width,
    load_normalisation,
    load_two_tower,
    read_config,
)
from mm_core.models.quiet import quiet
from mm_core.models.tokenizer import caption_tokenizer, load_tokenizer
from mm_core.models.two_tower import TwoTower
from mm_core.models.warm_start import InitMatch, WarmStart, take_over

FORMAT = 1
MANIFEST = "mm.json"
_CARD = "README.md"
_WEIGHTS = "model.safetensors"
Task = Literal["contrastive", "multitask", "codebook", "classify"]


class BundleManifest(Config):
    """mm.json."""

    format: int = FORMAT
    task: Task = "contrastive"
    recipe: str
    data_fingerprint: str
    run_id: str | None = None
    metrics: dict[str, float] = Field(default_factory=dict)
    model: AnyModelConfig
    files: dict[str, str]
    """SHA-256 of every other file of the bundle, by name."""


@dataclass
class Bundle:
    """A loaded model with its tokenizer and preprocessing."""

    name: str
    manifest: BundleManifest | None
    """None for a model that mm did not write."""
    towers: TwoTower | Fused
    tokenizer: PreTrainedTokenizerFast
    image_size: int
    context_length: int
    device: torch.device

    def __post_init__(self) -> None:
        self.tokenise = caption_tokenizer(self.tokenizer, self.context_length)

    @property
    def model(self) -> PreTrainedModel:
        return self.towers.model

    @property
    def task(self) -> Task:
        return self.manifest.task if self.manifest else _plain_task(self.model.config)

    @property
    def embed_dim(self) -> int:
        return joint_width(self.model)

    @property
    def fused_dim(self) -> int | None:
        """Of `multimodal_features`; None without a fusion."""
        return fused_width(self.model.config)

    @property
    def logit_scale(self) -> float:
        return float(self.towers.logit_scale.detach())

    @torch.inference_mode()
    def image_features(self, images: UInt8[np.ndarray, "b h w 3"]) -> Float32[np.ndarray, "b d"]:
        """L2-normalised. `images` come from `decode_centre(…, bundle.image_size)`."""
        pixels = torch.from_numpy(np.array(images)).to(self.device)
        return self.towers.image_features(pixels).cpu().numpy()

    @torch.inference_mode()
    def text_features(self, texts: Sequence[str]) -> Float32[np.ndarray, "b d"]:
        """L2-normalised."""
        input_ids = torch.from_numpy(self.tokenise(texts)).to(self.device).long()
        return self.towers.text_features(input_ids).cpu().numpy()

    @property
    def is_multimodal(self) -> bool:
        """Whether it has a fusion, so that `multimodal_features` and `match` can be asked."""
        return isinstance(self.towers, Fused)

    @torch.inference_mode()
    def multimodal_features(self, images: UInt8[np.ndarray, "b h w 3"] | None, texts: Sequence[str] | None) -> Float32[np.ndarray, "b e"]:
        """Of pairs, or of images or texts alone; L2-normalised. Not in the space of `image_features` and `text_features`.

        Raises:
            BundleError: the model has no fusion.
        """
        return self._fused().multimodal_features(self._pixels(images), self._ids(texts)).float().cpu().numpy()

    @torch.inference_mode()
    def match(self, images: UInt8[np.ndarray, "b h w 3"], texts: Sequence[str]) -> Float32[np.ndarray, " b"]:
        """The probability that each image and text belong together, by the fusion.

        Raises:
            BundleError: the model has no fusion, or was fine-tuned to classify.
        """
        self.check_pretrained()
        pixels, ids = self._pixels(images), self._ids(texts)
        assert pixels is not None, "a pair has both"
        assert ids is not None, "a pair has both"
        return self._fused().match(pixels, ids).cpu().numpy()

    @torch.inference_mode()
    def classify(self, images: UInt8[np.ndarray, "b h w 3"] | None, texts: Sequence[str] | None) -> Float32[np.ndarray, "b c"]:
        """The probability of each class, of pairs or, by a model of both sides, of images or texts alone.

        Raises:
            BundleError: the model was not fine-tuned to classify, or not on what it is given.
        """
        head, given = self.class_head, {"image": images, "text": texts}
        if unknown := {name for name, side in given.items() if side is not None} - head.sides.modalities:
            raise BundleError(f"{self.name} classifies by its {head.sides} alone: give no {unknown.pop()}s")
        return self._classifier().class_logits(self._pixels(images), self._ids(texts)).float().softmax(dim=1).cpu().numpy()

    def check_pretrained(self) -> None:
        """
        Raises:
            BundleError: the model was fine-tuned to classify, over heads that stayed as they were.
        """
        if isinstance(self.towers, FusedClassifier):
            raise BundleError(f"{self.name} was fine-tuned to classify, and answers nothing else: take the model that it began as")

    @property
    def class_head(self) -> ClassHead:
        """How many classes there are, and what of a sample it is trained on.

        Raises:
            BundleError: the model was not fine-tuned to classify.
        """
        return self._classifier().head

    def _classifier(self) -> FusedClassifier:
        if not isinstance(self.towers, FusedClassifier):
            raise BundleError(f"{self.name} has no classes: fine-tune a flava model with `mm train flava-tiny-classify --init`")
        return self.towers

    def _fused(self) -> Fused:
        if not isinstance(self.towers, Fused):
            raise BundleError(f"{self.name} is two towers, without a fusion over both: this needs a flava model")
        return self.towers

    def _pixels(self, images: UInt8[np.ndarray, "b h w 3"] | None) -> torch.Tensor | None:
        return None if images is None else torch.from_numpy(np.array(images)).to(self.device)

    def _ids(self, texts: Sequence[str] | None) -> torch.Tensor | None:
        return None if texts is None else torch.from_numpy(self.tokenise(texts)).to(self.device).long()


def write_bundle(
    folder: Path,
    *,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast | None,
    config: AnyModelConfig,
    recipe: str,
    data_fingerprint: str,
    metrics: Mapping[str, float],
    run_id: str | None = None,
    beside: Mapping[str, nn.Module] | None = None,
) -> BundleManifest:
    """Write a bundle, whole or not at all.

    Args:
        tokenizer: None of a model that reads no text.
        beside: what transformers' class does not have, each a file of the name: a codebook's decoder, a head.

    Raises:
        BundleError: `folder` exists, or a metric is not a number.
    """
    if folder.exists():
        raise BundleError(f"{folder} exists; a bundle is never changed: give another folder, or remove it first")
    if not_finite := {name: value for name, value in metrics.items() if not math.isfinite(value)}:
        raise BundleError(f"metrics of a bundle are numbers; leave out or mend {not_finite}")
    temporary = folder.with_name(f".{folder.name}-{uuid.uuid4().hex}")
    temporary.mkdir(parents=True)
    try:
        with quiet():
            model.save_pretrained(temporary)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
            _make_portable(temporary / "tokenizer_config.json")
        for file, module in (beside or {}).items():
            save_file({name: tensor.contiguous() for name, tensor in module.state_dict().items()}, temporary / file)
        if not isinstance(config, DvaeConfig):
            _write_json(temporary / "preprocessor_config.json", _preprocessor(config))
        head = (beside or {}).get(CLASSIFIER)
        assert head is None or isinstance(head, ClassHead), "the file is of such a head"
        task = _task(config) if head is None else "classify"
        facts: dict[str, Any] = {"task": task, "recipe": recipe, "data_fingerprint": data_fingerprint, "run_id": run_id}
        facts |= {"metrics": dict(metrics), "model": config}
        weights = _digests(temporary).get(_WEIGHTS)
        card = model_card(folder.name, config, recipe, data_fingerprint, metrics, weights, head)
        (temporary / _CARD).write_text(card, encoding="utf-8")
        manifest = BundleManifest.model_validate(facts | {"files": _digests(temporary)})
        (temporary / MANIFEST).write_text(manifest.model_dump_json(indent=1), encoding="utf-8")
        os.replace(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return manifest


def _task(config: AnyModelConfig) -> Task:
    match config:
        case FlavaConfig():
            return "multitask"
        case DvaeConfig():
            return "codebook"
        case _:
            return "contrastive"


def _plain_task(config: PreTrainedConfig) -> Task:
    """Of a model that mm did not write."""
    return "multitask" if is_fused(config) else "contrastive"


def read_manifest(folder: Path, *, verify: bool = True) -> BundleManifest:
    """The manifest of a bundle, its files' digests checked.

    Raises:
        BundleError: no bundle, one of another format, or a file that is missing, added or not what was written.
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
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise BundleError(f"{folder / MANIFEST} is not valid at {where}: {first['msg']}, got {first['input']!r}") from None
    if verify:
        _verify(folder, manifest.files)
    return manifest


def _verify(folder: Path, expected: Mapping[str, str]) -> None:
    found = _digests(folder)
    for name, digest in expected.items():
        if name not in found:
            raise BundleError(f"the bundle {folder} lacks {name}: copy it again from where it came")
        if found[name] != digest:
            raise BundleError(f"{folder / name} is not the file that was written (SHA-256 differs): copy the bundle again")
    if added := sorted(set(found) - set(expected)):
        raise BundleError(f"{folder / added[0]} is not part of the bundle, and could change how it loads: remove it")


def load_bundle(source: str | Path, *, verify: bool = True, device: str | torch.device = "cpu") -> Bundle:
    """Load a bundle, a plain transformers folder of a two-tower model, or a hub id.

    Raises:
        BundleError: there is no such model, it is damaged, or it is of another kind.
    """
    folder, manifest = Path(source), _manifest_of(source, verify)
    written = None if manifest is None else manifest.model
    if isinstance(written, DvaeConfig):
        raise BundleError(f"{source} is a codebook, which has no towers: it serves a flava recipe as model.codebook_source")
    model = load_two_tower(str(source))
    mean, std = (written.image_mean, written.image_std) if written else load_normalisation(str(source))
    towers: TwoTower | Fused
    if is_fused(model.config):
        head = load_class_head(model.config, folder)
        if head is None:
            towers = Fused(model, mean=mean, std=std, hallucination=load_hallucination(model.config, folder))
        else:
            towers = FusedClassifier(model, head, mean=mean, std=std)
    else:
        towers = TwoTower(model, mean=mean, std=std)
    towers = towers.to(device).eval()
    towers.attend("sdpa")
    image_size = written.image_size if written else fed_image_size(model, str(source))
    try:
        tokenizer = load_tokenizer(str(source))
        check_pooling(model, tokenizer)
        context_length = written.context_length if written else fed_context_length(model, tokenizer)
        return Bundle(folder.resolve().name, manifest, towers, tokenizer, image_size, context_length, torch.device(device))
    except ConfigError as error:
        raise BundleError(f"the model {source} cannot be used: {error}") from None


def look_into(source: str | Path) -> str:
    """The task of a model, its files' digests checked and no weights loaded.

    Raises:
        BundleError: there is no such model, it is damaged, or of another kind.
    """
    manifest = _manifest_of(source, verify=True)
    return manifest.task if manifest else _plain_task(read_config(str(source)))


def _manifest_of(source: str | Path, verify: bool) -> BundleManifest | None:
    """None of a plain transformers folder or what may be a hub id."""
    folder = Path(source)
    if (folder / MANIFEST).is_file():
        return read_manifest(folder, verify=verify)
    if not folder.is_dir() and not _may_be_hub_id(source):
        raise BundleError(
            f"no bundle at {source}: give a bundle's folder, models:/NAME@ALIAS, or a hub id like openai/clip-vit-base-patch32"
        )
    return None


def _may_be_hub_id(source: str | Path) -> bool:
    """`OWNER/NAME`, and no folder OWNER is here, in which NAME would be meant."""
    owner, slash, name = str(source).partition("/")
    return bool(slash and owner and name) and "/" not in name and not owner.startswith((".", "~")) and not Path(owner).is_dir()


def init_from(
    model: PreTrainedModel, source: str, *, tokenizer: PreTrainedTokenizerFast | None = None, match: InitMatch = InitMatch.EXACT
) -> WarmStart:
    """Start `model` from the weights of a bundle, folder or hub id. `tokenizer`: what feeds `model`; None leaves it unchecked.

    Raises:
        BundleError: no such model, or, where it has to match exactly, one of another architecture or vocabulary; the message names the
            first difference.
    """
    start = load_bundle(source)
    if match is InitMatch.PARTIAL:
        return take_over(model, start.model.state_dict())
    theirs, ours = architecture(start.model), architecture(model)
    for key in ours:
        if theirs.get(key) != ours[key]:
            raise BundleError(
                f"{source} does not fit the recipe's model: {key} is {theirs.get(key)} there, {ours[key]} here;"
                f" choose the recipe it was trained with, and its tokenizer with --set tokenizer.source={source}, or take what fits with"
                " --set init_match=partial"
            )
    if tokenizer is not None and start.tokenizer.get_vocab() != tokenizer.get_vocab():
        raise BundleError(
            f"{source} was trained with another tokenizer, to which its token ids belong: --set tokenizer.source={source} takes its own"
        )
    return take_over(model, start.model.state_dict())


def load_teacher(source: str, student: AnyModelConfig, tokenizer: PreTrainedTokenizerFast) -> TwoTower:
    """The model a distillation learns from: it is shown what the student is shown.

    Raises:
        BundleError: no such model, or one that takes other images or token ids than the student.
    """
    teacher = load_bundle(source)
    if not isinstance(teacher.towers, TwoTower) or isinstance(student, DvaeConfig):
        raise BundleError(f"a distillation is from two towers to two towers, and {source} or the model is none")
    if teacher.image_size != student.image_size:
        raise BundleError(
            f"the teacher {source} takes images of {teacher.image_size} pixels, the model {student.image_size}:"
            f" --set model.image_size={teacher.image_size}, or take another teacher"
        )
    if teacher.context_length < student.context_length:
        raise BundleError(
            f"the teacher {source} takes {teacher.context_length} tokens, the model {student.context_length}:"
            f" --set model.context_length={teacher.context_length}"
        )
    if teacher.tokenizer.get_vocab() != tokenizer.get_vocab():
        raise BundleError(f"the teacher {source} has another tokenizer than the model: --set tokenizer.source={source} takes its own")
    return teacher.towers


def _preprocessor(config: ModelConfig) -> dict[str, Any]:
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


def _digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file by its name in the folder; not of the manifest, nor of what is hidden (file managers' and the hub's)."""
    result = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if path.is_file() and name.as_posix() != MANIFEST and not any(part.startswith(".") for part in name.parts):
            with path.open("rb") as file:
                result[name.as_posix()] = hashlib.file_digest(file, "sha256").hexdigest()
    return result


def _make_portable(tokenizer_config: Path) -> None:
    """transformers 5 writes a class name that 4 does not know; the name that 4 writes is known to both."""
    text = tokenizer_config.read_text(encoding="utf-8")
    tokenizer_config.write_text(text.replace('"TokenizersBackend"', '"PreTrainedTokenizerFast"'), encoding="utf-8")


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=1), encoding="utf-8")
