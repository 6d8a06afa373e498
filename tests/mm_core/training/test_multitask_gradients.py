"""FLAVA's tasks on 2 and 4 ranks, replicated and sharded: the loss and gradients of one process on the whole batch."""

from __future__ import annotations

import itertools
import multiprocessing
from dataclasses import replace
from datetime import timedelta
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.tensor import DTensor

from mm_core.distributed import GlobalBatch
from mm_core.models.codebook import CodebookSizes
from mm_core.models.family import build_model
from mm_core.models.flava import FlavaConfig
from mm_core.models.fused import Fused
from mm_core.models.fused_batch import FusedBatch, ImageBatch, MaskedImages, MaskedTexts, PairBatch, TextBatch
from mm_core.models.hallucination import Hallucination
from mm_core.models.sizes import SpecialTokens, TowerConfig
from mm_core.objectives.balance import BalanceConfig, BalanceKind
from mm_core.objectives.multitask import MultitaskConfig, MultitaskObjective, TaskWeights
from mm_core.training.clock import StepClock
from mm_core.training.parallel import Parallelism, parallelise

TOWER = TowerConfig(width=16, layers=2, heads=2)
MODEL = FlavaConfig(
    image_size=16,
    patch_size=4,
    context_length=8,
    text_positions=8,
    vocab_size=30,
    embed_dim=8,
    vision=TOWER,
    text=TOWER,
    fusion=TOWER,
    codebook=CodebookSizes(width=4, blocks_per_group=1, entries=9),
)
WEIGHTS = TaskWeights(mim=0.5, mlm=2.0, mmm_text=3.0, itm=0.7)
OBJECTIVES = {
    "fixed": MultitaskConfig(weights=WEIGHTS),
    "probed": MultitaskConfig(weights=WEIGHTS, balance=BalanceConfig(probe_every_steps=1, modulation=0.5)),
    "uncertainty": MultitaskConfig(weights=WEIGHTS, balance=BalanceConfig(kind=BalanceKind.UNCERTAINTY)),
    "gradnorm": MultitaskConfig(weights=WEIGHTS, balance=BalanceConfig(kind=BalanceKind.GRADNORM)),
    "hallucination": MultitaskConfig(weights=WEIGHTS, modality_dropout=0.3, hallucination=0.5),
}
SAMPLES = 9
COUNTS = {2: [5, 4], 4: [3, 2, 2, 2]}
STEPS = ("pairs", "images", "texts")


class Case(NamedTuple):
    step: str
    parallelism: Parallelism
    objective: str

    def __str__(self) -> str:
        return f"{self.step}, {self.parallelism}, {self.objective}"


CASES = [Case(*case) for case in itertools.product(STEPS, Parallelism, OBJECTIVES) if case[0] == "pairs" or case[2] == "fixed"]


def model_of(objective: str) -> Fused:
    """Its positions and codebook drawn at random, since both begin as nothing, and a similarity that makes some negatives likelier."""
    torch.manual_seed(0)
    inner = build_model(MODEL, SpecialTokens(bos=3, eos=4, pad=0))
    config = OBJECTIVES[objective]
    hallucination = Hallucination(inner.config) if config.hallucination else None
    model = Fused(inner, learns_balance=config.balance.learns, hallucination=hallucination).double()
    with torch.no_grad():
        for number, parameter in enumerate(model.balance.values()):
            parameter.fill_(0.1 * number)
        for name, parameter in model.named_parameters():
            if "position" in name or "token" in name or "image_codebook" in name:
                parameter.normal_(std=0.3)
    return model


