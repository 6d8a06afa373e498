"""bfloat16 and a compiled model give the vectors of float32, as near as they promise."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from mm_core.bundle import Bundle
from mm_core.data.image import decode_centre
from serve.config import Compute, Precision
from serve.encoder import Encoder
from serve.store import Folders
from tests.serve.test_endpoints import TEXTS, picture


@pytest.fixture(autouse=True)
def _own_threads() -> object:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def texts_of(encoder: Encoder) -> np.ndarray:
    (vectors,) = encoder._text_vectors([encoder._bundle.tokenise.with_lengths(TEXTS)])
    return unit(vectors)


def test_bf16_is_near_and_is_not_fp32(bundle_folder: Path, bundle: Bundle) -> None:
    encoder = Encoder(str(bundle_folder), Compute(precision=Precision.BF16), Folders())
    pixels = np.stack([decode_centre(picture(seed), bundle.image_size) for seed in range(3)])
    (images,) = encoder._image_vectors([pixels])
    for found, expected in ((unit(images), bundle.image_features(pixels)), (texts_of(encoder), bundle.text_features(TEXTS))):
        assert found.dtype == np.float32
        difference = np.abs(found - expected).max()
        assert 1e-6 < difference < 2e-2


COMPILED = """
import sys
from serve.config import Compute
from serve.encoder import Encoder
from serve.store import Folders
encoder = Encoder(sys.argv[1], Compute(compile=True), Folders())
(vectors,) = encoder._text_vectors([encoder._bundle.tokenise.with_lengths(sys.argv[3:])])
vectors.tofile(sys.argv[2])
"""


@pytest.mark.long
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a processor")
def test_a_compiled_model_gives_the_same(bundle_folder: Path, bundle: Bundle, tmp_path: Path) -> None:
    """In a process of its own: the compiler does not see through the shapes that are checked while testing."""
    subprocess.run([sys.executable, "-c", COMPILED, str(bundle_folder), str(tmp_path / "vectors"), *TEXTS], check=True)
    vectors = np.fromfile(tmp_path / "vectors", dtype=np.float32).reshape(len(TEXTS), -1)
    np.testing.assert_allclose(unit(vectors), bundle.text_features(TEXTS), atol=1e-5)
