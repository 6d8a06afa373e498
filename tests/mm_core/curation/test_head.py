"""A head is what torch's own layers compute; what cannot be one is refused, with what is wrong."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from safetensors.torch import save

from mm_core.curation.head import Between, Head, Output, read_head
from mm_core.errors import DataError


def packed(tensors: dict[str, torch.Tensor]) -> tuple[bytes, str]:
    data = save({key: tensor.contiguous() for key, tensor in tensors.items()})
    return data, hashlib.sha256(data).hexdigest()


def read(tensors: dict[str, torch.Tensor]) -> Head:
    data, digest = packed(tensors)
    return read_head(data, digest, "head")


@pytest.fixture
def embeddings() -> np.ndarray:
    values = np.random.default_rng(0).normal(size=(7, 12)).astype(np.float32)
    return values / np.linalg.norm(values, axis=1, keepdims=True)


@pytest.mark.parametrize("prefix", ["", "layers.", "mlp.net."])
def test_layers_are_torchs_in_the_order_of_their_numbers(prefix: str, embeddings: np.ndarray) -> None:
    torch.manual_seed(0)
    layers = [torch.nn.Linear(12, 8), torch.nn.ReLU(), torch.nn.Linear(8, 5), torch.nn.ReLU(), torch.nn.Linear(5, 3)]
    model = torch.nn.Sequential(*layers, *(torch.nn.Identity() for _ in range(5)), torch.nn.ReLU(), torch.nn.Linear(3, 2))
    head = read({f"{prefix}{key}": value for key, value in model.state_dict().items()})
    with torch.no_grad():
        expected = model(torch.from_numpy(embeddings)).numpy()
    np.testing.assert_allclose(head(embeddings, Between.RELU, Output.IDENTITY), expected, atol=1e-6)
    assert (head.inputs, head.outputs, head.columns) == (12, 2, ("score_0", "score_1"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_one_linear_layer_and_a_sigmoid(dtype: torch.dtype, embeddings: np.ndarray) -> None:
    layer = torch.nn.Linear(12, 1).to(dtype)
    head = read(layer.state_dict())
    with torch.no_grad():
        expected = layer.float()(torch.from_numpy(embeddings)).sigmoid().numpy()
    found = head(embeddings, Between.RELU, Output.SIGMOID)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert (head.columns, found.dtype) == (("score",), np.float32)
    assert np.isfinite(head(embeddings * 1e4, Between.RELU, Output.SIGMOID)).all()


def test_layers_with_nothing_between_are_one(embeddings: np.ndarray) -> None:
    first, second = torch.nn.Linear(12, 4), torch.nn.Linear(4, 1, bias=False)
    head = read({"layers.0.weight": first.weight, "layers.0.bias": first.bias, "layers.2.weight": second.weight})
    with torch.no_grad():
        expected = second(first(torch.from_numpy(embeddings))).numpy()
    np.testing.assert_allclose(head(embeddings, Between.IDENTITY, Output.IDENTITY), expected, atol=1e-6)
    assert not np.allclose(head(embeddings, Between.RELU, Output.IDENTITY), expected)


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ({}, r"the tensors \(none\) are no layers"),
        ({"bias": (3,)}, "the tensors bias are no layers"),
        ({"weight": (3,)}, r"tensor 'weight' \(3\) is neither weight nor bias"),
        ({"weight": (3, 4), "norm.scale": (4,)}, r"tensor 'norm.scale' \(4\)"),
        ({"0.weight": (3, 4), "1.weight": (3,)}, r"tensor '1.weight' \(3\)"),
        ({"0.weight": (3, 4), "2.weight": (1, 2)}, "a layer of 3 outputs is followed by one that takes 2"),
        ({"weight": (3, 4), "bias": (2,)}, "layer 0 has 3 outputs and 2 biases"),
        ({"a.0.weight": (3, 4), "b.1.weight": (1, 3)}, "no layers one behind another"),
        ({"0.weight": (3, 4), "weight": (1, 3)}, "no layers one behind another"),
        ({"first.weight": (3, 4), "second.weight": (1, 3)}, "no layers one behind another"),
    ],
)
def test_what_is_no_head_is_named(tensors: dict[str, tuple[int, ...]], says: str) -> None:
    with pytest.raises(DataError, match=says):
        read({key: torch.ones(shape) for key, shape in tensors.items()})


def test_another_digest_a_pickle_and_what_is_not_finite_are_refused() -> None:
    data, digest = packed({"weight": torch.ones(1, 4)})
    assert read_head(data, digest.upper(), "head").inputs == 4
    with pytest.raises(DataError, match=rf"has SHA-256 {digest}, not {'0' * 64}"):
        read_head(data, "0" * 64, "head")
    pickled = b"\x80\x04\x95"
    with pytest.raises(DataError, match="is no safetensors file"):
        read_head(pickled, hashlib.sha256(pickled).hexdigest(), "head")
    with pytest.raises(DataError, match="or not finite"):
        read({"weight": torch.full((1, 4), float("nan"))})
