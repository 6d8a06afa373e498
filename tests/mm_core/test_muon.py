"""Muon beside torch's own, and the same on one rank, on two with copies, and on two and three with shards; stopped and continued."""

from __future__ import annotations

import multiprocessing
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.tensor import DTensor

from mm_core.models.clip import ClipConfig
from mm_core.models.family import build_model
from mm_core.models.sizes import SpecialTokens, TowerConfig
from mm_core.models.two_tower import ImageTextBatch, Tower, TwoTower
from mm_core.muon import orthogonalise
from mm_core.objectives.contrastive import ContrastiveObjective
from mm_core.optim import OptimizerConfig, OptimizerKind, build_optimizer
from mm_core.training.checkpoint import CheckpointState, load_checkpoint
from mm_core.training.checkpoints import CheckpointFolder, CheckpointWriter, Retention
from mm_core.training.clock import StepClock
from mm_core.training.parallel import Parallelism, parallelise

TOWER = TowerConfig(width=20, layers=3, heads=2)
CONFIG = ClipConfig(image_size=16, patch_size=8, context_length=6, vocab_size=20, embed_dim=8, vision=TOWER, text=TOWER)
MUON = OptimizerConfig(kind=OptimizerKind.MUON, lr=1e-2, weight_decay=0.1)
STATE = CheckpointState(step=2, chunks_consumed=2, plan_fingerprint="p", data_fingerprint="d", config={}, code_revision="r")
STEPS = 4


def model_of(dtype: torch.dtype = torch.float64, seed: int = 0) -> TwoTower:
    torch.manual_seed(seed)
    return TwoTower(build_model(CONFIG, SpecialTokens(bos=3, eos=4, pad=0))).to(dtype)


def batch_of(step: int, first: int = 0, count: int = 6) -> ImageTextBatch:
    generator = torch.Generator().manual_seed(step)
    images = torch.randint(0, 256, (6, 1, 16, 16, 3), dtype=torch.uint8, generator=generator)
    input_ids = torch.randint(5, 20, (6, 1, 6), generator=generator)
    input_ids[..., -1] = 4
    return ImageTextBatch(images[first : first + count], input_ids[first : first + count])


def test_matrices_and_others_move_as_with_torchs_own_optimisers() -> None:
    ours, theirs = model_of(torch.float32), model_of(torch.float32)
    optimizer = build_optimizer(ours, MUON, blocks=ours.blocks())
    in_blocks = {p for block in theirs.blocks() for p in block.parameters() if p.ndim == 2}
    muon = torch.optim.Muon(in_blocks, lr=MUON.lr, weight_decay=MUON.weight_decay, momentum=MUON.momentum, adjust_lr_fn="match_rms_adamw")
    others = nn.ParameterList([p for p in theirs.parameters() if p not in in_blocks])
    names = {id(p): name for name, p in theirs.named_parameters()}
    decays = [p for p in others if p.ndim >= 2 and not names[id(p)].endswith("bias")]
    spared = [p for p in others if not any(p is decaying for decaying in decays)]
    settings: dict[str, Any] = {"lr": MUON.lr, "betas": (MUON.beta1, MUON.beta2), "eps": MUON.eps}
    adamw = torch.optim.AdamW([{"params": decays, "weight_decay": MUON.weight_decay}, {"params": spared, "weight_decay": 0}], **settings)
    for step in range(3):
        for name, p in ours.named_parameters():  # the same gradients, so that only the update is compared
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step + len(name)))
            theirs.get_parameter(name).grad = p.grad.clone()
        for group in (*optimizer.param_groups, *muon.param_groups, *adamw.param_groups):
            group["lr"] = MUON.lr / (step + 1)
        for each in (optimizer, muon, adamw):
            each.step()
    for name, p in ours.named_parameters():
        of_muon = theirs.get_parameter(name) in in_blocks
        assert of_muon == (name.endswith("weight") and (".mlp." in name or ".self_attn." in name))
        # Products of stacked bf16 matrices round differently from those of single ones.
        torch.testing.assert_close(p, theirs.get_parameter(name), atol=3e-4 if of_muon else 1e-6, rtol=1e-5, msg=lambda m: f"{name}: {m}")  # noqa: B023


