"""What the matrix of test_gradients.py does not hold: random draws of the two passes, frozen towers, the number of pieces."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch

from mm_core.models.clip import clip_tiny
from mm_core.models.family import build_model
from mm_core.models.sizes import SpecialTokens
from mm_core.models.two_tower import ImageTextBatch, Tower, TwoTower, TwoTowerOutput
from mm_core.objectives.contrastive import ContrastiveObjective
from mm_core.objectives.output import LossOutput
from mm_core.training.gradient_cache import cached_backward, pieces_for


class Alone:
    """A model on one rank."""

    def __init__(self, module: TwoTower) -> None:
        self.module = module

    def __call__(self, batch: Any) -> Any:
        return self.module(batch)

    def gradients_stay_local(self, wanted: bool) -> nullcontext[None]:
        return nullcontext()

    def finish_gradients(self) -> None:
        pass


def model() -> TwoTower:
    torch.manual_seed(0)
    return TwoTower(build_model(clip_tiny(), SpecialTokens(bos=3, eos=4, pad=0))).double().train()


def batch(samples: int = 6) -> ImageTextBatch:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, 100, (samples, 1, 32), generator=generator)
    ids[..., -1] = 4
    return ImageTextBatch(torch.randint(0, 256, (samples, 1, 64, 64, 3), dtype=torch.uint8, generator=generator), ids)


def gradients(towers: TwoTower) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in towers.named_parameters() if p.grad is not None}


def cached(towers: TwoTower, data: ImageTextBatch, pieces: int) -> LossOutput:
    samples = len(data.images)
    return cached_backward(Alone(towers), data, lambda output: ContrastiveObjective()(output, data, [samples]), pieces, forward=nullcontext)


def test_the_second_pass_drops_what_the_first_did() -> None:
    """Beside one graph of all pieces, which needs no second pass."""
    data, ours, theirs = batch(), model(), model()
    for towers in (ours, theirs):
        towers.drop_patches(0.5)
    torch.manual_seed(3)
    loss = cached(ours, data, 3)
    torch.manual_seed(3)
    parts = [theirs(ImageTextBatch(*pair)) for pair in zip(data.images.split(2), data.input_ids.split(2), strict=True)]
    whole = TwoTowerOutput(torch.cat([p.image_features for p in parts]), torch.cat([p.text_features for p in parts]), theirs.logit_scale)
    expected = ContrastiveObjective()(whole, data, [6]).total
    expected.backward()
    torch.testing.assert_close(loss.total.detach(), expected.detach())
    found, wanted = gradients(ours), gradients(theirs)
    assert found.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("tower", list(Tower))
def test_a_frozen_tower_stays_out_of_it(tower: Tower) -> None:
    data, ours, theirs = batch(), model(), model()
    for towers in (ours, theirs):
        towers.freeze(tower)
    cached(ours, data, 2)
    ContrastiveObjective()(theirs(data), data, [6]).total.backward()
    found, wanted = gradients(ours), gradients(theirs)
    assert found.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("counts", "micro", "pieces"), [([8], 8, 1), ([8], 3, 3), ([9, 8], 4, 3), ([16, 1], 4, 1), ([4], 100, 1)])
def test_every_rank_takes_equally_many_pieces_and_none_is_empty(counts: list[int], micro: int, pieces: int) -> None:
    assert pieces_for(counts, micro) == pieces
