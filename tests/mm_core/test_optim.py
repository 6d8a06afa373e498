from __future__ import annotations

import math

import pytest
import torch
from pydantic import ValidationError

from mm_core.models.clip import ClipConfig, build_clip
from mm_core.models.sizes import SpecialTokens, TowerConfig
from mm_core.models.two_tower import TwoTower
from mm_core.optim import OptimizerConfig, OptimizerKind, build_optimizer, lay_out_state

TOWER = TowerConfig(width=16, layers=1, heads=2)
CONFIG = ClipConfig(image_size=16, patch_size=8, context_length=6, vocab_size=20, embed_dim=8, vision=TOWER, text=TOWER)


@pytest.fixture
def model() -> TwoTower:
    return TwoTower(build_clip(CONFIG, SpecialTokens(bos=3, eos=4, pad=0)))


def test_gains_biases_and_the_temperature_do_not_decay(model: TwoTower) -> None:
    decays, others, scalars = build_optimizer(model, OptimizerConfig(lr=1e-3, weight_decay=0.2)).param_groups
    names = {id(p): name for name, p in model.named_parameters()}
    assert (decays["weight_decay"], others["weight_decay"], scalars["weight_decay"]) == (0.2, 0.0, 0.0)
    assert [names[id(p)] for p in scalars["params"]] == ["model.logit_scale"]
    spared = {names[id(p)] for group in (others, scalars) for p in group["params"]}
    assert len(decays["params"]) + len(spared) == len(names)
    assert all(("norm" in name) <= (name in spared) and ("bias" in name) <= (name in spared) for name in names.values())
    assert all("proj" in name or "fc" in name or "embedding" in name for name in set(names.values()) - spared)


def test_frozen_parameters_are_left_out(model: TwoTower) -> None:
    model.model.vision_model.requires_grad_(False)
    groups = build_optimizer(model, OptimizerConfig(lr=1e-3)).param_groups
    assert sum(len(group["params"]) for group in groups) == sum(p.requires_grad for p in model.parameters())


def test_an_infinite_bound_is_refused() -> None:
    """It could not be written to a checkpoint's JSON."""
    with pytest.raises(ValidationError, match="finite"):
        OptimizerConfig(lr=1e-3, grad_clip_norm=math.inf)


@pytest.mark.parametrize("kind", list(OptimizerKind))
def test_state_that_is_laid_out_at_once_changes_no_step(kind: OptimizerKind) -> None:
    """Of a parameter that gets its first gradient later than others too."""
    weights = []
    for laid_out in (False, True):
        torch.manual_seed(0)
        model = torch.nn.ModuleList([torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)])
        optimizer = build_optimizer(model, OptimizerConfig(kind=kind, lr=0.1), blocks=[model[0]])
        if laid_out:
            before = [p.clone() for p in model.parameters()]
            lay_out_state(optimizer)
            assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
            assert all(optimizer.state[p] for p in model.parameters())
        for used in (0, 0, 1, 0):
            optimizer.zero_grad(set_to_none=True)
            model[used](torch.ones(2, 4)).square().sum().backward()
            optimizer.step()
        weights.append([p.detach() for p in model.parameters()])
    for plain, made in zip(*weights, strict=True):
        torch.testing.assert_close(made, plain, rtol=0, atol=0)
