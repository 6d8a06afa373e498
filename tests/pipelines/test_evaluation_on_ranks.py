"""Evaluations of one and several ranks give what `mm eval` gives, leave training as it was, and end on all ranks if they end on one."""

from __future__ import annotations

import multiprocessing
import os
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.tensor import DTensor

from mm_core.bundle import load_bundle, write_bundle
from mm_core.config import resolve
from mm_core.data.image import decode_centre
from mm_core.data.index import Index
from mm_core.data.ledger import Source
from mm_core.data.reader import IndexReader
from mm_core.data.sample import Sample
from mm_core.evaluation.evaluator import EvaluationSpec, Evaluator, ZeroShot
from mm_core.models.clip import build_clip
from mm_core.models.tokenizer import caption_tokenizer, special_tokens, train_bpe
from mm_core.models.two_tower import ImageTextBatch, TwoTower, TwoTowerOutput
from mm_core.objectives.contrastive import build_objective
from mm_core.ranks import Ranks
from mm_core.training.checkpoint import seed_step
from mm_core.training.clock import StepClock
from mm_core.training.parallel import Parallelism
from mm_core.training.step import TrainStep
from pipelines.evaluate import classes_of, evaluate_retrieval, evaluate_zeroshot, shards_of
from pipelines.index import build_index
from pipelines.recipes import recipe
from pipelines.train.config import TrainRun
from pipelines.train.loop import build_step

TOWER = "{width: 32, layers: 1, heads: 2}"
FEW = 2
"""Samples: of three ranks one has none."""


def run_of(kind: Parallelism) -> TrainRun:
    settings = ["steps=9", "global_batch_size=24", "data.chunk=4", "precision=fp32", "model.image_size=32", "ema_decay=0.5"]
    settings += [f"model.vision={TOWER}", f"model.text={TOWER}", "model.embed_dim=16", "model.vocab_size=320", f"parallel.kind={kind}"]
    return resolve(recipe("clip-tiny"), environment={}, overrides=settings)[0]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    tokenizer = train_bpe(["a red circle", "two blue squares"] * 5, vocab_size=320, context_length=32)
    config = run_of(Parallelism.DDP).model.model_copy(update={"vocab_size": len(tokenizer)})
    folder = tmp_path_factory.mktemp("model") / "bundle"
    torch.manual_seed(3)
    clip = build_clip(config, special_tokens(tokenizer))  # type: ignore[arg-type]
    write_bundle(folder, model=clip, tokenizer=tokenizer, config=config, recipe="clip-tiny", data_fingerprint="none", metrics={})
    return str(folder)


