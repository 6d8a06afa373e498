"""Every objective, cached or not, replicated or sharded, on 1 to 4 ranks: the loss and gradients of one process on the whole batch.

One group of processes per world size computes all cases, since starting them costs more than the cases do.
"""

from __future__ import annotations

import itertools
import multiprocessing
from contextlib import nullcontext
from datetime import timedelta
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.tensor import DTensor

from mm_core.models.align import AlignConfig, EfficientNetConfig
from mm_core.models.clip import ClipConfig
from mm_core.models.family import ModelConfig, build_model
from mm_core.models.siglip import SiglipConfig
from mm_core.models.sizes import SpecialTokens, TowerConfig
from mm_core.models.two_tower import ImageTextBatch, TwoTower
from mm_core.objectives.config import ObjectiveConfig, ObjectiveKind
from mm_core.objectives.contrastive import build_objective
from mm_core.objectives.output import Objective
from mm_core.training.clock import StepClock
from mm_core.training.gradient_cache import cached_backward, pieces_for
from mm_core.training.parallel import Parallelism, clip_gradients, parallelise
from mm_core.training.teacher import Teacher

TOWER = TowerConfig(width=16, layers=2, heads=2)
SIZES: dict[str, Any] = {"image_size": 16, "patch_size": 8, "context_length": 6, "vocab_size": 20, "vision": TOWER, "text": TOWER}
CLIP, SIGLIP = ClipConfig(embed_dim=8, **SIZES), SiglipConfig(embed_dim=16, **SIZES)
ALIGN = AlignConfig(
    image_size=32,
    context_length=6,
    vocab_size=20,
    embed_dim=32,
    vision=EfficientNetConfig(width=0.1, depth=0.3, dropout=0.0),
    text=TOWER,
    text_positions=6,
    text_dropout=0.0,
    initial_temperature=0.5,
)
"""Batch normalisation makes every sample's features depend on all ranks' samples; in pieces they would depend on those of the piece."""
OBJECTIVES: dict[str, ObjectiveConfig] = {
    "infonce": ObjectiveConfig(),
    "smoothed": ObjectiveConfig(label_smoothing=0.1),
    "align": ObjectiveConfig(label_smoothing=0.1),
    "siglip": ObjectiveConfig(kind=ObjectiveKind.SIGMOID),
    "triplet": ObjectiveConfig(kind=ObjectiveKind.TRIPLET, margin=0.3),
    "distillation": ObjectiveConfig(kind=ObjectiveKind.DISTILLATION, teacher="a bundle", teacher_weight=0.7),
}
COUNTS = {1: [9], 2: [5, 4], 3: [4, 3, 2], 4: [3, 2, 2, 2]}
"""Uneven, nine samples in all."""
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}
SMALL_BLOCK = 200
"""Bytes: three to six similarities of the nine columns at a time."""


class Case(NamedTuple):
    objective: str
    cached: bool
    parallelism: Parallelism
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.objective}, {'cached' if self.cached else 'whole'}, {self.parallelism}, {self.dtype}"


def cases(ranks: int) -> list[Case]:
    kinds = [Parallelism.DDP] if ranks == 1 else list(Parallelism)
    every = [Case(*case) for case in itertools.product(OBJECTIVES, (False, True), kinds, TOLERANCE)]
    return [case for case in every if case.objective != "align" or (case.dtype == torch.float64 and not case.cached)]


def model_of(objective: str, dtype: torch.dtype, seed: int = 0) -> TwoTower:
    torch.manual_seed(seed)
    return TwoTower(build_model(config_of(objective), SpecialTokens(bos=3, eos=4, pad=0))).to(dtype)


def config_of(objective: str) -> ModelConfig:
    return {"siglip": SIGLIP, "align": ALIGN}.get(objective, CLIP)


def objective_of(name: str, dtype: torch.dtype, rank: int = 0, block_bytes: int = 1 << 20, at_a_time: int | None = None) -> Objective:
    teacher = None
    if name == "distillation":
        teacher = Teacher(model_of(name, dtype, seed=5), forward=nullcontext, micro_batch_size=at_a_time)
    return build_objective(OBJECTIVES[name], rank=rank, teacher=teacher, block_bytes=block_bytes)