def test_singular_values_become_about_one_and_zeros_stay() -> None:
    torch.manual_seed(0)
    for shape in ((3, 8, 24), (3, 24, 8)):
        matrices = torch.randn(shape)
        matrices[2] = 0
        found = orthogonalise(matrices).float()
        values = torch.linalg.svdvals(found[:2])
        assert values.min() > 0.6
        assert values.max() < 1.3
        assert not found[2].any()


def test_a_frozen_towers_matrices_are_left_out() -> None:
    model = model_of()
    model.freeze(Tower.VISION)
    held = [p for group in build_optimizer(model, MUON, blocks=model.blocks()).param_groups for p in group["params"]]
    assert len(held) == sum(p.requires_grad for p in model.parameters())
    assert all(p.requires_grad for p in held)


def train(
    kind: Parallelism | None,
    rank: int,
    ranks: int,
    *,
    first: int = 0,
    last: int = STEPS,
    load: Path | None = None,
    save: Path | None = None,
) -> Any:
    """The weights after the steps [first, last), on every rank. `kind`: None for one process alone."""
    inner = model_of(seed=0 if load is None else 1)
    device, count = torch.device("cpu"), 6 // ranks
    model = None if kind is None else parallelise(inner, kind, device, StepClock(device), blocks=inner.blocks())
    optimizer = build_optimizer(inner, MUON, blocks=inner.blocks())
    if load is not None:
        load_checkpoint(CheckpointFolder(str(load)).at(STATE.step), inner, optimizer)
    objective = ContrastiveObjective(rank=rank)
    for step in range(first, last):
        batch = batch_of(step, rank * count, count)
        optimizer.zero_grad()
        objective((model or inner)(batch), batch, [count] * ranks).total.backward()
        if model is not None:
            model.finish_gradients()
        optimizer.step()
    if save is not None:
        writer = CheckpointWriter(CheckpointFolder(str(save)), inner, optimizer, retention=Retention())
        writer.save(STATE, {}, wait=True)
        writer.close()
    return {name: p.full_tensor() if isinstance(p, DTensor) else p.detach() for name, p in inner.named_parameters()}


def _worker(rank: int, ranks: int, folder: str) -> None:
    torch.set_num_threads(1)
    here = Path(folder)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous-{ranks}", rank=rank, world_size=ranks, timeout=timedelta(seconds=60)
    )
    found = {str(kind): train(kind, rank, ranks) for kind in Parallelism}
    found["continued"] = train(Parallelism.FSDP, rank, ranks, first=2, load=here / "of-one")
    train(Parallelism.FSDP, rank, ranks, last=2, save=here / f"of-{ranks}")
    torch.save(found, f"{folder}/{ranks}-{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("muon")


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, torch.Tensor]:
    """One rank, which also leaves its checkpoint of step 2."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=0, world_size=1)
    weights = train(None, 0, 1)
    train(None, 0, 1, last=2, save=folder / "of-one")
    dist.destroy_process_group()
    return weights


@pytest.mark.parametrize("ranks", [2, 3])
def test_any_number_of_ranks_moves_as_one_does_and_goes_on_from_anothers_checkpoint(
    folder: Path, alone: dict[str, torch.Tensor], ranks: int
) -> None:
    multiprocessing.set_forkserver_preload(["mm_core.objectives.contrastive", "transformers.models.clip.modeling_clip"])
    mp.start_processes(_worker, (ranks, str(folder)), nprocs=ranks, start_method="forkserver")
    for rank in range(ranks):
        for how, weights in torch.load(folder / f"{ranks}-{rank}.pt").items():
            for name, expected in alone.items():
                torch.testing.assert_close(weights[name], expected, rtol=1e-8, atol=1e-9, msg=lambda m: f"{how}: {name}: {m}")  # noqa: B023
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous-back-{ranks}", rank=0, world_size=1)
    back = train(None, 0, 1, first=2, load=folder / f"of-{ranks}")
    dist.destroy_process_group()
    for name, expected in alone.items():
        torch.testing.assert_close(back[name], expected, rtol=1e-8, atol=1e-9)
