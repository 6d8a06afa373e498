"""A bundle in a store that is not a folder here: fetched once, checked, found in a run's folder too."""

from __future__ import annotations

from pathlib import Path

import fsspec
import pytest

from mm_core.bundle import load_bundle, write_bundle
from mm_core.bundle_cache import bundle_at
from mm_core.errors import BundleError
from mm_core.models.clip import build_clip, clip_tiny
from mm_core.models.tokenizer import special_tokens, train_bpe


@pytest.fixture
def run(tmp_path: Path) -> str:
    """The URL of a run's folder that holds a bundle."""
    tokenizer = train_bpe(["a red circle"] * 5, vocab_size=320, context_length=32)
    config = clip_tiny().model_copy(update={"vocab_size": len(tokenizer)})
    model = build_clip(config, special_tokens(tokenizer))
    write_bundle(tmp_path / "bundle", model=model, tokenizer=tokenizer, config=config, recipe="r", data_fingerprint="d", metrics={})
    fs = fsspec.filesystem("memory")
    fs.put(f"{tmp_path}/bundle/", "/runs/first/bundle/", recursive=True)
    return "memory://runs/first"


def test_it_is_fetched_once_and_checked(run: str) -> None:
    folder = bundle_at(f"{run}/bundle")
    assert load_bundle(folder).manifest is not None
    fs = fsspec.filesystem("memory")
    fs.rm("/runs/first/bundle/model.safetensors")
    assert bundle_at(run) == folder  # what is here is whole
    (folder / "model.safetensors").unlink()
    with pytest.raises(BundleError, match=r"lacks model\.safetensors"):
        bundle_at(run)


def test_where_there_is_none_it_says_so() -> None:
    with pytest.raises(BundleError, match="memory://nowhere is neither a bundle nor the folder of a finished run"):
        bundle_at("memory://nowhere")
    with pytest.raises(BundleError, match="cannot read the bundle at no-such-store://x"):
        bundle_at("no-such-store://x")