def batch_of(objective: str, first: int, count: int) -> ImageTextBatch:
    """Two views and three captions of each of nine images; the part [first, first + count)."""
    generator, size = torch.Generator().manual_seed(1), config_of(objective).image_size
    images = torch.randint(0, 256, (9, 2, size, size, 3), dtype=torch.uint8, generator=generator)
    input_ids = torch.randint(5, 20, (9, 3, 6), generator=generator)
    input_ids[..., -1] = 4
    input_ids[::2, 0, 4:] = torch.tensor([4, 0])  # padded
    return ImageTextBatch(images[first : first + count], input_ids[first : first + count])


class Expected(NamedTuple):
    loss: torch.Tensor
    gradients: dict[str, torch.Tensor]
    statistics: dict[str, torch.Tensor]
    """What batch normalisation keeps for evaluation."""


@cache
def alone(objective: str, dtype: torch.dtype) -> Expected:
    """One process on the whole batch, nothing in blocks."""
    model, batch = model_of(objective, dtype), batch_of(objective, 0, 9)
    loss = objective_of(objective, dtype)(model(batch), batch, [9]).total
    loss.backward()
    return Expected(loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, statistics(model))


def statistics(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: buffer.clone() for name, buffer in model.named_buffers() if "running" in name or "tracked" in name}


def _compute(case: Case, rank: int, counts: list[int]) -> dict[str, Any]:
    device = torch.device("cpu")
    inner = model_of(case.objective, case.dtype)
    if case.objective == "align" and case.parallelism is Parallelism.FSDP:
        inner.checkpoint_activations()  # the messages of batch normalisation come in backward too
    model = parallelise(inner, case.parallelism, device, StepClock(device), blocks=inner.blocks())
    batch = batch_of(case.objective, sum(counts[:rank]), counts[rank])
    objective = objective_of(case.objective, case.dtype, rank, SMALL_BLOCK, at_a_time=1 if case.cached else None)
    if case.cached:
        loss = cached_backward(model, batch, lambda output: objective(output, batch, counts), pieces_for(counts, 1), forward=nullcontext)
    else:
        loss = objective(model(batch), batch, counts)
        loss.total.backward()
    model.finish_gradients()
    gradients = {name: _whole(p.grad) for name, p in inner.named_parameters() if p.grad is not None}
    norm = clip_gradients(inner.parameters(), 1e-3)
    clipped = torch.stack([_whole(p.grad).norm() for p in inner.parameters() if p.grad is not None]).norm()
    share = torch.stack([*loss.terms.values()]).sum().detach()
    return {"share": share, "gradients": gradients, "norm": norm, "clipped": clipped, "statistics": statistics(inner)}


def _whole(tensor: Any) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()


def _worker(rank: int, counts: list[int], rendezvous: str, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=len(counts), timeout=timedelta(seconds=120))
    torch.save([_compute(case, rank, counts) for case in cases(len(counts))], f"{out}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=COUNTS, ids=lambda ranks: f"{ranks} ranks")
def computed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[list[dict[str, Any]]]:
    """By rank, by case."""
    folder, counts = tmp_path_factory.mktemp("gradients"), COUNTS[request.param]
    multiprocessing.set_forkserver_preload(
        ["mm_core.objectives.contrastive", "transformers.models.clip.modeling_clip", "transformers.models.align.modeling_align"]
    )
    mp.start_processes(_worker, (counts, str(folder / "rendezvous"), str(folder)), nprocs=len(counts), start_method="forkserver")
    return [torch.load(folder / f"{rank}.pt") for rank in range(len(counts))]


def test_every_case_equals_one_process_on_the_whole_batch(computed: list[list[dict[str, Any]]]) -> None:
    for number, case in enumerate(cases(len(computed))):
        loss, expected, kept = alone(case.objective, case.dtype)
        close = {"rtol": TOLERANCE[case.dtype], "atol": TOLERANCE[case.dtype]}
        torch.testing.assert_close(sum(rank[number]["share"] for rank in computed), loss, **close, msg=str(case))
        norm = torch.stack([g.norm() for g in expected.values()]).norm()
        for rank in computed:
            found = rank[number]["gradients"]
            assert found.keys() >= expected.keys()
            for name, gradient in found.items():
                wanted = expected.get(name, torch.zeros_like(gradient))
                torch.testing.assert_close(gradient, wanted, **close, msg=lambda message: f"{case}: {name}: {message}")  # noqa: B023
            torch.testing.assert_close(rank[number]["statistics"], kept, **close)
            torch.testing.assert_close(rank[number]["norm"], norm, **close)
            assert float(rank[number]["clipped"]) == pytest.approx(min(1e-3, float(norm)), rel=1e-2)
