"""A GPU is known by the name that its driver gives, and its share of operations follows."""

from __future__ import annotations

import pytest
import torch

from mm_core.training.gpus import GPUS, gpu_called, gpu_of, mfu


@pytest.mark.parametrize(
    ("product", "name"),
    [
        ("NVIDIA A100-SXM4-40GB", "a100-40"),
        ("NVIDIA A100-SXM4-80GB", "a100-80"),
        ("NVIDIA A100 80GB PCIe", "a100-80"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
    ],
)
def test_products_by_name(product: str, name: str) -> None:
    assert gpu_called(product) is GPUS[name]


@pytest.mark.parametrize("product", ["NVIDIA H100 PCIe", "NVIDIA GeForce RTX 4090", "Tesla T4"])
def test_what_is_not_listed_has_no_share(product: str) -> None:
    assert gpu_called(product) is None


def test_a_processor_has_none() -> None:
    assert gpu_of(torch.device("cpu")) is None


def test_half_of_what_two_gpus_promise() -> None:
    assert mfu(2 * 989e12 / 2 / 1e9, 1e9, GPUS["h100"], 2) == pytest.approx(0.5)
