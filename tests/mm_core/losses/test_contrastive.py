"""The global loss on 2 and 3 gloo processes with uneven shares equals one process on the whole batch: values and gradients."""

from __future__ import annotations

import multiprocessing
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from mm_core.models.clip import ClipConfig, ImageTextBatch, SpecialTokens, TowerConfig, TwoTower, TwoTowerOutput, build_clip
from mm_core.objectives.contrastive import ContrastiveObjective

TOWER = TowerConfig(width=16, layers=1, heads=2)
CONFIG = ClipConfig(image_size=16, patch_size=8, context_length=6, vocab_size=20, embed_dim=8, vision=TOWER, text=TOWER)


def whole_model() -> TwoTower:
    torch.manual_seed(0)
    return TwoTower(build_clip(CONFIG, SpecialTokens(bos=3, eos=4, pad=0))).double()


def whole_batch(samples: int, views: int = 1) -> ImageTextBatch:
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (samples, views, 16, 16, 3), dtype=torch.uint8, generator=generator)
    input_ids = torch.randint(5, 20, (samples, 6), generator=generator)
    input_ids[:, -1] = 4
    return ImageTextBatch(images, input_ids)


def _worker(rank: int, counts: list[int], views: int, rendezvous: str, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=len(counts), timeout=timedelta(seconds=60))
    model = DistributedDataParallel(whole_model())
    batch, first = whole_batch(sum(counts), views), sum(counts[:rank])
    mine = ImageTextBatch(batch.images[first : first + counts[rank]], batch.input_ids[first : first + counts[rank]])
    loss = ContrastiveObjective(rank=rank)(model(mine), counts)
    loss.total.backward()
    gradients = {name: p.grad for name, p in model.module.named_parameters()}
    torch.save({"share": loss.terms["contrastive"].detach(), "gradients": gradients}, f"{out}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize(("counts", "views"), [([5, 3], 1), ([4, 2, 1], 2)], ids=["2 ranks", "3 ranks, two views"])
def test_uneven_ranks_equal_one_process(counts: list[int], views: int, tmp_path: Path) -> None:
    model = whole_model()
    loss = ContrastiveObjective()(model(whole_batch(sum(counts), views)), [sum(counts)])
    loss.total.backward()

    multiprocessing.set_forkserver_preload(["mm_core.objectives.contrastive", "transformers.models.clip.modeling_clip"])
    arguments = (counts, views, str(tmp_path / "rendezvous"), str(tmp_path))
    # A server that has imported transformers once forks the ranks; spawned ones would each import it, for seconds.
    mp.start_processes(_worker, arguments, nprocs=len(counts), start_method="forkserver")
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(len(counts))]

    assert abs(sum(rank["share"] for rank in ranks) - loss.total.detach()) < 1e-9
    for rank in ranks:
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(rank["gradients"][name], parameter.grad, rtol=1e-9, atol=1e-12, msg=f"{name} of {counts}")


def test_loss_is_the_papers() -> None:
    """Figure 3 of the CLIP paper, written out."""
    batch = whole_batch(4)
    output = whole_model()(batch)
    logits = output.logit_scale * output.image_features[:, 0] @ output.text_features.T
    labels = torch.arange(4)
    expected = (torch.nn.functional.cross_entropy(logits, labels) + torch.nn.functional.cross_entropy(logits.T, labels)) / 2
    torch.testing.assert_close(ContrastiveObjective()(output, [4]).total, expected)


def test_a_perfect_model_has_no_loss() -> None:
    output = TwoTowerOutput(torch.eye(3)[:, None], torch.eye(3), torch.tensor(100.0))
    assert float(ContrastiveObjective()(output, [3]).total) < 1e-6


def test_several_views_of_an_image_count_as_the_mean_of_their_losses() -> None:
    model, batch = whole_model(), whole_batch(4, views=3)
    several = ContrastiveObjective()(model(batch), [4]).total
    each = [ContrastiveObjective()(model(ImageTextBatch(batch.images[:, v : v + 1], batch.input_ids)), [4]).total for v in range(3)]
    torch.testing.assert_close(several, sum(each) / 3)
