from __future__ import annotations

import json
import math

import pytest

from mm_core.console import Console


def test_a_number_that_is_none_is_null(capsys: pytest.CaptureFixture[str]) -> None:
    Console(json=True).result({"loss": math.nan, "by": {"a": [1.5, math.inf]}, "n": 3})
    assert json.loads(capsys.readouterr().out, parse_constant=pytest.fail) == {"loss": None, "by": {"a": [1.5, None]}, "n": 3}
