"""`mm train RECIPE --dry-run --gpus N`: memory, work, messages and time of a step on GPUs that are not here.

Work and activations are counted on the meta device (`mm_core.training.cost`); what a GPU does in a second is its data sheet's, times
the share of it that training is taken to reach. So ratios between settings are better than the times themselves.
"""

from __future__ import annotations

from typing import Any

from mm_core.data.plan import chunks_per_step
from mm_core.training.cost import SampleCost
from mm_core.training.gpus import gpu_named
from mm_core.training.parallel import Parallelism
from pipelines.train.config import TrainRun
from pipelines.train.cost import FP32, TeacherCost, cost_of, state_bytes, teacher_cost
from pipelines.train.parts import check_parts, contrasts
from pipelines.train.preflight import check_parallel, with_sources

_BF16 = 2
_RESERVED_BYTES = 2.0e9
"""The CUDA context, NCCL's buffers and what the allocator loses in fragments."""


def describe_scale(run: TrainRun, gpus: int, gpu_type: str, *, mfu: float = 0.3) -> dict[str, Any]:
    """What a step costs on `gpus` GPUs of a type.

    Args:
        mfu: share of the data sheet's operations that the model's own forward and backward pass reach while they compute.

    Raises:
        ConfigError: a type that is not known, a batch, towers or a division among ranks that do not fit.
    """
    run = with_sources(run)
    check_parallel(run, gpus)
    check_parts(run)
    gpu, chunks = gpu_named(gpu_type), chunks_per_step(run.global_batch_size, run.data.chunk, gpus)
    cost = cost_of(run, checkpointing=run.parallel.activation_checkpointing)
    rank_batch = -(-chunks // gpus) * run.data.chunk
    at_a_time = min(rank_batch, run.parallel.micro_batch_size or rank_batch)
    teacher = teacher_cost(run)
    memory = _memory(run, cost, teacher, gpus, at_a_time)
    flops = _flops(run, cost, teacher, rank_batch, at_a_time)
    sent = _sent(run, cost, gpus, rank_batch, at_a_time)
    compute_s = sum(flops.values()) / (gpu.bf16_flops * mfu)
    overlapped_s, exposed_s = (sent[kind] / gpu.network_bytes_per_s for kind in ("weights_and_gradients", "features"))
    step_s = max(compute_s, overlapped_s) + exposed_s
    spare = gpu.memory_bytes - sum(memory.values()) + memory["activations"]
    return {
        "gpus": gpus,
        "gpu_type": gpu_type,
        "samples_per_gpu": rank_batch,
        **{f"memory_gb_{part}": round(size / 1e9, 2) for part, size in memory.items()},
        "memory_gb": round(sum(memory.values()) / 1e9, 1),
        "fits": sum(memory.values()) <= gpu.memory_bytes,
        "max_micro_batch_size": max(0, int(spare // cost.activation_bytes)),
        **{f"tflop_{part}": round(work / 1e12, 2) for part, work in flops.items()},
        **{f"sent_mb_{part}": round(size / 1e6, 1) for part, size in sent.items()},
        "step_s": round(step_s, 3),
        "communication_fraction": round(1 - compute_s / step_s, 3),
        "samples_per_s": round(run.global_batch_size / step_s),
        "samples_per_s_per_gpu": round(run.global_batch_size / step_s / gpus, 1),
        "days": round(run.steps * step_s / 86_400, 2),
    }


def _memory(run: TrainRun, cost: SampleCost, teacher: TeacherCost, gpus: int, at_a_time: int) -> dict[str, float]:
    """Bytes of one GPU, by part."""
    sharded = run.parallel.kind is Parallelism.FSDP
    divided = gpus if sharded else 1
    state = {part: size / divided for part, size in state_bytes(run, cost).items()}
    similarities = {"features_of_all": 2 * _feature_bytes(run), "similarities": 3 * (run.parallel.logit_block_mb << 20)}
    return {
        **state,
        "weights": state["weights"] + (2 * cost.block_parameters * FP32 if sharded else 0),
        "weights_in_bf16": cost.trained_parameters * _BF16 if not sharded else 2 * cost.block_parameters * _BF16,
        **({"teacher": teacher.bytes} if teacher.bytes else {}),
        "activations": at_a_time * cost.activation_bytes,
        **(similarities if contrasts(run) else {}),
        "reserved": _RESERVED_BYTES,
    }


def _flops(run: TrainRun, cost: SampleCost, teacher: TeacherCost, rank_batch: int, at_a_time: int) -> dict[str, float]:
    """Operations of one GPU and step."""
    twice = at_a_time < rank_batch  # pieces go through forward a second time
    texts = run.global_batch_size * run.data.captions
    # Once again in backward, and two products.
    similarities = 4 * 2 * 2 * rank_batch * run.data.augment.views * texts * run.joint_model.embed_dim
    return {
        "forward": rank_batch * cost.forward_flops * (2 if twice else 1),
        "backward": rank_batch * cost.backward_flops,
        **({"teacher": rank_batch * teacher.flops} if teacher.flops else {}),
        **({"similarities": float(similarities)} if contrasts(run) else {}),
    }


def _sent(run: TrainRun, cost: SampleCost, gpus: int, rank_batch: int, at_a_time: int) -> dict[str, float]:
    """Bytes that one GPU sends in a step, by rings: an all-gather and a reduce-scatter each send (n - 1)/n of the whole."""
    share, weights, trained = (gpus - 1) / gpus, cost.parameters * FP32, cost.trained_parameters * FP32
    pieces = -(-rank_batch // at_a_time)
    forwards = pieces * (2 if pieces > 1 else 1)
    state = {
        Parallelism.DDP: 2 * trained,  # one all-reduce
        Parallelism.FSDP: forwards * weights + pieces * 2 * trained,  # gathered in each pass, and gradients scattered
    }[run.parallel.kind]
    return {"weights_and_gradients": share * state, "features": 2 * share * _feature_bytes(run)}


def _feature_bytes(run: TrainRun) -> float:
    """Of the global batch, where its features are compared."""
    if not contrasts(run):
        return 0.0
    return run.global_batch_size * run.joint_model.embed_dim * FP32 * (run.data.augment.views + run.data.captions)
