"""The factor of the logits. CLIP and SigLIP learn its logarithm, `logit_scale`; ALIGN its inverse, `temperature`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

MAX_LOGIT_SCALE = 100.0
"""CLIP, section 2.5: the temperature is kept from scaling logits by more than 100. The least is 1."""


class ScaleParameter(NamedTuple):
    """What a model learns of the factor."""

    parameter: nn.Parameter
    factor: Callable[[Tensor], Tensor]
    """From the parameter to the factor."""
    bounds: tuple[float, float]
    """Of the parameter."""


_FORMS: dict[str, tuple[Callable[[Tensor], Tensor], tuple[float, float]]] = {
    "logit_scale": (torch.exp, (0.0, math.log(MAX_LOGIT_SCALE))),
    "temperature": (torch.reciprocal, (1 / MAX_LOGIT_SCALE, 1.0)),
}
"""By the parameter's name."""


def scale_parameter(model: nn.Module) -> ScaleParameter | None:
    """Of a model with two towers, wrapped or not; None of any other. It lies at the model's root, where the walk begins."""
    for name, parameter in model.named_parameters():
        if (form := _FORMS.get(name.rpartition(".")[2])) is not None:
            return ScaleParameter(parameter, *form)
    return None


def clamp_logit_scale(model: nn.Module) -> None:
    """Keep the factor within [1, 100], in place, where there is one."""
    found = scale_parameter(model)
    if found is None:
        return
    with torch.no_grad():
        found.parameter.clamp_(*found.bounds)
