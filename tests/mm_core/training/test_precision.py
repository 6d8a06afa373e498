"""What is refused where the hardware or a package is missing; and fewer digits, as far as a processor can show them."""

from __future__ import annotations

import pytest
import torch

from mm_core.errors import ConfigError
from mm_core.models.clip import ClipConfig
from mm_core.models.family import build_model
from mm_core.models.sizes import SpecialTokens, TowerConfig
from mm_core.models.two_tower import ImageTextBatch, TwoTower
from mm_core.training import precision as module
from mm_core.training.precision import Precision, autocast, check_fp8_installed, convert_to_fp8, prepare_blocks

TOWER = TowerConfig(width=32, layers=2, heads=2)
CONFIG = ClipConfig(image_size=16, patch_size=8, context_length=6, vocab_size=20, embed_dim=16, vision=TOWER, text=TOWER)
CPU = torch.device("cpu")


def towers() -> TwoTower:
    torch.manual_seed(0)
    return TwoTower(build_model(CONFIG, SpecialTokens(bos=3, eos=4, pad=0)))


def gradient(model: TwoTower, precision: Precision = Precision.FP32) -> torch.Tensor:
    """All of it, in one vector."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (7, 1, 16, 16, 3), dtype=torch.uint8, generator=generator)
    with autocast(precision, CPU):
        output = model(ImageTextBatch(images, torch.randint(5, 20, (7, 1, 6), generator=generator)))
    (output.image_features[:, 0] @ output.text_features[:, 0].T * output.logit_scale).log_softmax(1).diagonal().mean().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def test_fp8_is_refused_on_a_processor() -> None:
    with pytest.raises(ConfigError, match=r"precision=fp8, but a processor does not multiply fp8 .* set precision=bf16"):
        prepare_blocks(towers().blocks(), Precision.FP8, CPU)


def test_fp8_without_its_package_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs torchao: pip install 'mm-pretrain\[fp8\]'"):
        check_fp8_installed()


@pytest.mark.filterwarnings("ignore")  # torchao's own
def test_fp8_rounds_the_linear_layers_of_blocks_alone_and_keeps_names() -> None:
    pytest.importorskip("torchao", reason="needs mm-pretrain[fp8]")
    plain, rounded = towers(), towers()
    convert_to_fp8(rounded.blocks(), emulate=True)
    assert rounded.state_dict().keys() == plain.state_dict().keys()
    changed = {name for name, inner in rounded.named_modules() if type(inner).__name__ == "Float8Linear"}
    assert len(changed) == 2 * 2 * 6  # towers, layers, linear layers of each
    assert all(".layers." in name for name in changed)
    expected, found = gradient(plain), gradient(rounded)
    assert not torch.equal(expected, found)
    assert float(torch.nn.functional.cosine_similarity(expected, found, dim=0)) > 0.97


def test_a_residual_stream_in_bf16_is_what_blocks_hand_on() -> None:
    model = towers()
    prepare_blocks(model.blocks(), Precision.BF16_RESIDUAL, CPU)
    seen: set[torch.dtype] = set()
    for block in model.blocks():
        block.register_forward_hook(lambda block, inputs, output: seen.add(output.dtype))
    found = gradient(model, Precision.BF16_RESIDUAL)
    assert seen == {torch.bfloat16}
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}
    assert float(torch.nn.functional.cosine_similarity(gradient(towers()), found, dim=0)) > 0.99
