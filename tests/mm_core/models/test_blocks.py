"""Compiled blocks compute what they did, compile once for all that are alike, and are left alone in evaluation.

Traced as torch.compile does it, but run without its code generator, which takes a minute here.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch._dynamo.utils import counters

from mm_core.models.blocks import as_written, compile_blocks
from mm_core.models.clip import ClipConfig
from mm_core.models.family import build_model
from mm_core.models.sizes import SpecialTokens, TowerConfig
from mm_core.models.two_tower import ImageTextBatch, TwoTower

CONFIG = ClipConfig(
    image_size=16,
    patch_size=8,
    context_length=6,
    vocab_size=20,
    embed_dim=8,
    vision=TowerConfig(width=16, layers=2, heads=2),
    text=TowerConfig(width=24, layers=2, heads=2),
)
pytestmark = pytest.mark.filterwarnings("ignore")  # torch's and torchao's, of what tracing imports


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def towers(*, compiled: bool, checkpointing: bool = False) -> TwoTower:
    torch.manual_seed(0)
    model = TwoTower(build_model(CONFIG, SpecialTokens(bos=3, eos=4, pad=0)))
    if compiled:
        compile_blocks(model.blocks(), backend="eager")
    if checkpointing:
        model.checkpoint_activations()
    return model


def gradients(model: TwoTower, samples: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(samples)
    images = torch.randint(0, 256, (samples, 1, 16, 16, 3), dtype=torch.uint8, generator=generator)
    input_ids = torch.randint(5, 20, (samples, 1, 6), generator=generator)
    output = model(ImageTextBatch(images, input_ids))
    model.zero_grad()
    (output.image_features[:, 0] @ output.text_features[:, 0].T * output.logit_scale).log_softmax(1).diagonal().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_gradients_stay_and_shapes_compile_once_a_tower() -> None:
    plain, compiled = towers(compiled=False), towers(compiled=True, checkpointing=True)
    for samples in (8, 7, 8, 5):
        expected, found = gradients(plain, samples), gradients(compiled, samples)
        assert found.keys() == expected.keys()
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6, msg=name)
    assert counters["stats"]["unique_graphs"] == 4  # two towers, each for one number of samples and then for any
    assert not counters["graph_break"]
    assert compiled.state_dict().keys() == plain.state_dict().keys()


def test_in_evaluation_nothing_is_compiled() -> None:
    compiled = towers(compiled=True)
    with as_written():
        gradients(compiled, 4)
    assert not counters["stats"]
