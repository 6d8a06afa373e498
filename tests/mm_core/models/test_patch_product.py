"""A convolution that cuts patches, computed as a product: the same function of the same weights."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import nn

from mm_core.models.patch_product import multiply_patches


@pytest.mark.parametrize("size", [(24, 16), (27, 17)], ids=["whole", "a rest is left over"])
@pytest.mark.parametrize("bias", [True, False])
def test_patches_are_what_the_convolution_makes_of_them(size: tuple[int, int], bias: bool) -> None:
    convolution = nn.Conv2d(3, 5, kernel_size=8, stride=8, bias=bias, dtype=torch.float64)
    product = deepcopy(convolution)
    multiply_patches(product)
    images = torch.randn(2, *size, 3, dtype=torch.float64).permute(0, 3, 1, 2)
    for module in (convolution, product):
        (module(images) ** 2).sum().backward()
    torch.testing.assert_close(product(images), convolution(images), rtol=1e-12, atol=1e-12)
    for expected, found in zip(convolution.parameters(), product.parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("settings", [{"stride": 2}, {"stride": 4, "padding": 1}, {"stride": 4, "groups": 3}, {"stride": 4, "dilation": 2}])
def test_other_convolutions_stay(settings: dict[str, int]) -> None:
    convolution = nn.Conv2d(3, 6, kernel_size=4, **settings)  # type: ignore[arg-type]
    multiply_patches(convolution)
    assert "forward" not in vars(convolution)
