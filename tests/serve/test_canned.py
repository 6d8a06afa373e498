"""What a version must answer before it is asked anything: numbers, of length 1, different for different inputs."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from mm_core.bundle import Bundle
from mm_core.data.image import decode_centre
from mm_core.errors import BundleError
from serve.canned import canned_inputs, judge
from serve.encoded import Encoded
from serve.facts import Facts
from serve.inputs import Picture
from serve.prepare import Unreadable


@pytest.fixture(scope="module")
def facts(bundle: Bundle) -> Facts:
    sizes = {"embed_dim": bundle.embed_dim, "image_size": bundle.image_size, "context_length": bundle.context_length}
    return Facts(digest="d", task="contrastive", parameters=1, logit_scale=1.0, logit_bias=None, **sizes)


@pytest.fixture(scope="module")
def features(bundle: Bundle) -> np.ndarray:
    """Of the canned query, by a model that works."""
    texts = [one for one in canned_inputs() if isinstance(one, str)]
    pictures = [decode_centre(one.content, bundle.image_size) for one in canned_inputs() if isinstance(one, Picture)]
    return np.concatenate([bundle.text_features(texts), bundle.image_features(np.stack(pictures))])


def test_a_model_that_works_passes(features: np.ndarray, facts: Facts) -> None:
    judge(Encoded(features, np.ones(4, np.float32), 9), facts)


BAD: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "no numbers": lambda f: np.where(np.arange(f.size).reshape(f.shape) == 3, np.nan, f),
    "not of length 1": lambda f: 0.5 * f,
    "two different texts one vector": lambda f: f[[0, 0, 2, 3]],
    "two different pictures one vector": lambda f: f[[0, 1, 2, 2]],
    "shape": lambda f: f[:, :-1],
}


@pytest.mark.parametrize("reason", BAD)
def test_one_that_does_not_is_refused(features: np.ndarray, facts: Facts, reason: str) -> None:
    with pytest.raises(BundleError, match=reason):
        judge(Encoded(BAD[reason](features), np.ones(4, np.float32), 9), facts)
    with pytest.raises(BundleError, match="refused"):
        judge(Unreadable(2, "x"), facts)
