"""A FLAVA training step of mm beside `FlavaForPreTraining` as it comes: pairs/s, step time, peak memory, for each kind of step.

Needs torch, transformers and mm_core, no Ray: it runs on a bare GPU machine. Batches are made up and lie on the device. All sides have
the same sizes, the same masks, a fused AdamW and the same precision. transformers leaves negatives of image-text matching to its caller:
`plain` has none, so that its matching loss has one class; `negatives` adds as many mismatched pairs as there are pairs, which is what a
step of mm comes to: mm encodes each image once for both. Runs of the sides alternate. One JSON line.
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

from mm_core.distributed import GlobalBatch
from mm_core.models.codebook import codebook_pixels
from mm_core.models.family import build_model
from mm_core.models.flava import FlavaConfig, flava_base, flava_tiny
from mm_core.models.fused import Fused
from mm_core.models.fused_batch import FusedBatch, ImageBatch, MaskedImages, MaskedTexts, PairBatch, TextBatch
from mm_core.models.sizes import SpecialTokens
from mm_core.models.two_tower import normalise
from mm_core.objectives.multitask import MultitaskConfig, MultitaskObjective
from mm_core.optim import OptimizerConfig, build_optimizer
from mm_core.schedule import ScheduleConfig
from mm_core.training.clock import StepClock
from mm_core.training.parallel import Parallelism, parallelise
from mm_core.training.precision import Precision, autocast
from mm_core.training.step import TrainStep

MODELS: dict[str, Callable[[], FlavaConfig]] = {"flava-tiny": flava_tiny, "flava-base": flava_base}
STEPS = ("pairs", "images", "texts")
_LR = 1e-5
_IGNORED = -100

Step = Callable[[], object]


def tokens_of(config: FlavaConfig) -> SpecialTokens:
    return SpecialTokens(bos=1, eos=config.vocab_size - 1, pad=0)


def batch_of(config: FlavaConfig, samples: int, device: torch.device) -> PairBatch:
    """Two fifths of the patches and a seventh of the words masked; texts from half as long as they may be."""
    mask = torch.rand(samples, config.patches, device=device) < 0.4
    shape = (samples, config.context_length)
    ids = torch.randint(2, config.vocab_size - 1, shape, device=device)
    length = torch.randint(config.context_length // 2, config.context_length + 1, (samples, 1), device=device)
    is_text = torch.arange(config.context_length, device=device) < length
    ids = torch.where(is_text, ids, 0)
    hidden = (torch.rand(shape, device=device) < 0.15) & is_text
    pixels = torch.randint(0, 256, (samples, config.image_size, config.image_size, 3), dtype=torch.uint8, device=device)
    return PairBatch(
        MaskedImages(pixels, mask, mask.flatten().nonzero()[:, 0]),
        MaskedTexts(ids, torch.where(hidden, 1, ids), hidden.flatten().nonzero()[:, 0]),
        torch.rand(samples, device=device),
        GlobalBatch((samples,)),
    )


def ours(
    config: FlavaConfig, batch: FusedBatch, samples: int, device: torch.device, options: argparse.Namespace, *, compiled: bool = False
) -> Step:
    model = Fused(build_model(config, tokens_of(config)), mean=config.image_mean, std=config.image_std)
    model.attend_for(device)
    if compiled:
        model.compile_blocks()
    if options.checkpointing:
        model.checkpoint_activations()
    clock, optimizer = StepClock(device), OptimizerConfig(lr=_LR)
    step = TrainStep(
        parallelise(model, Parallelism.DDP, device, clock, blocks=model.blocks(), in_parts=model.trains_in_parts),
        MultitaskObjective(MultitaskConfig()),
        build_optimizer(model, optimizer),
        optimizer_config=optimizer,
        schedule=ScheduleConfig(),
        total_steps=1 << 30,
        counts=[samples],
        device=device,
        precision=options.precision,
        clock=clock,
    )
    return lambda: step(batch, 0)


def theirs(config: FlavaConfig, inputs: dict[str, Tensor], device: torch.device, options: argparse.Namespace) -> Step:
    """transformers' own forward, as it comes."""
    model = build_model(config, tokens_of(config)).to(device).train()
    if options.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=_LR, fused=True)

    def run() -> None:
        optimizer.zero_grad(set_to_none=True)
        with autocast(options.precision, device):
            loss = model(**inputs, return_loss=True).loss
        loss.backward()
        optimizer.step()

    return run


