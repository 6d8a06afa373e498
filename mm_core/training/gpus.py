"""Data sheets of GPUs: what a model's share of their operations (MFU) is measured by, and what a step on GPUs that are not here is taken
from."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mm_core.config import nearest
from mm_core.errors import ConfigError


@dataclass(frozen=True)
class Gpu:
    """Dense bf16, and the network between nodes, of one GPU."""

    memory_bytes: float
    bf16_flops: float
    network_bytes_per_s: float


GPUS = {
    "a100-40": Gpu(40e9, 312e12, 25e9),
    "a100-80": Gpu(80e9, 312e12, 25e9),
    "h100": Gpu(80e9, 989e12, 50e9),
    "h200": Gpu(141e9, 989e12, 50e9),
}
"""NVIDIA's data sheets; a DGX has one 200 (A100) or 400 (H100, H200) Gb/s port for each GPU."""


def gpu_named(name: str) -> Gpu:
    """
    Raises:
        ConfigError: there is no data sheet of it here.
    """
    if name not in GPUS:
        raise ConfigError(f"--gpu-type {name!r} is not known{nearest(name, list(GPUS))}")
    return GPUS[name]


def gpu_of(device: torch.device) -> Gpu | None:
    """The data sheet of a device that is here; None of a processor, and of a GPU that is not listed."""
    return gpu_called(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def gpu_called(product: str) -> Gpu | None:
    """By the product's name, `NVIDIA A100-SXM4-80GB` say. The PCIe form of the H100 computes less, and is not listed."""
    words = product.lower().replace("-", " ").split()
    if "pcie" in words and "a100" not in words:
        return None
    for name, gpu in GPUS.items():
        model, _, memory = name.partition("-")
        if model in words and (not memory or f"{memory}gb" in words):
            return gpu
    return None


def mfu(samples_per_s: float, flops_per_sample: float, gpu: Gpu, gpus: int) -> float:
    """Model FLOPs utilisation (Chowdhery et al. 2022, arXiv 2204.02311, appendix B): what the model's own forward and backward pass take of
    the operations that the data sheets promise. What is computed a second time to save memory does not count."""
    return samples_per_s * flops_per_sample / (gpu.bf16_flops * gpus)
