from __future__ import annotations

import numpy as np
import pytest

from mm_core.evaluation.chance import chance


def test_chance_is_what_guessing_gives() -> None:
    assert chance({"top1": 0.0, "classes": 48.0}) == {"top1": 1 / 48, "top5": 5 / 48, "mean_per_class": 1 / 48}
    expected = chance({"images": 100.0, "texts": 500.0})
    assert expected["t2i_r5"] == pytest.approx(0.05)
    rng = np.random.default_rng(0)
    drawn = [(rng.permutation(500)[:10] < 5).any() for _ in range(4000)]
    assert expected["i2t_r10"] == pytest.approx(np.mean(drawn), abs=0.02)
