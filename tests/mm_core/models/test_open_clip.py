"""Weights by open_clip's names give the features of open_clip's forward pass, written out here with torch's own attention."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from mm_core.bundle import load_bundle
from mm_core.errors import BundleError
from mm_core.models.open_clip import import_open_clip
from mm_core.models.tokenizer import train_bpe

WIDTH, LAYERS, EMBED, SIZE, PATCH, CONTEXT = 128, 2, 32, 32, 8, 12
TEXTS = ["a red circle", "a blue square above a red circle"]
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.25)
CONFIG = {
    "model_cfg": {"quick_gelu": True, "vision_cfg": {"head_width": 32}, "text_cfg": {"heads": 2}},
    "preprocess_cfg": {"mean": MEAN, "std": STD},
}


class Block(nn.Module):
    """A ResidualAttentionBlock; quick_gelu, as CONFIG says."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attn = nn.MultiheadAttention(WIDTH, heads, batch_first=True)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(WIDTH, 4 * WIDTH), "c_proj": nn.Linear(4 * WIDTH, WIDTH)})

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=mask)[0]
        hidden = self.mlp["c_fc"](self.ln_2(x))
        return x + self.mlp["c_proj"](hidden * torch.sigmoid(1.702 * hidden))


class Reference(nn.Module):
    """open_clip's CLIP, with its names."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        visual = nn.Module()
        visual.conv1 = nn.Conv2d(3, WIDTH, PATCH, PATCH, bias=False)
        visual.class_embedding = nn.Parameter(torch.randn(WIDTH))
        visual.positional_embedding = nn.Parameter(torch.randn((SIZE // PATCH) ** 2 + 1, WIDTH))
        visual.ln_pre, visual.ln_post = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        visual.transformer = nn.Module()
        visual.transformer.resblocks = nn.ModuleList([Block(heads=4) for _ in range(LAYERS)])
        visual.proj = nn.Parameter(torch.randn(WIDTH, EMBED))
        self.visual = visual
        self.token_embedding = nn.Embedding(vocab_size, WIDTH)
        self.positional_embedding = nn.Parameter(torch.randn(CONTEXT, WIDTH))
        self.transformer = nn.Module()
        self.transformer.resblocks = nn.ModuleList([Block(heads=2) for _ in range(LAYERS + 1)])
        self.ln_final = nn.LayerNorm(WIDTH)
        self.text_projection = nn.Parameter(torch.randn(WIDTH, EMBED))
        self.logit_scale = nn.Parameter(torch.tensor(3.0))

    def image(self, pixels: Tensor) -> Tensor:
        x = self.visual.conv1(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.visual.class_embedding.expand(len(x), 1, -1), x], dim=1) + self.visual.positional_embedding
        x = self.visual.ln_pre(x)
        for block in self.visual.transformer.resblocks:
            x = block(x, None)
        return nn.functional.normalize(self.visual.ln_post(x[:, 0]) @ self.visual.proj, dim=-1)

    def text(self, ids: Tensor, eos: int) -> Tensor:
        x = self.token_embedding(ids) + self.positional_embedding
        mask = torch.full((CONTEXT, CONTEXT), -torch.inf).triu(1)
        for block in self.transformer.resblocks:
            x = block(x, mask)
        pooled = self.ln_final(x)[torch.arange(len(x)), (ids == eos).int().argmax(1)]
        return nn.functional.normalize(pooled @ self.text_projection, dim=-1)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_bpe(TEXTS * 10, vocab_size=300, context_length=CONTEXT)


@pytest.fixture(scope="module")
def reference(tokenizer: PreTrainedTokenizerFast) -> Reference:
    torch.manual_seed(0)
    return Reference(len(tokenizer)).eval()


def save(reference: Reference, folder: Path, *, prefix: str = "") -> Path:
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(json.dumps(CONFIG))
    weights = {name: p.detach().clone() for name, p in reference.named_parameters()}
    if prefix:  # CustomTextCLIP
        weights = {name if name.startswith(("visual.", "logit_scale")) else prefix + name: p for name, p in weights.items()}
    save_file(weights | {"attn_mask": torch.zeros(2, 2)}, folder / "open_clip_model.safetensors")
    return folder / "open_clip_model.safetensors"


@pytest.mark.parametrize("prefix", ["", "text."], ids=["CLIP", "CustomTextCLIP"])
def test_features_are_those_of_open_clips_forward(
    reference: Reference, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, prefix: str
) -> None:
    import_open_clip(save(reference, tmp_path / "from", prefix=prefix), tmp_path / "to", tokenizer)
    bundle = load_bundle(tmp_path / "to")
    images = np.random.default_rng(0).integers(0, 256, (3, SIZE, SIZE, 3), dtype=np.uint8)
    pixels = (torch.from_numpy(images).float().div(255) - torch.tensor(MEAN)) / torch.tensor(STD)
    ids = tokenizer(TEXTS, padding="max_length", max_length=CONTEXT, return_tensors="pt").input_ids
    with torch.no_grad():
        np.testing.assert_allclose(bundle.image_features(images), reference.image(pixels.permute(0, 3, 1, 2)), atol=1e-5)
        np.testing.assert_allclose(bundle.text_features(TEXTS), reference.text(ids, tokenizer.eos_token_id), atol=1e-5)
    assert bundle.logit_scale == pytest.approx(np.exp(3.0))


def test_what_is_no_vit_clip_is_refused(reference: Reference, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    file = save(reference, tmp_path / "from")
    with pytest.raises(BundleError, match=r"no \.safetensors file; a pickle can run code"):
        import_open_clip(tmp_path / "model.bin", tmp_path / "to", tokenizer)
    others = train_bpe(["other words, more of them " * 20, *"abcdefghijkl"] * 9, vocab_size=301, context_length=CONTEXT)
    with pytest.raises(BundleError, match=r"284 tokens, the tokenizer \d+: give the one it was trained with"):
        import_open_clip(file, tmp_path / "to", others)
    weights = {name: p.detach() for name, p in reference.named_parameters()}
    save_file(weights | {"visual.attnpool.k_proj.weight": torch.zeros(1)}, file)
    with pytest.raises(BundleError, match=r"has a tensor 'visual\.attnpool\.k_proj\.weight' that no ViT CLIP has"):
        import_open_clip(file, tmp_path / "to", tokenizer)
    save_file({"visual.trunk.patch_embed": torch.zeros(1)}, file)
    with pytest.raises(BundleError, match="only ViT CLIP models of open_clip can be imported"):
        import_open_clip(file, tmp_path / "to", tokenizer)
    file.with_name("open_clip_config.json").unlink()
    with pytest.raises(BundleError, match="nothing tells the activation"):
        import_open_clip(file, tmp_path / "to", tokenizer)
    assert not (tmp_path / "to").exists()
