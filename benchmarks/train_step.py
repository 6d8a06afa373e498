"""A training step of mm beside the plain transformers one, and open_clip's where it is installed: samples/s, MFU, memory.

Needs torch, transformers and mm_core (and torchao for fp8), no Ray: it runs on a bare GPU machine. Batches are made up and lie on the
device. All sides have the same sizes, a fused AdamW and, where the device computes in it, bf16 autocast; ours also clips the gradient and
has its loss over all ranks. Runs of the sides alternate. Under `torchrun --nproc-per-node N` it takes N ranks. One JSON line.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
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
from mm_core.training.precision import Precision, autocast, prepare_blocks
from mm_core.training.step import TrainStep

MODELS: dict[str, Callable[[], ModelConfig]] = {
    "clip-tiny": clip.clip_tiny,
    "siglip-tiny": siglip.siglip_tiny,
    "clip-vit-b32": clip.clip_vit_b32,
    "clip-vit-b16": clip.clip_vit_b16,
    "clip-vit-l14": clip.clip_vit_l14,
    "siglip-vit-b16": siglip.siglip_vit_b16,
}
OPEN_CLIP = {
    "clip-vit-b32": "ViT-B-32-quickgelu",
    "clip-vit-b16": "ViT-B-16-quickgelu",
    "clip-vit-l14": "ViT-L-14-quickgelu",
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


@dataclasses.dataclass(frozen=True)
class Setting:
    """What a step is measured with."""

    name: str
    config: ModelConfig
    device: torch.device
    options: argparse.Namespace

    @property
    def sigmoid(self) -> bool:
        return self.config.family == "siglip"


def ours(setting: Setting, batch: ImageTextBatch, *, compiled: bool = False, precision: Precision | None = None) -> Step:
    config, device, options = setting.config, setting.device, setting.options
    precision = precision or options.precision
    model = TwoTower(build_model(config, tokens_of(config)), mean=config.image_mean, std=config.image_std)
    model.attend_for(device)
    if compiled:
        model.compile_blocks()
    if options.checkpointing:
        model.checkpoint_activations()
    model.to(device)
    prepare_blocks(model.blocks(), precision, device)
    clock, ranks = StepClock(device), dist.get_world_size()
    parallel = parallelise(model, options.parallel, device, clock, blocks=model.blocks())
    optimizer = OptimizerConfig(lr=_LR)
    step = TrainStep(
        parallel,
        build_objective(
            ObjectiveConfig(kind=ObjectiveKind.SIGMOID if setting.sigmoid else ObjectiveKind.CONTRASTIVE), rank=dist.get_rank()
        ),
        build_optimizer(model, optimizer, blocks=model.blocks()),
        optimizer_config=optimizer,
        schedule=ScheduleConfig(),
        total_steps=1 << 30,
        counts=[len(batch.images)] * ranks,
        device=device,
        precision=precision,
        clock=clock,
        micro_batch_size=options.micro_batch,
    )

    def run() -> None:
        step(batch, 0)

    return run


def of_transformers(setting: Setting, batch: ImageTextBatch) -> Step:
    """transformers' own forward and loss, over this rank's batch."""
    model = build_model(setting.config, tokens_of(setting.config)).to(setting.device)
    if setting.device.type == "cpu":  # as ours
        model.set_attn_implementation("eager")
    if setting.options.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    wrapped: Any = model if dist.get_world_size() == 1 else torch.nn.parallel.DistributedDataParallel(model)
    return _training(setting, wrapped, lambda: wrapped(**_inputs(setting.config, batch), return_loss=True).loss)


def _inputs(config: ModelConfig, batch: ImageTextBatch) -> dict[str, Tensor]:
    mean, std = (torch.tensor(values, device=batch.images.device) for values in (config.image_mean, config.image_std))
    pixels = ((batch.images[:, 0].float() / 255 - mean) / std).permute(0, 3, 1, 2)
    return {"pixel_values": pixels, "input_ids": batch.input_ids[:, 0]}


def of_open_clip(setting: Setting, batch: ImageTextBatch, *, compiled: bool = False) -> Step | None:
    """None where it is not installed, has no such model, or there are several ranks. Compiled as its `--torchcompile` does it."""
    try:
        import open_clip
    except ImportError:
        return None
    if setting.name not in OPEN_CLIP or dist.get_world_size() > 1:
        return None
    original = open_clip.create_model(OPEN_CLIP[setting.name], output_dict=True).to(setting.device).train()
    if setting.options.checkpointing:
        original.set_grad_checkpointing()
    model = torch.compile(original) if compiled else original
    loss = open_clip.loss.SigLipLoss() if setting.sigmoid else open_clip.loss.ClipLoss()

    def loss_of() -> Tensor:
        inputs = _inputs(setting.config, batch)  # normalising is part of the step on every side
        found: Tensor = loss(**model(inputs["pixel_values"], inputs["input_ids"]))
        return found

    return _training(setting, model, loss_of)


def _training(setting: Setting, model: Any, loss_of: Callable[[], Tensor]) -> Step:
    optimizer = torch.optim.AdamW(model.parameters(), lr=_LR, fused=True)

    def run() -> None:
        optimizer.zero_grad(set_to_none=True)
        with autocast(setting.options.precision, setting.device):
            loss = loss_of()
        loss.backward()
        optimizer.step()

    return run


SIDES: dict[str, Callable[[Setting, ImageTextBatch], Step | None]] = {
    "mm": ours,
    "mm_compiled": partial(ours, compiled=True),
    "mm_residual_compiled": partial(ours, compiled=True, precision=Precision.BF16_RESIDUAL),
    "mm_fp8_compiled": partial(ours, compiled=True, precision=Precision.FP8),
    "transformers": of_transformers,
    "open_clip": of_open_clip,
    "open_clip_compiled": partial(of_open_clip, compiled=True),
}


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


class Side:
    """One way to take a step, warmed up, so that it is compiled and its state allocated."""

    def __init__(self, name: str, setting: Setting, batch: ImageTextBatch) -> None:
        self.device, self.seconds, self._others = setting.device, list[float](), _allocated(setting.device)
        self.step = SIDES[name](setting, batch)
        self.steps = 1
        if self.step is not None:
            timed(self.step, 2, self.device)
            self.steps = max(1, round(setting.options.seconds / timed(self.step, 2, self.device)))

    def run(self) -> None:
        assert self.step is not None
        self.seconds.append(timed(self.step, self.steps, self.device))

    def memory(self) -> int:
        """Bytes at most in a step, those that the other sides hold left out."""
        assert self.step is not None
        own = max(0, _allocated(self.device) - self._others)
        torch.cuda.reset_peak_memory_stats(self.device)
        before = _allocated(self.device)
        timed(self.step, 1, self.device)
        return own + torch.cuda.max_memory_allocated(self.device) - before


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def _say(**found: Any) -> None:
    """At once, on standard error: a run that is cut short has told what it knew."""
    if dist.get_rank() == 0:
        print(json.dumps(found), file=sys.stderr, flush=True)


def measure(name: str, samples: int, device: torch.device, options: argparse.Namespace) -> dict[str, Any]:
    torch._dynamo.reset()  # each size is compiled as the only one
    setting = Setting(name, MODELS[name](), device, options)
    batch = batch_of(setting.config, samples, device)
    row: dict[str, Any] = {"model": name, "samples_per_rank": samples}
    sides: dict[str, Side] = {}
    for side in options.sides:
        made = Side(side, setting, batch)
        if made.step is not None:
            sides[side] = made
            if device.type == "cuda":
                row[f"{side}_gb"] = round(made.memory() / 1e9, 1)
            made.run()
            _say(model=name, side=side, samples_per_rank=samples, seconds_a_step=round(made.seconds[0], 5))
    for _ in range(options.runs - 1):
        for made in sides.values():
            made.run()
    ranks, gpu = dist.get_world_size(), gpu_of(device)
    cost = sample_cost(setting.config)
    for side, made in sides.items():
        rate = samples * ranks / statistics.median(made.seconds)
        row[f"{side}_samples_per_s"] = round(rate, 1)
        if gpu is not None:
            row[f"{side}_mfu"] = round(mfu(rate, cost.forward_flops + cost.backward_flops, gpu, ranks), 3)
    first = next(iter(sides))
    for side, made in sides.items():
        if side != first:
            row[f"{side}_over_{first}"] = [round(a / b, 3) for a, b in zip(sides[first].seconds, made.seconds, strict=True)]
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--batches", nargs="+", type=int, default=[256, 512, 1024], help="Samples of a rank.")
    parser.add_argument(
        "--sides", nargs="+", choices=list(SIDES), default=[side for side in SIDES if "fp8" not in side and "residual" not in side]
    )
    parser.add_argument("--seconds", type=float, default=2.0, help="Of a run.")
    parser.add_argument("--runs", type=int, default=5, help="Of each side.")
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
                _say(**rows[-1])
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
