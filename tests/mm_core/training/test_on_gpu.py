"""What only a GPU can show: the same steps as on a CPU, however they are computed; copies and clocks on the device's own timeline."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from mm_core.distributed import GlobalBatch
from mm_core.losses.contrastive import contrastive_loss
from mm_core.models.clip import ClipConfig
from mm_core.models.codebook import CodebookSizes
from mm_core.models.family import ModelConfig, build_model
from mm_core.models.flava import FlavaConfig
from mm_core.models.fused import Fused
from mm_core.models.fused_batch import MaskedImages, MaskedTexts, PairBatch
from mm_core.models.siglip import SiglipConfig
from mm_core.models.sizes import SpecialTokens, TowerConfig
from mm_core.models.two_tower import ImageTextBatch, TwoTower
from mm_core.objectives.config import ObjectiveConfig, ObjectiveKind
from mm_core.objectives.contrastive import build_objective
from mm_core.objectives.multitask import MultitaskConfig, MultitaskObjective
from mm_core.optim import OptimizerConfig, build_optimizer
from mm_core.schedule import ScheduleConfig
from mm_core.training.checkpoint import CheckpointState, load_checkpoint
from mm_core.training.checkpoints import CheckpointFolder, CheckpointWriter, Retention
from mm_core.training.clock import Phase, StepClock
from mm_core.training.parallel import Parallelism, parallelise
from mm_core.training.precision import Precision, prepare_blocks
from mm_core.training.step import TrainStep
from mm_core.training.transfer import Transfer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

TOWER = TowerConfig(width=64, layers=2, heads=2)
SIZES: dict[str, Any] = {"image_size": 32, "patch_size": 8, "context_length": 12, "vocab_size": 96, "vision": TOWER, "text": TOWER}
CLIP, SIGLIP = ClipConfig(embed_dim=32, **SIZES), SiglipConfig(embed_dim=64, **SIZES)
FLAVA = FlavaConfig(embed_dim=32, text_positions=12, fusion=TOWER, codebook=CodebookSizes(width=4, blocks_per_group=1, entries=9), **SIZES)
SAMPLES, STEPS = 24, 3


@pytest.fixture(scope="module", autouse=True)
def _one_rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    rendezvous = tmp_path_factory.mktemp("group") / "rendezvous"
    dist.init_process_group("cpu:gloo,cuda:nccl", init_method=f"file://{rendezvous}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def batch_on(device: str, samples: int = SAMPLES) -> ImageTextBatch:
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (samples, 1, 32, 32, 3), dtype=torch.uint8, generator=generator)
    input_ids = torch.randint(5, 95, (samples, 1, 12), generator=generator)
    input_ids[..., -1] = 4
    return ImageTextBatch(images.to(device), input_ids.to(device))


def pairs_on(device: str) -> PairBatch:
    """With two patches of five and every third word hidden."""
    batch = batch_on("cpu")
    generator = torch.Generator().manual_seed(2)
    mask = torch.rand(SAMPLES, FLAVA.patches, generator=generator) < 0.4
    ids = batch.input_ids[:, 0]
    hidden = torch.rand(ids.shape, generator=generator) < 0.3
    rows = [each.flatten().nonzero()[:, 0].to(device) for each in (mask, hidden)]
    images = MaskedImages(batch.images[:, 0].to(device), mask.to(device), rows[0])
    texts = MaskedTexts(ids.to(device), torch.where(hidden, 1, ids).to(device), rows[1])
    return PairBatch(images, texts, torch.rand(SAMPLES, generator=generator).to(device), GlobalBatch((SAMPLES,)))


def trained(
    device: str,
    config: ModelConfig = CLIP,
    *,
    precision: Precision = Precision.FP32,
    compiled: bool = False,
    checkpointing: bool = False,
    micro_batch: int | None = None,
    parallelism: Parallelism = Parallelism.DDP,
    samples: int = SAMPLES,
) -> tuple[TrainStep, dict[str, torch.Tensor], list[float]]:
    """After some steps: the step, the weights, and each step's loss."""
    torch.manual_seed(0)
    where = torch.device(device, 0) if device == "cuda" else torch.device(device)
    fused = isinstance(config, FlavaConfig)
    model = (Fused if fused else TwoTower)(build_model(config, SpecialTokens(bos=3, eos=4, pad=0)))
    model.attend_for(where)
    if compiled:
        model.compile_blocks()
    if checkpointing:
        model.checkpoint_activations()
    model.to(where)
    prepare_blocks(model.blocks(), precision, where)
    clock = StepClock(where)
    optimizer = OptimizerConfig(lr=1e-3)
    kind = ObjectiveKind.SIGMOID if config.family == "siglip" else ObjectiveKind.CONTRASTIVE
    step = TrainStep(
        parallelise(model, parallelism, where, clock, blocks=model.blocks(), in_parts=model.trains_in_parts),
        MultitaskObjective(MultitaskConfig()) if fused else build_objective(ObjectiveConfig(kind=kind)),
        build_optimizer(model, optimizer, blocks=model.blocks()),
        optimizer_config=optimizer,
        schedule=ScheduleConfig(warmup_steps=0),
        total_steps=100,
        counts=[samples],
        device=where,
        precision=precision,
        clock=clock,
        micro_batch_size=micro_batch,
    )
    batch = pairs_on(device) if fused else batch_on(device, samples)
    losses = [float(sum(step(batch, number).terms.values())) for number in range(STEPS)]
    weights = {name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().cpu() for name, p in model.named_parameters()}
    return step, weights, losses


