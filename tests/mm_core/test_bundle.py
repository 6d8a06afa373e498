"""A bundle loads in transformers as it loads here, and what is not the bundle that was written is refused."""

from __future__ import annotations

import io
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, BertConfig, CLIPImageProcessorPil, CLIPModel

from mm_core.bundle import MANIFEST, init_from, load_bundle, look_into, read_manifest, write_bundle
from mm_core.data.image import decode_centre
from mm_core.errors import BundleError
from mm_core.models.clip import ClipConfig, build_clip
from mm_core.models.sizes import TowerConfig
from mm_core.models.tokenizer import special_tokens, train_bpe
from mm_core.models.two_tower import normalise

CAPTIONS = ["a red circle above a blue square", "three green stars", "one small white ring"] * 3
TEXTS = ["a Red  circle", "three stars", "one " * 40]
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.25)


def tiny(vocab_size: int, **changes: Any) -> ClipConfig:
    tower = TowerConfig(width=32, layers=2, heads=2)
    config = ClipConfig(image_size=32, patch_size=16, context_length=12, vocab_size=vocab_size, embed_dim=16, vision=tower, text=tower)
    return config.model_copy(update={"image_mean": MEAN, "image_std": STD} | changes)


def write(folder: Path, **changes: Any) -> Path:
    torch.manual_seed(0)
    tokenizer = train_bpe(CAPTIONS, vocab_size=300, context_length=12)
    config = tiny(len(tokenizer), **changes)
    model = build_clip(config, special_tokens(tokenizer))
    metrics = {"top1": 0.5, "t2i_r5": 0.25}
    write_bundle(
        folder, model=model, tokenizer=tokenizer, config=config, recipe="clip-tiny", data_fingerprint="f0", metrics=metrics, run_id="r1"
    )
    return folder


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("bundles") / "tiny")


@pytest.fixture
def bundle(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "tiny"))