def inputs_of(config: FlavaConfig, batch: PairBatch, step: str, negatives: bool) -> dict[str, Tensor]:
    """The same batch as transformers takes it; with `negatives` each image once more, with the text of another."""
    images, texts = batch.images, batch.texts
    mean, std = (torch.tensor(values, device=images.mask.device) for values in (config.image_mean, config.image_std))
    labels = torch.full_like(texts.input_ids, _IGNORED)
    labels.view(-1)[texts.rows] = texts.input_ids.view(-1)[texts.rows]
    image = {
        "pixel_values": normalise(images.pixels, mean, std).contiguous(),
        "codebook_pixel_values": codebook_pixels(images.pixels, config.codebook_size),
        "bool_masked_pos": images.mask,
    }
    text = {
        "input_ids": texts.input_ids,
        "input_ids_masked": texts.masked_ids,
        "attention_mask": (texts.input_ids != 0).long(),
        "mlm_labels": labels,
    }
    if step != "pairs":
        return image if step == "images" else text
    if negatives:
        image = {name: torch.cat([tensor, tensor]) for name, tensor in image.items()}
        text = {name: torch.cat([tensor, tensor.roll(1, 0)]) for name, tensor in text.items()}
    count = len(images.pixels)
    itm = torch.ones(len(image["pixel_values"]), dtype=torch.long, device=labels.device)
    itm[count:] = 0
    return image | text | {"itm_labels": itm}


def timed(step: Step, steps: int, device: torch.device) -> float:
    """Seconds a step."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    for _ in range(steps):
        step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - began) / steps


def allocated(device: torch.device) -> int:
    """Bytes; on a processor none are counted."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def measure(name: str, step: str, samples: int, device: torch.device, options: argparse.Namespace) -> dict[str, Any]:
    """Sides are warmed up and timed in turn; peak memory is of each side's own steps, without what the others hold meanwhile."""
    config = MODELS[name]()
    batch = batch_of(config, samples, device)
    kinds: dict[str, FusedBatch] = {
        "pairs": batch,
        "images": ImageBatch(batch.images, batch.whole),
        "texts": TextBatch(batch.texts, batch.whole),
    }
    makers: dict[str, Callable[[], Step]] = {
        "mm": lambda: ours(config, kinds[step], samples, device, options),
        "mm_compiled": lambda: ours(config, kinds[step], samples, device, options, compiled=True),
        "plain": lambda: theirs(config, inputs_of(config, batch, step, False), device, options),
    }
    if step == "pairs":
        makers["negatives"] = lambda: theirs(config, inputs_of(config, batch, step, True), device, options)
    sides, held = dict[str, Step](), dict[str, int]()
    for side, make in makers.items():
        before = allocated(device)
        sides[side] = make()
        held[side] = allocated(device) - before
    row: dict[str, Any] = {"model": name, "step": step, "samples": samples}
    found: dict[str, list[float]] = {side: [] for side in sides}
    for run in range(options.runs + 1):
        for side in [*found]:
            others = allocated(device) - held[side]
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            try:
                seconds = timed(sides[side], options.steps, device)
            except torch.OutOfMemoryError:
                row[f"{side}_out_of_memory"] = True
                del found[side], sides[side]
                gc.collect()
                torch.cuda.empty_cache()
                continue
            if run:
                found[side].append(seconds)
            if device.type == "cuda":
                held[side] = allocated(device) - others
                row[f"{side}_peak_gb"] = round((torch.cuda.max_memory_allocated(device) - others) / 1e9, 2)
    for side, seconds_of in found.items():
        row[f"{side}_ms"] = round(1e3 * statistics.median(seconds_of), 2)
        row[f"{side}_samples_per_s"] = round(samples / statistics.median(seconds_of), 1)
        if side != "mm" and "mm" in found:
            row[f"ratio_to_{side}"] = round(statistics.median(b / a for a, b in zip(found["mm"], seconds_of, strict=True)), 3)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=["flava-base"])
    parser.add_argument("--kinds", nargs="+", choices=STEPS, default=list(STEPS))
    parser.add_argument("--batches", nargs="+", type=int, default=[64, 128], help="Samples of a step.")
    parser.add_argument("--steps", type=int, default=10, help="Of a run.")
    parser.add_argument("--runs", type=int, default=5, help="Of each side, and one more that warms up.")
    parser.add_argument("--precision", type=Precision, choices=list(Precision), default=Precision.AUTO)
    parser.add_argument("--checkpointing", action="store_true")
    options = parser.parse_args()
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cpu":
        torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, init_method=f"file://{folder}/rendezvous", rank=0, world_size=1)
        for name in options.models:
            for step in options.kinds:
                for samples in options.batches:
                    torch.manual_seed(0)
                    rows.append(measure(name, step, samples, device, options))
                    gc.collect()
                    if device.type == "cuda":
                        torch.cuda.empty_cache()
        dist.destroy_process_group()
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{os.cpu_count()} CPUs, one thread"
    how = {"precision": options.precision, "checkpointing": options.checkpointing}
    print(json.dumps({"benchmark": "flava_step", "device": where, "torch": torch.__version__} | how | {"rows": rows}))


if __name__ == "__main__":
    main()
