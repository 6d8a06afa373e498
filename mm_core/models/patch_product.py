"""The patches of an image as rows of a matrix product.

A vision transformer's first layer is a convolution whose kernel is as large as its stride: a product of every patch with one matrix. cuDNN
computes it ten times slower than the product, backward above all.
"""

from __future__ import annotations

from functools import partial
from typing import cast

from jaxtyping import Float
from torch import Tensor, nn


def multiply_patches(model: nn.Module) -> None:
    """From now on convolutions of `model` that cut an image into patches are products. Weights and results stay."""
    for module in model.modules():
        if _cuts_patches(module):
            module.forward = partial(_product, cast(nn.Conv2d, module))


def _cuts_patches(convolution: nn.Module) -> bool:
    if not isinstance(convolution, nn.Conv2d):
        return False
    plain = convolution.padding in ("valid", (0, 0)) and convolution.dilation == (1, 1) and convolution.groups == 1
    return plain and convolution.kernel_size == convolution.stride and convolution.kernel_size != (1, 1)


def _product(convolution: nn.Conv2d, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d i j"]:
    high, wide = convolution.kernel_size
    rows, columns = images.shape[2] // high, images.shape[3] // wide
    whole = images[:, :, : rows * high, : columns * wide]
    patches = whole.unflatten(2, (rows, high)).unflatten(4, (columns, wide)).permute(0, 2, 4, 1, 3, 5).flatten(3)
    return nn.functional.linear(patches, convolution.weight.flatten(1), convolution.bias).permute(0, 3, 1, 2)
