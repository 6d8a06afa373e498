from __future__ import annotations

import numpy as np
import pyarrow as pa

from mm_core.data.among import combine


def table(*rows: tuple[float, str | None]) -> pa.Table:
    repeat, reasons = zip(*rows, strict=True)
    return pa.table({"repeat": pa.array(repeat, pa.float32()), "reason": pa.array(reasons, pa.string()).dictionary_encode()})


def test_the_first_ledger_that_drops_a_sample_is_its_reason_and_weights_multiply() -> None:
    one = table((1, None), (0, "small"), (2, None), (0, "blurred"), (0, None))
    other = table((0, "held_out"), (0, "held_out"), (1.5, None), (1, None), (1, None))
    usable = np.array([True, True, True, True, False])
    both = combine({"clean": one, "train": other}, usable)
    assert both["repeat"].to_pylist() == [0, 0, 3, 0, 0]
    assert both["ledger"].to_pylist() == ["train", "clean", None, "clean", None]
    assert both["reason"].to_pylist() == ["held_out", "small", None, "blurred", None]
    turned = combine({"train": other, "clean": one}, usable)
    assert turned["repeat"].to_pylist() == both["repeat"].to_pylist()
    assert turned["reason"].to_pylist() == ["held_out", "held_out", None, "blurred", None]
    assert combine({}, usable)["repeat"].to_pylist() == [1, 1, 1, 1, 0]
