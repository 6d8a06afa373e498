"""What settings do to the cost of a step on GPUs that are not here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mm_core.config import resolve
from mm_core.errors import ConfigError
from mm_core.models.clip import clip_vit_b32
from mm_core.models.family import outline
from pipelines.recipes import recipe
from pipelines.train.scale import describe_scale


def described(*settings: str, gpus: int = 64, gpu_type: str = "a100-40", **more: Any) -> dict[str, Any]:
    return describe_scale(resolve(recipe("clip-vit-b32"), environment={}, overrides=settings)[0], gpus, gpu_type, **more)


def test_the_published_rate_is_an_mfu_of_a_tenth() -> None:
    """open_clip on LAION-400M, A100-40GB: about 790 samples/s and GPU."""
    assert described(mfu=0.115)["samples_per_s_per_gpu"] == pytest.approx(790, rel=0.05)


def test_sharding_divides_state_and_sends_more() -> None:
    whole, sharded = described(), described("parallel.kind=fsdp")
    assert sharded["memory_gb_optimizer"] == pytest.approx(whole["memory_gb_optimizer"] / 64, abs=0.01)
    assert sharded["memory_gb_activations"] == whole["memory_gb_activations"]
    assert sharded["sent_mb_weights_and_gradients"] == pytest.approx(1.5 * whole["sent_mb_weights_and_gradients"], rel=1e-3)


def test_muon_keeps_less_than_adamw() -> None:
    """Of the blocks' matrices, 12 w² a layer, one number of 4 bytes each in place of two."""
    adamw, muon = described(), described("optimizer.kind=muon")
    matrices = 12 * (12 * 768**2 + 12 * 512**2)
    assert adamw["memory_gb_optimizer"] - muon["memory_gb_optimizer"] == pytest.approx(4 * matrices / 1e9, abs=0.011)
    assert {k: v for k, v in adamw.items() if k.startswith("memory_gb_w")} == {k: v for k, v in muon.items() if k.startswith("memory_gb_w")}


def test_a_teacher_is_held_whole_and_goes_forward(tmp_path: Path) -> None:
    """One of the student's own sizes, of which config.json is enough."""
    outline(clip_vit_b32()).config.save_pretrained(tmp_path)
    distilled = described("objective.kind=distillation", f"objective.teacher={tmp_path}", "parallel.kind=fsdp")
    alone = described("parallel.kind=fsdp")
    assert distilled["memory_gb_teacher"] == described()["memory_gb_weights"]
    assert distilled["tflop_teacher"] == distilled["tflop_forward"] == alone["tflop_forward"]
    assert distilled["memory_gb"] > alone["memory_gb"]
    assert not {key for key in alone if "teacher" in key}


def test_a_locked_tower_has_weights_alone_and_a_mean_is_of_what_is_trained() -> None:
    whole, locked = described(), described("towers.frozen=vision", "init=a bundle", "ema_decay=0.999")
    trained = locked["memory_gb_gradients"]
    assert locked["memory_gb_weights"] == whole["memory_gb_weights"]
    assert trained < 0.45 * whole["memory_gb_gradients"]
    assert locked["memory_gb_optimizer"] == pytest.approx(2 * trained, abs=0.011)
    assert (whole["memory_gb_mean"], locked["memory_gb_mean"]) == (0, trained)
    assert locked["sent_mb_weights_and_gradients"] == pytest.approx(2 * 63 / 64 * 1e3 * trained, rel=0.03)
    assert locked["tflop_backward"] < 0.5 * whole["tflop_backward"]
    assert described("towers.patch_dropout=0.5")["tflop_forward"] < 0.8 * whole["tflop_forward"]


def test_pieces_take_less_memory_and_a_second_forward() -> None:
    whole, pieces = described(), described("parallel.micro_batch_size=64")
    assert pieces["memory_gb_activations"] == pytest.approx(whole["memory_gb_activations"] * 64 / 512, rel=0.01)
    assert pieces["tflop_forward"] == pytest.approx(2 * whole["tflop_forward"], rel=0.01)
    assert pieces["tflop_backward"] == whole["tflop_backward"]


def test_a_batch_that_fits_is_said_to() -> None:
    large = described("global_batch_size=131072")
    assert not large["fits"]
    assert 0 < large["max_micro_batch_size"] < large["samples_per_gpu"]
    less = described("global_batch_size=131072", f"parallel.micro_batch_size={large['max_micro_batch_size']}")
    assert less["fits"]


def test_a_gpu_nobody_knows_is_refused() -> None:
    with pytest.raises(ConfigError, match="'h10' is not known; did you mean 'h100'"):
        described(gpu_type="h10")
