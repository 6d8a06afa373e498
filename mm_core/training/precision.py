"""In which numbers a model computes. Weights, gradients and the optimiser's state are fp32 throughout."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from enum import StrEnum
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from mm_core.errors import ConfigError

FP8_CAPABILITY = (8, 9)
"""CUDA compute capability from which tensor cores multiply fp8: Ada, Hopper and later."""
_RECIPE = "rowwise_with_gw_hp"
"""torchao's: gradients of weights stay bf16, so that any number of samples will do."""
_MULTIPLE = 16
"""fp8 kernels take matrices whose sides are multiples of it."""


class Precision(StrEnum):
    AUTO = "auto"
    """bf16 where the device computes in it, else fp32."""
    FP32 = "fp32"
    BF16 = "bf16"
    """autocast: bf16 matrix products, fp32 weights and reductions."""
    BF16_RESIDUAL = "bf16_residual"
    """bf16, and what one block hands to the next in it too: less memory traffic, but what the blocks add up is rounded each time."""
    FP8 = "fp8"
    """bf16, and in the blocks' linear layers fp8 products, each row and column with a scale of its own."""


def autocast(precision: Precision, device: torch.device) -> AbstractContextManager[object]:
    """Around forward.

    Raises:
        ConfigError: the device does not compute so.
    """
    return torch.autocast(device.type, torch.bfloat16) if _uses_bf16(precision, device) else nullcontext()


def prepare_blocks(blocks: Sequence[nn.Module], precision: Precision, device: torch.device) -> None:
    """What a precision takes beside `autocast`, before the model is divided among ranks. Names and types of the weights stay.

    Raises:
        ConfigError: fp8 on a device that does not multiply it, or without torchao.
    """
    if precision is Precision.BF16_RESIDUAL:
        for block in blocks:
            block.register_forward_pre_hook(_in_bf16)
    elif precision is Precision.FP8:
        if device.type != "cuda" or torch.cuda.get_device_capability(device) < FP8_CAPABILITY:
            name = torch.cuda.get_device_name(device) if device.type == "cuda" else "a processor"
            raise ConfigError(f"precision=fp8, but {name} does not multiply fp8 (GPUs from Ada and Hopper on do); set precision=bf16")
        check_fp8_installed()
        convert_to_fp8(blocks)


def _in_bf16(block: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    hidden, *others = inputs
    return (hidden.to(torch.bfloat16), *others)


def check_fp8_installed() -> None:
    """
    Raises:
        ConfigError: fp8 needs torchao.
    """
    if find_spec("torchao") is None:
        raise ConfigError("precision=fp8 needs torchao: pip install 'mm-pretrain[fp8]', or set precision=bf16")


def convert_to_fp8(blocks: Sequence[nn.Module], *, emulate: bool = False) -> None:
    """
    Args:
        emulate: round as fp8 does, but multiply in fp32, on any device.
    """
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    config = replace(Float8LinearConfig.from_recipe_name(_RECIPE), emulate=emulate)
    for block in blocks:
        convert_to_float8_training(block, module_filter_fn=_fits_fp8, config=config)


def _fits_fp8(module: nn.Module, name: str) -> bool:
    return isinstance(module, nn.Linear) and module.in_features % _MULTIPLE == 0 and module.out_features % _MULTIPLE == 0


def _uses_bf16(precision: Precision, device: torch.device) -> bool:
    supported = _computes_bf16(device)
    if precision is Precision.BF16 and not supported and device.type == "cuda":
        raise ConfigError("precision=bf16, but this GPU has no bfloat16; set precision=fp32")
    return supported if precision is Precision.AUTO else precision is not Precision.FP32


def _computes_bf16(device: torch.device) -> bool:
    """GPUs from Ampere on; CPUs with AVX512-BF16 or AMX, where it is 1.6 times as fast (elsewhere it is emulated, and slower)."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()  # new in 2.12
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
