"""The factor of the logits, whatever a model learns of it."""

from __future__ import annotations

import math

import pytest
import torch

from mm_core.models.align import align_tiny
from mm_core.models.clip import clip_tiny
from mm_core.models.family import ModelConfig, build_model
from mm_core.models.logit_scale import clamp_logit_scale, scale_parameter
from mm_core.models.siglip import siglip_tiny
from mm_core.models.sizes import SpecialTokens
from mm_core.models.two_tower import TwoTower

CONFIGS = [clip_tiny(), siglip_tiny(), align_tiny()]


@pytest.mark.parametrize(("factor", "kept"), [(12.0, 12.0), (200.0, 100.0), (0.5, 1.0)])
@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.family)
def test_it_is_kept_between_1_and_100(config: ModelConfig, factor: float, kept: float) -> None:
    model = TwoTower(build_model(config, SpecialTokens(bos=3, eos=4, pad=0)))
    with torch.no_grad():
        scale_parameter(model).parameter.fill_(1 / factor if config.family == "align" else math.log(factor))
    assert model.logit_scale.item() == pytest.approx(factor, rel=1e-5)
    clamp_logit_scale(torch.nn.ModuleDict({"module": model}))
    assert model.logit_scale.item() == pytest.approx(kept, rel=1e-5)
