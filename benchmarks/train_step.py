"""A training step of mm beside the plain transformers one, and open_clip's where it is installed: samples/s, MFU, peak memory.

Needs torch, transformers and mm_core, no Ray: it runs on a bare GPU machine. Batches are made up and lie on the device. All sides have the
same sizes, a fused AdamW and, where the device computes in it, bf16 autocast; ours also clips the gradient and has its loss over all
ranks. Runs of the sides alternate. `torchrun --nproc-per-node N benchmarks/train_step.py` takes N ranks. One JSON line.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mm_core.models import clip, siglip
from mm_core.models.family import ModelConfig, build_model
from mm_core.models.sizes import SpecialTokens
from mm_core.models.two_tower import ImageTextBatch, TwoTower
from mm_core.objectives.config import ObjectiveConfig, ObjectiveKind
from mm_core.objectives.contrastive import build_objective
from mm_core.optim import OptimizerConfig, build_optimizer
from mm_core.schedule import ScheduleConfig
from mm_core.training.clock import StepClock
from mm_core.training.cost import sample_cost
from mm_core.training.gpus import gpu_of, mfu
from mm_core.training.parallel import Parallelism, parallelise
from mm_core.training.step import Precision, TrainStep, evaluation_autocast

MODELS: dict[str, Callable[[], ModelConfig]] = {
    "clip-tiny": clip.clip_tiny,
    "siglip-tiny": siglip.siglip_tiny,
    "clip-vit-b32": clip.clip_vit_b32,
    "clip-vit-b16": clip.clip_vit_b16,
    "clip-vit-l14": clip.clip_vit_l14,
    "siglip-vit-b16": siglip.siglip_vit_b16,
}
OPEN_CLIP = {
    "clip-vit-b32": "ViT-B-32",
    "clip-vit-b16": "ViT-B-16",
    "clip-vit-l14": "ViT-L-14",
    "siglip-vit-b16": "ViT-B-16-SigLIP",
}
_LR = 1e-5

Step = Callable[[], object]


def tokens_of(config: ModelConfig) -> SpecialTokens:
    return SpecialTokens(bos=0, eos=config.vocab_size - 1, pad=1)


def batch_of(config: ModelConfig, samples: int, device: torch.device) -> ImageTextBatch:
    images = torch.randint(0, 256, (samples, 1, config.image_size, config.image_size, 3), dtype=torch.uint8, device=device)
    input_ids = torch.randint(2, config.vocab_size - 1, (samples, 1, config.context_length), device=device)
    input_ids[..., -1] = config.vocab_size - 1
    return ImageTextBatch(images, input_ids)


def ours(config: ModelConfig, batch: ImageTextBatch, device: torch.device, options: argparse.Namespace) -> Step:
    model = TwoTower(build_model(config, tokens_of(config)), mean=config.image_mean, std=config.image_std)
    model.attend_for(device)
    if options.checkpointing:
        model.checkpoint_activations()
    clock, ranks = StepClock(device), dist.get_world_size()
    parallel = parallelise(model, options.parallel, device, clock, blocks=model.blocks())
    kind = ObjectiveKind.SIGMOID if config.family == "siglip" else ObjectiveKind.CONTRASTIVE
    optimizer = OptimizerConfig(lr=_LR)
    step = TrainStep(
        parallel,
        build_objective(ObjectiveConfig(kind=kind), rank=dist.get_rank()),
        build_optimizer(model, optimizer, blocks=model.blocks()),
        optimizer_config=optimizer,
        schedule=ScheduleConfig(),
        total_steps=1 << 30,
        counts=[len(batch.images)] * ranks,
        device=device,
        precision=options.precision,
        clock=clock,
        micro_batch_size=options.micro_batch,
    )

    def run() -> None:
        step(batch, 0)

    return run


def plain(config: ModelConfig, batch: ImageTextBatch, device: torch.device, options: argparse.Namespace) -> Step:
    """transformers' own forward and loss, over this rank's batch."""
    model = build_model(config, tokens_of(config)).to(device)
    if device.type == "cpu":  # as ours
        model.set_attn_implementation("eager")
    if options.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    wrapped: Any = model if dist.get_world_size() == 1 else torch.nn.parallel.DistributedDataParallel(model)
    return _training(wrapped, lambda: wrapped(**_inputs(config, batch), return_loss=True).loss, device, options)


def _inputs(config: ModelConfig, batch: ImageTextBatch) -> dict[str, Tensor]:
    mean, std = (torch.tensor(values, device=batch.images.device) for values in (config.image_mean, config.image_std))
    pixels = ((batch.images[:, 0].float() / 255 - mean) / std).permute(0, 3, 1, 2)
    return {"pixel_values": pixels, "input_ids": batch.input_ids[:, 0]}


def of_open_clip(name: str, config: ModelConfig, batch: ImageTextBatch, device: torch.device, options: argparse.Namespace) -> Step | None:
    """None where it is not installed, has no such model, or there are several ranks."""
    try:
        import open_clip  # type: ignore[import-not-found]
    except ImportError:
        return None
    if name not in OPEN_CLIP or dist.get_world_size() > 1:
        return None
    model = open_clip.create_model(OPEN_CLIP[name], output_dict=True).to(device).train()
    if options.checkpointing:
        model.set_grad_checkpointing()
    loss = open_clip.loss.SigLipLoss() if config.family == "siglip" else open_clip.loss.ClipLoss()
    inputs = _inputs(config, batch)
    return _training(model, lambda: loss(**model(inputs["pixel_values"], inputs["input_ids"])), device, options)


def _training(model: Any, loss_of: Callable[[], Tensor], device: torch.device, options: argparse.Namespace) -> Step:
    optimizer = torch.optim.AdamW(model.parameters(), lr=_LR, fused=True)

    def run() -> None:
        optimizer.zero_grad(set_to_none=True)
        with evaluation_autocast(options.precision, device):
            loss = loss_of()
        loss.backward()
        optimizer.step()

    return run


def timed(step: Step, steps: int, device: torch.device) -> float:
    """Seconds a step."""
    _wait(device)
    began = time.perf_counter()
    for _ in range(steps):
        step()
    _wait(device)
    return (time.perf_counter() - began) / steps


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(name: str, samples: int, device: torch.device, options: argparse.Namespace) -> dict[str, Any]:
    """Sides are warmed up and timed in turn; peak memory is of each side's own steps, everything that is held at the time included."""
    config = MODELS[name]()
    batch = batch_of(config, samples, device)
    sides: dict[str, Step | None] = {
        "mm": ours(config, batch, device, options),
        "transformers": plain(config, batch, device, options),
        "open_clip": of_open_clip(name, config, batch, device, options),
    }
    found: dict[str, list[float]] = {side: [] for side, step in sides.items() if step is not None}
    memory: dict[str, float] = {}
    for run in range(options.runs + 1):
        for side, step in sides.items():
            if step is None:
                continue
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            seconds = timed(step, options.steps, device)
            if run:
                found[side].append(seconds)
            if device.type == "cuda":
                memory[f"{side}_peak_gb"] = round(torch.cuda.max_memory_allocated(device) / 1e9, 2)
    ranks = dist.get_world_size()
    rates = {side: samples * ranks / statistics.median(seconds) for side, seconds in found.items()}
    cost, gpu = sample_cost(config), gpu_of(device)
    row: dict[str, Any] = {"model": name, "samples_per_rank": samples} | {f"{side}_samples_per_s": round(r, 1) for side, r in rates.items()}
    row["ratios"] = [round(b / a, 3) for a, b in zip(found["mm"], found["transformers"], strict=True)]
    row["ratio"] = round(statistics.median(row["ratios"]), 3)
    if gpu is not None:
        per_sample = cost.forward_flops + cost.backward_flops
        row |= {f"{side}_mfu": round(mfu(rate, per_sample, gpu, ranks), 3) for side, rate in rates.items()}
    return row | memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--batches", nargs="+", type=int, default=[256, 512, 1024], help="Samples of a rank.")
    parser.add_argument("--steps", type=int, default=10, help="Of a run.")
    parser.add_argument("--runs", type=int, default=5, help="Of each side, and one more that warms up.")
    parser.add_argument("--precision", type=Precision, choices=list(Precision), default=Precision.AUTO)
    parser.add_argument("--parallel", type=Parallelism, choices=list(Parallelism), default=Parallelism.DDP)
    parser.add_argument("--micro-batch", type=int)
    parser.add_argument("--checkpointing", action="store_true")
    options = parser.parse_args()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        backend = "nccl" if device.type == "cuda" else "gloo"
        if "RANK" in os.environ:  # of torchrun
            dist.init_process_group(backend)
        else:
            dist.init_process_group(backend, init_method=f"file://{folder}/rendezvous", rank=0, world_size=1)
        rows = []
        for name in options.models:
            for samples in options.batches:
                torch.manual_seed(0)
                try:
                    rows.append(measure(name, samples, device, options))
                except torch.OutOfMemoryError:
                    rows.append({"model": name, "samples_per_rank": samples, "out_of_memory": True})
                gc.collect()
                if device.type == "cuda":
                    torch.cuda.empty_cache()
        if dist.get_rank() == 0:
            where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{os.cpu_count()} CPUs, one thread a rank"
            how = {"precision": options.precision, "parallel": options.parallel, "ranks": dist.get_world_size()}
            print(json.dumps({"benchmark": "train_step", "device": where, "torch": torch.__version__} | how | {"rows": rows}))
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