def photo(width: int, height: int) -> bytes:
    """A smooth picture with a sharp square in it."""
    y, x = np.mgrid[:height, :width]
    pixels = np.stack([x * 255 // width, y * 255 // height, (x + y) * 255 // (width + height)], axis=-1).astype(np.uint8)
    pixels[height // 3 : height // 2, width // 3 : width // 2] = (250, 30, 30)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=92)
    return buffer.getvalue()


def test_transformers_gives_the_same_features(written: Path) -> None:
    bundle = load_bundle(written)
    model = CLIPModel.from_pretrained(written).eval()
    images = np.stack([decode_centre(photo(*size), bundle.image_size) for size in ((64, 64), (90, 50), (41, 80))])
    tokens = AutoTokenizer.from_pretrained(written)(TEXTS, padding="max_length", truncation=True, return_tensors="pt")
    with torch.no_grad():
        pixels = normalise(torch.from_numpy(images), torch.tensor(MEAN), torch.tensor(STD))
        theirs = torch.nn.functional.normalize(model.get_image_features(pixel_values=pixels).pooler_output, dim=-1)
        words = torch.nn.functional.normalize(model.get_text_features(**tokens).pooler_output, dim=-1)
    np.testing.assert_allclose(bundle.image_features(images), theirs, atol=1e-5)
    np.testing.assert_allclose(bundle.text_features(TEXTS), words, atol=1e-5)
    assert bundle.logit_scale == pytest.approx(model.logit_scale.exp().item())


@pytest.mark.parametrize("size", [(64, 64), (300, 200), (120, 500)])
def test_transformers_own_preprocessing_sees_nearly_the_same(written: Path, size: tuple[int, int]) -> None:
    bundle = load_bundle(written)
    processor = CLIPImageProcessorPil.from_pretrained(written)
    with Image.open(io.BytesIO(photo(*size))) as picture:
        pixels = processor(picture, return_tensors="pt").pixel_values
    with torch.no_grad():
        theirs = torch.nn.functional.normalize(bundle.model.get_image_features(pixel_values=pixels).pooler_output, dim=-1)[0]
    ours = bundle.image_features(decode_centre(photo(*size), bundle.image_size)[None])[0]
    assert float(ours @ theirs.numpy()) > 0.99


def test_the_manifest_says_what_it_is(written: Path) -> None:
    bundle = load_bundle(written)
    manifest = bundle.manifest
    assert manifest is not None
    assert (bundle.name, bundle.image_size, bundle.embed_dim) == ("tiny", 32, 16)
    assert (manifest.recipe, manifest.data_fingerprint, manifest.run_id) == ("clip-tiny", "f0", "r1")
    assert manifest.metrics == {"top1": 0.5, "t2i_r5": 0.25}
    assert {"config.json", "model.safetensors", "tokenizer.json", "preprocessor_config.json", "README.md"} <= manifest.files.keys()
    card = (written / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert "| top1 | 0.5000 |" in card
    assert manifest.files["model.safetensors"] in card


def test_transformers_4_knows_the_tokenizers_class(written: Path) -> None:
    """It refuses the `TokenizersBackend` that transformers 5 writes."""
    assert json.loads((written / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_the_same_model_gives_the_same_bundle(written: Path, tmp_path: Path) -> None:
    assert read_manifest(write(tmp_path / "tiny")).files == read_manifest(written).files


def test_a_plain_transformers_folder_loads_too(bundle: Path) -> None:
    expected = load_bundle(bundle).text_features(TEXTS)
    (bundle / MANIFEST).unlink()
    plain = load_bundle(bundle)
    assert plain.manifest is None
    np.testing.assert_array_equal(plain.text_features(TEXTS), expected)
    np.testing.assert_allclose(plain.towers.mean.numpy(), MEAN, rtol=1e-6)


def test_nothing_is_left_of_a_bundle_that_could_not_be_written(written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BundleError, match="exists; a bundle is never changed"):
        write(written)
    loaded = load_bundle(written)
    facts = {"model": loaded.model, "tokenizer": loaded.tokenizer, "config": tiny(300), "recipe": "r", "data_fingerprint": "f"}
    with pytest.raises(BundleError, match=r"leave out or mend \{'top1': nan\}"):
        write_bundle(tmp_path / "b", **facts, metrics={"top1": float("nan")})
    monkeypatch.setattr(loaded.tokenizer, "save_pretrained", lambda folder: (folder / "absent" / "tokenizer.json").touch())
    with pytest.raises(FileNotFoundError):
        write_bundle(tmp_path / "b", **facts, metrics={})
    assert not list(tmp_path.iterdir())


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def rewrite(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda b: flip_a_bit(b / "model.safetensors"), r"model\.safetensors is not the file that was written"),
        (lambda b: (b / "tokenizer.json").unlink(), r"lacks tokenizer\.json: copy it again"),
        (lambda b: (b / "added_tokens.json").write_text("{}"), r"added_tokens\.json is not part of the bundle.*remove it"),
        (lambda b: rewrite(b / MANIFEST, lambda v: v.update(format=7)), "another format than 1"),
        (lambda b: rewrite(b / MANIFEST, lambda v: v.update(task="vqa")), "not valid at task: .*got 'vqa'"),
        (lambda b: (b / MANIFEST).write_text("{"), r"is no bundle: mm\.json cannot be read"),
    ],
    ids=["weights", "missing", "added", "format", "task", "manifest"],
)
def test_a_damaged_bundle_is_refused(bundle: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(bundle)
    with pytest.raises(BundleError, match=message):
        load_bundle(bundle)


def test_hidden_files_are_no_damage(bundle: Path) -> None:
    (bundle / ".cache").mkdir()
    (bundle / ".cache" / "lock").touch()
    load_bundle(bundle)


def drop_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["visual_projection.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (drop_tensor, r"lacks 1 of the model's tensors, visual_projection\.weight first"),
        (lambda b: (b / "model.safetensors").write_bytes(b"\0" * 64), "no model that can be loaded at"),
        (lambda b: (b / "model.safetensors").unlink(), "no model that can be loaded at"),
        (
            lambda b: BertConfig().save_pretrained(b),
            "is a bert model; this command takes clip, siglip, align, vision-text-dual-encoder, flava models",
        ),
        (lambda b: (b / "tokenizer.json").write_text("{}"), "cannot be used: no tokenizer at"),
        (lambda b: rewrite(b / "config.json", lambda v: v["text_config"].update(eos_token_id=3)), "pools at token 3, .* with 4"),
        (lambda b: rewrite(b / "config.json", lambda v: v["text_config"].update(hidden_size=48)), "no model that can be loaded at"),
    ],
    ids=["tensor", "not safetensors", "no weights", "kind", "tokenizer", "pooling", "shapes"],
)
def test_a_plain_folder_that_would_give_wrong_features_is_refused(bundle: Path, damage: Callable[[Path], None], message: str) -> None:
    (bundle / MANIFEST).unlink()
    damage(bundle)
    with pytest.raises(BundleError, match=message):
        load_bundle(bundle)


def test_the_task_of_a_plain_folder_is_told_without_its_weights(bundle: Path) -> None:
    (bundle / MANIFEST).unlink()
    (bundle / "model.safetensors").unlink()
    assert look_into(bundle) == "contrastive"
    BertConfig().save_pretrained(bundle)
    with pytest.raises(BundleError, match="is a bert model"):
        look_into(bundle)


def test_a_model_that_brings_code_or_a_pickle_runs_neither(bundle: Path, tmp_path: Path) -> None:
    done = tmp_path / "done"
    (bundle / MANIFEST).unlink()
    code = f"open({str(done)!r}, 'w')\nfrom transformers import CLIPConfig, CLIPModel, CLIPTokenizerFast\n"
    for module in ("modeling_own", "configuration_own", "tokenization_own"):
        (bundle / f"{module}.py").write_text(code)
    own = {"AutoModel": "modeling_own.CLIPModel", "AutoConfig": "configuration_own.CLIPConfig"}
    rewrite(bundle / "config.json", lambda v: v.update(auto_map=own))
    rewrite(bundle / "tokenizer_config.json", lambda v: v.update(auto_map={"AutoTokenizer": [None, "tokenization_own.CLIPTokenizerFast"]}))
    load_bundle(bundle)
    (bundle / "model.safetensors").rename(bundle / "pytorch_model.bin")
    (bundle / "pytorch_model.bin").write_bytes(pickle.dumps(Opens(done)))
    with pytest.raises(BundleError, match="no model that can be loaded at"):
        load_bundle(bundle)
    assert not done.exists()


class Opens:
    """Unpickled, it makes a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.file), "w")


def test_no_model_there(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="give a bundle's folder, models:/NAME@ALIAS, or a hub id"):
        load_bundle(tmp_path / "nothing")


def test_training_starts_from_a_bundles_weights(written: Path) -> None:
    start = load_bundle(written)
    model = build_clip(tiny(start.model.config.text_config.vocab_size), special_tokens(start.tokenizer))
    init_from(model, str(written), tokenizer=start.tokenizer)
    for name, tensor in start.model.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"embed_dim": 24}, "embed_dim is 16 there, 24 here"),
        ({"hidden_act": "gelu"}, r"text_config\.hidden_act is quick_gelu there, gelu here"),
        ({"vision": TowerConfig(width=32, layers=1, heads=2)}, r"vision_config\.num_hidden_layers is 2 there, 1 here"),
        ({"vision": TowerConfig(width=32, layers=2, heads=4)}, r"vision_config\.num_attention_heads is 2 there, 4 here"),
    ],
    ids=["size", "activation", "layers", "heads"],
)
def test_training_does_not_start_from_another_architecture(written: Path, changes: dict[str, Any], message: str) -> None:
    start = load_bundle(written)
    model = build_clip(tiny(start.model.config.text_config.vocab_size, **changes), special_tokens(start.tokenizer))
    with pytest.raises(BundleError, match=message):
        init_from(model, str(written), tokenizer=start.tokenizer)


def test_training_does_not_start_with_another_tokenizer(written: Path) -> None:
    start = load_bundle(written)
    other = train_bpe(["quite different words here", "quite different words there"] * 9, vocab_size=300, context_length=12)
    model = build_clip(tiny(start.model.config.text_config.vocab_size), special_tokens(other))
    with pytest.raises(BundleError, match=r"another tokenizer.*--set tokenizer\.source="):
        init_from(model, str(written), tokenizer=other)
