"""A classifier head on embeddings (unsafe content, watermarks, aesthetics): one linear layer, or several, out of a safetensors file.

A head's tensors are `weight` [out, in] and `bias` [out] of each layer, numbered as `nn.Sequential` numbers them, behind any one prefix:
`weight, bias`; `0.weight, 0.bias, 2.weight, …`; `layers.0.weight, …`. The numbers give the order alone: what stands between two layers is
not in the file, and is said by who uses it. Loaded without pickle, and only where the SHA-256 is the one expected.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from jaxtyping import Float32
from numpy.typing import NDArray

from mm_core.errors import DataError

_TENSOR = re.compile(r"(?P<stem>(?:.*?\.)??)(?:(?P<number>\d+)\.)?(?P<part>weight|bias)")
_LAYOUT = "a head has `weight` and `bias`, or `0.weight`, `0.bias`, `2.weight`, …, behind one prefix"
Layer = tuple[Float32[np.ndarray, "out in"], Float32[np.ndarray, " out"]]


class Between(StrEnum):
    """What stands between two layers."""

    RELU = "relu"
    IDENTITY = "identity"
    """As LAION's aesthetic predictor, whose layers have only dropout between them."""


class Output(StrEnum):
    """What is made of the last layer's numbers."""

    IDENTITY = "identity"
    SIGMOID = "sigmoid"


@dataclass(frozen=True)
class Head:
    """A loaded head."""

    layers: tuple[Layer, ...]

    @property
    def inputs(self) -> int:
        """The dimension of embeddings it takes."""
        return self.layers[0][0].shape[1]

    @property
    def outputs(self) -> int:
        return self.layers[-1][0].shape[0]

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of its scores."""
        return ("score",) if self.outputs == 1 else tuple(f"score_{i}" for i in range(self.outputs))

    def __call__(self, embeddings: Float32[np.ndarray, "n d"], between: Between, output: Output) -> Float32[np.ndarray, "n outputs"]:
        values = embeddings
        for number, (weight, bias) in enumerate(self.layers):
            if number and between is Between.RELU:
                values = np.maximum(values, 0)
            values = values @ weight.T + bias
        if output is Output.IDENTITY:
            return values
        return (1 / (1 + np.exp(-np.clip(values, -80, 80)))).astype(np.float32)


def read_head(data: bytes, sha256: str, name: str) -> Head:
    """The head in the bytes of a safetensors file.

    Raises:
        DataError: another digest, no safetensors, or tensors that are no layers one behind another.
    """
    if (found := hashlib.sha256(data).hexdigest()) != sha256.lower():
        raise DataError(f"{name} has SHA-256 {found}, not {sha256}: these are not the weights that were meant")
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        tensors = {key: tensor.float().numpy() for key, tensor in load(data).items()}
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{name} is no safetensors file ({error}); pickled weights are not read: convert them first") from None
    layers = _layers(tensors, name)
    for (weight, _), (before, _) in zip(layers[1:], layers, strict=False):
        if weight.shape[1] != before.shape[0]:
            raise DataError(f"{name}: a layer of {before.shape[0]} outputs is followed by one that takes {weight.shape[1]}")
    return Head(layers)


def _layers(tensors: dict[str, NDArray[np.float32]], name: str) -> tuple[Layer, ...]:
    """In the order of their numbers. A tensor that is part of none would be left out in silence, and so is an error."""
    weights: dict[int, Float32[np.ndarray, "out in"]] = {}
    biases: dict[int, Float32[np.ndarray, " out"]] = {}
    stems = set()
    for key, tensor in tensors.items():
        match = _TENSOR.fullmatch(key)
        if match is None or tensor.ndim != (2 if match["part"] == "weight" else 1) or not np.isfinite(tensor).all():
            shape = "x".join(map(str, tensor.shape)) or "one number"
            raise DataError(f"{name}: the tensor {key!r} ({shape}) is neither weight nor bias of a linear layer, or not finite: {_LAYOUT}")
        stems.add((match["stem"], match["number"] is None))
        (weights if match["part"] == "weight" else biases)[int(match["number"] or 0)] = tensor
    if not weights or len(stems) > 1 or biases.keys() - weights.keys():
        raise DataError(f"{name}: the tensors {', '.join(sorted(tensors)) or '(none)'} are no layers one behind another: {_LAYOUT}")
    if wrong := [number for number, bias in biases.items() if len(bias) != len(weights[number])]:
        raise DataError(f"{name}: layer {wrong[0]} has {len(weights[wrong[0]])} outputs and {len(biases[wrong[0]])} biases")
    return tuple((weights[n], biases.get(n, np.zeros(len(weights[n]), dtype=np.float32))) for n in sorted(weights))
