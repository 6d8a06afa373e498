"""Samples/s of mm's training loop against a bare PyTorch loop, on the same model and the same batches in memory.

    python benchmarks/train_overhead.py [--recipe clip-tiny] [--steps 40] [--runs 5]

One process, one thread, runs interleaved. Ours does all that the loop does at each step and logs every 10; the bare loop is
forward, loss, backward, clipping, AdamW and nothing else. Prints one JSON line with the medians and their ratio.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import torch
import torch.distributed as dist

from mm_core.models.family import build_model
from mm_core.models.logit_scale import clamp_logit_scale
from mm_core.models.sizes import SpecialTokens
from mm_core.models.two_tower import ImageTextBatch, TwoTower
from mm_core.objectives.config import ObjectiveConfig
from mm_core.objectives.contrastive import build_objective
from mm_core.optim import build_optimizer
from mm_core.schedule import lr_at
from mm_core.training.clock import StepClock
from pipelines.batches import StepBatch
from pipelines.recipes import recipe
from pipelines.train.config import TrainRun
from pipelines.train.loop import LoopTools, build_step, run_steps

_BATCHES = 4
_TOKENS = SpecialTokens(bos=3, eos=4, pad=0)


def make_batches(run: TrainRun) -> list[StepBatch]:
    draw = np.random.default_rng(0)
    size, count, length = run.model.image_size, run.global_batch_size, run.joint_model.context_length
    batches = []
    for _ in range(_BATCHES):
        ids = draw.integers(5, run.joint_model.vocab_size, (count, 1, length), dtype=np.int32)
        ids[..., length // 2] = _TOKENS.eos
        rows = pa.table({"epoch": [0] * count, "uid": [str(i) for i in range(count)], "replaced": pa.array([None] * count, pa.string())})
        images = draw.integers(0, 256, (count, 1, size, size, 3), dtype=np.uint8)
        batches.append(StepBatch(0, images, ids, np.arange(count, dtype=np.uint64), rows))
    return batches


def fresh(run: TrainRun) -> TwoTower:
    torch.manual_seed(0)
    return TwoTower(build_model(run.model, _TOKENS))


def ours(run: TrainRun, batches: list[StepBatch]) -> float:
    step = build_step(run, fresh(run), StepClock(torch.device("cpu")))
    started = time.perf_counter()
    endless: Iterator[StepBatch] = itertools.cycle(batches)
    run_steps(run, step, endless, 0, LoopTools())
    return run.steps * run.global_batch_size / (time.perf_counter() - started)


def bare(run: TrainRun, batches: list[StepBatch]) -> float:
    model, objective = fresh(run), build_objective(ObjectiveConfig())
    model.attend_for(torch.device("cpu"))
    optimizer = build_optimizer(model, run.optimizer)
    inputs = [ImageTextBatch(torch.from_numpy(b.images), torch.from_numpy(b.input_ids).long()) for b in batches]
    bf16 = bool(torch.cpu.get_capabilities().get("avx512_bf16"))
    started = time.perf_counter()
    for step in range(run.steps):
        for group in optimizer.param_groups:
            group["lr"] = lr_at(run.schedule, run.optimizer.lr, step, run.steps)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            output = model(inputs[step % _BATCHES])
        loss = objective(output, inputs[step % _BATCHES], [run.global_batch_size]).total
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), run.optimizer.grad_clip_norm)
        optimizer.step()
        clamp_logit_scale(model)
    return run.steps * run.global_batch_size / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", default="clip-tiny")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--runs", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    run = recipe(arguments.recipe).model_copy(update={"steps": arguments.steps})
    batches = make_batches(run)
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=0, world_size=1)
        bare(run, batches)
        pairs = [(ours(run, batches), bare(run, batches)) for _ in range(arguments.runs)]
        dist.destroy_process_group()
    result = {
        "benchmark": "train_overhead",
        "recipe": run.recipe,
        "cpus": os.cpu_count(),
        "ours_samples_per_s": round(statistics.median(a for a, _ in pairs), 1),
        "bare_samples_per_s": round(statistics.median(b for _, b in pairs), 1),
        "ratio": round(statistics.median(a / b for a, b in pairs), 3),
        "ratios": [round(a / b, 3) for a, b in pairs],
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