@pytest.fixture(scope="module")
def spec(model: str, corpus: Path, ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> EvaluationSpec:
    """Held-out pairs, every twentieth of them damaged since it was indexed, and labelled pictures."""
    folder = tmp_path_factory.mktemp("heldout")
    shard, data = folder / "0.tar", bytearray((corpus / "heldout" / "00000.tar").read_bytes())
    shard.write_bytes(data)
    pairs, times = build_index([str(shard)], str(folder / "pairs")), shard.stat()
    for row in pairs.locators[7::20]:
        data[row["start"] : row["start"] + 512] = bytes(512)
    shard.write_bytes(data)
    os.utime(shard, ns=(times.st_atime_ns, times.st_mtime_ns))
    labelled = build_index([shards_of(str(corpus / "zeroshot"))], str(folder / "labelled"), need=("image",))
    names, templates = classes_of(str(corpus / "zeroshot"))
    bundle = load_bundle(model)
    return EvaluationSpec(
        retrieval=Source(index=pairs.url),
        zeroshot=ZeroShot(Source(index=labelled.url), tuple(names), tuple(templates)),
        max_samples=5000,
        tokenizer=caption_tokenizer(bundle.tokenizer, 32),
        image_size=bundle.image_size,
        objective=run_of(Parallelism.DDP).objective,
        batch_size=24,
    )


def limited(spec: EvaluationSpec, samples: int) -> EvaluationSpec:
    return EvaluationSpec(**vars(spec) | {"max_samples": samples})


@pytest.fixture(scope="module")
def alone(spec: EvaluationSpec, model: str) -> dict[str, float]:
    towers = load_bundle(model).towers
    with torch.no_grad():
        return Evaluator(spec, Ranks(torch.device("cpu")))(towers)


def test_figures_are_those_of_mm_eval(alone: dict[str, float], spec: EvaluationSpec, model: str, corpus: Path) -> None:
    bundle = load_bundle(model)
    assert spec.retrieval is not None
    expected = {f"retrieval/{name}": value for name, value in evaluate_retrieval(bundle, model, [spec.retrieval.index]).metrics.items()}
    expected |= {f"zeroshot/{name}": value for name, value in evaluate_zeroshot(bundle, model, str(corpus / "zeroshot")).items()}
    assert {name: alone[f"eval/{name}"] for name in expected} == pytest.approx(expected, abs=1e-12)
    assert alone["eval/retrieval/skipped"] == 3


def test_the_loss_is_the_objective_on_whole_batches(alone: dict[str, float], spec: EvaluationSpec, model: str) -> None:
    """57 samples in batches of 24: two of them, as no batch is smaller."""
    bundle = load_bundle(model)
    assert spec.retrieval is not None
    index = Index.open(spec.retrieval.index)
    read = IndexReader(index).read(np.arange(index.summary.rows, dtype=np.uint64))
    held = [sample for sample in read if isinstance(sample, Sample)]
    images = torch.from_numpy(bundle.image_features(np.stack([decode_centre(sample.image or b"", bundle.image_size) for sample in held])))
    texts = torch.from_numpy(bundle.text_features([sample.captions[0] for sample in held]))
    order, losses = np.random.default_rng(0).permutation(len(held)), []
    nothing = ImageTextBatch(torch.empty(0, 0, 0, 0, 3, dtype=torch.uint8), torch.empty(0, 0, 0, dtype=torch.long))
    for rows in (order[:24], order[24:48]):
        output = TwoTowerOutput(images[rows][:, None], texts[rows][:, None], torch.tensor(bundle.logit_scale))
        losses.append(float(build_objective(spec.objective)(output, nothing, [24]).total))
    assert alone["eval/loss"] == pytest.approx(np.mean(losses), rel=1e-5)


def batch_of(rank: int, size: int) -> ImageTextBatch:
    draw = torch.Generator().manual_seed(rank)
    ids = torch.randint(5, 200, (size, 1, 32), generator=draw)
    ids[..., -1] = 4
    return ImageTextBatch(torch.randint(0, 256, (size, 1, 32, 32, 3), dtype=torch.uint8, generator=draw), ids)


def whole(step: TrainStep) -> torch.Tensor:
    parameters = [p.detach().full_tensor() if isinstance(p, DTensor) else p.detach() for p in step.model.module.parameters()]
    return torch.cat([p.flatten() for p in parameters]).clone()


def trained(kind: Parallelism, model: str, evaluators: list[Evaluator]) -> tuple[list[dict[str, float]], torch.Tensor]:
    """What evaluations between two steps find of the mean of the weights, which is the bundle's; and the weights after the second step."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    bundle = load_bundle(model)
    step = build_step(run_of(kind), TwoTower(bundle.model), StepClock(torch.device("cpu")))
    assert step.mean is not None
    mean = {name: value.clone() for name, value in step.mean.state.items()}
    step(batch_of(rank, 24 // ranks), 0)
    for name, value in mean.items():
        step.mean.state[name].copy_(value)
    before, state, found = whole(step), torch.get_rng_state(), []
    for evaluator in evaluators:
        with step.evaluating() as towers:
            found.append(evaluator(towers))
    assert torch.equal(whole(step), before)
    assert torch.equal(torch.get_rng_state(), state)
    assert step.model.module.training
    seed_step(0, 1, rank)
    step(batch_of(rank + 10, 24 // ranks), 1)
    return found, whole(step)


class Broken:
    """A store that gives nothing to one rank."""

    def __init__(self, index: Index) -> None:
        self.index = index

    def read(self, ordinals: Any) -> Any:
        raise OSError("the disk is gone")


def ended(evaluator: Evaluator, towers: Any) -> str:
    try:
        evaluator(towers)
    except (OSError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def _worker(rank: int, ranks: int, rendezvous: str, out: str, model: str, spec: EvaluationSpec) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=ranks, timeout=timedelta(seconds=60))
    device, results = torch.device("cpu"), dict[str, Any]()
    for kind in Parallelism:
        evaluators = [Evaluator(each, Ranks(device)) for each in (spec, limited(spec, FEW))]
        results[f"found {kind}"], results[f"weights {kind}"] = trained(kind, model, evaluators)
        results[f"untouched {kind}"] = trained(kind, model, [])[1]
    broken = Evaluator(spec, Ranks(device))
    if rank == 1:
        assert broken._pairs is not None
        broken._pairs.__dict__["ordinals"] = broken._pairs.ordinals
        broken._pairs.__dict__["reader"] = Broken(broken._pairs.reader.index)
    results["ended"] = ended(broken, load_bundle(model).towers)
    torch.save(results, f"{out}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=[2, 3], ids=lambda ranks: f"{ranks} ranks")
def computed(
    request: pytest.FixtureRequest, spec: EvaluationSpec, model: str, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Any]]:
    folder, ranks = tmp_path_factory.mktemp("ranks"), request.param
    with suppress(ValueError):
        multiprocessing.set_forkserver_preload(["pipelines.train.loop", "transformers.models.clip.modeling_clip"])
    arguments = (ranks, str(folder / "rendezvous"), str(folder), model, spec)
    mp.start_processes(_worker, arguments, nprocs=ranks, start_method="forkserver")
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(ranks)]


@pytest.mark.parametrize("kind", Parallelism)
def test_ranks_find_what_one_process_finds(
    kind: Parallelism, computed: list[dict[str, Any]], alone: dict[str, float], spec: EvaluationSpec, model: str
) -> None:
    with torch.no_grad():
        of_few = Evaluator(limited(spec, FEW), Ranks(torch.device("cpu")))(load_bundle(model).towers)
    for rank in computed:
        found, few = rank[f"found {kind}"]
        assert found == pytest.approx(alone, rel=1e-4, abs=1e-6)
        assert few == pytest.approx(of_few, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("kind", Parallelism)
def test_training_goes_on_as_if_nothing_had_been_measured(kind: Parallelism, computed: list[dict[str, Any]]) -> None:
    for rank in computed:
        assert torch.equal(rank[f"weights {kind}"], rank[f"untouched {kind}"])


def test_what_ends_one_rank_ends_all(computed: list[dict[str, Any]]) -> None:
    words = [rank["ended"] for rank in computed]
    assert words.pop(1) == "OSError: the disk is gone"
    assert set(words) == {"OtherRankError: evaluation stopped on rank 1: OSError: the disk is gone"}