def batch_of(step: str, first: int, count: int, whole: GlobalBatch, objective: str) -> FusedBatch:
    """The part [first, first + count) of nine samples, of which two say the same, and one side of three is not seen."""
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (SAMPLES, 16, 16, 3), dtype=torch.uint8, generator=generator)
    mask = torch.rand(SAMPLES, 16, generator=generator) < 0.4
    ids = torch.randint(5, 30, (SAMPLES, 8), generator=generator)
    ids[::2, 6:] = 0
    ids[5] = ids[1]
    hidden = (torch.rand(SAMPLES, 8, generator=generator) < 0.4) & (ids != 0)
    draws = torch.rand(SAMPLES, generator=generator, dtype=torch.float64)
    part = slice(first, first + count)
    images = MaskedImages(pixels[part], mask[part], mask[part].flatten().nonzero()[:, 0])
    texts = MaskedTexts(ids[part], torch.where(hidden, 1, ids)[part], hidden[part].flatten().nonzero()[:, 0])
    match step:
        case "images":
            return ImageBatch(images, whole)
        case "texts":
            return TextBatch(texts, whole)
        case _:
            seen = torch.ones(SAMPLES, 2, dtype=torch.bool)
            seen[2, 0] = seen[5, 1] = seen[8, 0] = False
            shown_images = replace(images, rows=(mask & seen[:, :1])[part].flatten().nonzero()[:, 0])
            shown_texts = replace(texts, rows=(hidden & seen[:, 1:])[part].flatten().nonzero()[:, 0])
            return PairBatch(shown_images, shown_texts, draws[part], whole, seen[part], OBJECTIVES[objective].balance.probes(0))


@cache
def alone(step: str, objective: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Terms, measures and gradients of one process on the whole batch."""
    model, batch = model_of(objective), batch_of(step, 0, SAMPLES, GlobalBatch((SAMPLES,)), objective)
    loss = MultitaskObjective(OBJECTIVES[objective])(model(batch), batch, [SAMPLES])
    loss.total.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: term.detach() for name, term in loss.terms.items()}, loss.measures, gradients


def _compute(case: Case, rank: int, counts: list[int]) -> dict[str, Any]:
    device = torch.device("cpu")
    inner = model_of(case.objective)
    if case.parallelism is Parallelism.FSDP:
        inner.checkpoint_activations()
    model = parallelise(inner, case.parallelism, device, StepClock(device), blocks=inner.blocks(), in_parts=inner.trains_in_parts)
    objective = MultitaskObjective(OBJECTIVES[case.objective])
    whole = GlobalBatch(tuple(counts), rank)
    for step in ("texts", case.step):  # after a step of another kind, as in a mix
        batch = batch_of(step, whole.first, counts[rank], whole, case.objective)
        inner.zero_grad(set_to_none=True)
        loss = objective(model(batch), batch, counts)
        loss.total.backward()
        model.finish_gradients()
    gradients = {name: _whole(p.grad) for name, p in inner.named_parameters() if p.grad is not None}
    terms = {name: term.detach() for name, term in loss.terms.items()}
    return {"terms": terms, "measures": loss.measures, "gradients": gradients}


def _whole(tensor: Any) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()


def _worker(rank: int, counts: list[int], rendezvous: str, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=len(counts), timeout=timedelta(seconds=120))
    torch.save([_compute(case, rank, counts) for case in CASES], f"{out}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=COUNTS, ids=lambda ranks: f"{ranks} ranks")
def computed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[list[dict[str, Any]]]:
    """By rank, by case."""
    folder, counts = tmp_path_factory.mktemp("multitask"), COUNTS[request.param]
    multiprocessing.set_forkserver_preload(["mm_core.objectives.multitask", "transformers.models.flava.modeling_flava"])
    mp.start_processes(_worker, (counts, str(folder / "rendezvous"), str(folder)), nprocs=len(counts), start_method="forkserver")
    return [torch.load(folder / f"{rank}.pt") for rank in range(len(counts))]


def test_every_step_equals_one_process_on_the_whole_batch(computed: list[list[dict[str, Any]]]) -> None:
    close = {"rtol": 1e-9, "atol": 1e-9}
    for number, case in enumerate(CASES):
        terms, measures, expected = alone(case.step, case.objective)
        for kind, wanted in (("terms", terms), ("measures", measures)):
            for name, value in wanted.items():
                found = torch.stack([rank[number][kind][name] for rank in computed]).sum()
                torch.testing.assert_close(found, value, **close, msg=lambda message: f"{case}: {name}: {message}")  # noqa: B023
        for rank in computed:
            found = rank[number]["gradients"]
            assert found.keys() == expected.keys(), case
            for name, gradient in found.items():
                torch.testing.assert_close(gradient, expected[name], **close, msg=lambda message: f"{case}: {name}: {message}")  # noqa: B023