HOW: list[dict[str, Any]] = [
    {},
    {"checkpointing": True},
    {"micro_batch": 7},
    {"compiled": True},
    {"compiled": True, "checkpointing": True, "micro_batch": 7},
    {"parallelism": Parallelism.FSDP, "compiled": True},
]


@pytest.mark.parametrize(
    ("config", "how"),
    [(config, how) for config in (CLIP, SIGLIP, FLAVA) for how in HOW if config is not FLAVA or "micro_batch" not in how],
    ids=lambda value: value.family if hasattr(value, "family") else str(value),
)
def test_the_same_steps_as_on_a_processor(config: ModelConfig, how: dict[str, Any]) -> None:
    _, expected, expected_losses = trained("cpu", config)
    _, found, losses = trained("cuda", config, **how)
    assert losses == pytest.approx(expected_losses, rel=1e-4)
    for name, weights in found.items():
        # One step of Adam moves a weight whose gradient is next to nothing by up to the rate, with either sign.
        assert float((weights - expected[name]).abs().mean()) < 1e-4, name


@pytest.mark.parametrize("samples", [SAMPLES, 23])
@pytest.mark.parametrize("precision", [Precision.BF16, Precision.BF16_RESIDUAL, Precision.FP8])
def test_fewer_digits_stay_close(precision: Precision, samples: int) -> None:
    if precision is Precision.FP8:
        pytest.importorskip("torchao")
    _, _, expected = trained("cpu", samples=samples)
    _, _, losses = trained("cuda", precision=precision, samples=samples, compiled=precision is Precision.FP8)
    assert losses == pytest.approx(expected, rel=0.03)


def test_the_clock_is_the_devices_own_and_waits_for_nothing_before_it_is_read() -> None:
    device = torch.device("cuda", 0)
    matrix = torch.randn(4096, 4096, device=device)
    torch.cuda.synchronize()
    clock = StepClock(device)
    began = time.perf_counter()
    with clock.phase(Phase.FORWARD):
        for _ in range(50):
            matrix @ matrix
    queued_s = time.perf_counter() - began
    spent = clock.read()
    whole_s = time.perf_counter() - began
    assert queued_s < spent[Phase.FORWARD]
    assert sum(spent.values()) == pytest.approx(whole_s, rel=0.2)


def test_a_copy_runs_beside_kernels_and_arrives_whole() -> None:
    device = torch.device("cuda", 0)
    to_device = Transfer(device)
    matrix = torch.randn(4096, 4096, device=device)
    for seed in range(10):
        values = np.random.default_rng(seed).integers(0, 256, (64, 224, 224, 3), dtype=np.uint8)
        for _ in range(5):
            matrix @ matrix
        copied = to_device(values)
        del copied
        again = to_device(values)
        assert int(again.sum(dtype=torch.int64)) == int(values.sum(dtype=np.int64))


def test_a_checkpoint_is_of_the_step_at_which_it_began(tmp_path: Path) -> None:
    step, weights, _ = trained("cuda")
    folder = CheckpointFolder(str(tmp_path))
    writer = CheckpointWriter(folder, step.model.module, step.optimizer, retention=Retention())
    state = CheckpointState(step=STEPS, chunks_consumed=1, plan_fingerprint="p", data_fingerprint="d", config={}, code_revision="r")
    writer.save(state, {})
    for number in range(STEPS, 2 * STEPS):
        step(batch_on("cuda"), number)
    writer.finish()
    writer.close()
    load_checkpoint(folder.at(STEPS), step.model.module, step.optimizer)
    for name, parameter in step.model.module.named_parameters():
        torch.testing.assert_close(parameter.detach().cpu(), weights[name], rtol=0, atol=0)


def test_the_similarity_matrix_is_never_held_whole() -> None:
    count, width = 16_384, 64
    image, text = (torch.nn.functional.normalize(torch.randn(count, width, device="cuda"), dim=1).requires_grad_() for _ in range(2))
    scale = torch.tensor(10.0, device="cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    contrastive_loss(image, text[:, None], image, text[:, None], scale, 0, block_bytes=16 << 20).backward()
    assert torch.cuda.max_memory_allocated() - before < 4 * count**2 / 8
