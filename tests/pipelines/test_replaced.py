from __future__ import annotations

from typing import Any, cast

import pytest

from pipelines.train.meter import TOP_SHARDS, Meter
from pipelines.train.outcome import ShardCount


@pytest.mark.usefixtures("process_group")
def test_the_shards_with_most_replaced_samples_come_first() -> None:
    meter = Meter(cast(Any, None), 8)
    meter.step_done({("a.tar", "changed"): 2, ("b.tar", "undecodable"): 1}, None)
    meter.step_done({}, None)
    meter.step_done({("b.tar", "undecodable"): 4, ("b.tar", "changed"): 1}, None)
    assert meter.top_shards() == [
        ShardCount("b.tar", "undecodable", 5),
        ShardCount("a.tar", "changed", 2),
        ShardCount("b.tar", "changed", 1),
    ]
    assert meter.replaced == {"changed": 3, "undecodable": 5}


@pytest.mark.usefixtures("process_group")
def test_of_very_many_shards_the_worst_are_kept() -> None:
    meter = Meter(cast(Any, None), 8)
    for number in range(20 * TOP_SHARDS):
        meter.step_done({(f"{number}.tar", "read_failed"): 1, ("worst.tar", "changed"): 1}, None)
    shards = meter.top_shards()
    assert shards[0] == ShardCount("worst.tar", "changed", 20 * TOP_SHARDS)
    assert len(shards) == TOP_SHARDS
    assert meter.replaced["read_failed"] == 20 * TOP_SHARDS
