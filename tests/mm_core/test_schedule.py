from __future__ import annotations

from itertools import pairwise

import pytest

from mm_core.schedule import ScheduleConfig, ScheduleKind, lr_at


def test_warm_up_is_linear_and_ends_at_the_peak() -> None:
    config = ScheduleConfig(warmup_steps=4)
    assert [lr_at(config, 2.0, step, 20) for step in range(5)] == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0])


def test_the_cosine_falls_from_the_peak_to_the_minimum() -> None:
    config = ScheduleConfig(warmup_steps=10, min_lr_fraction=0.1)
    rates = [lr_at(config, 1.0, step, 110) for step in range(10, 130)]
    assert rates[0] == 1.0
    assert rates[50] == pytest.approx(0.55)  # half-way between 1 and 0.1
    assert all(later <= earlier for earlier, later in pairwise(rates))
    assert rates[100:] == pytest.approx([0.1] * 20)


def test_neither_warm_up_nor_steps_after_it() -> None:
    assert lr_at(ScheduleConfig(), 1.0, 0, 1) == 1.0
    assert lr_at(ScheduleConfig(warmup_steps=5), 1.0, 4, 5) == 1.0


def test_a_constant_rate_cools_down_at_the_end() -> None:
    config = ScheduleConfig(kind=ScheduleKind.WSD, warmup_steps=10, cooldown_fraction=0.25, min_lr_fraction=0.1)
    rates = [lr_at(config, 1.0, step, 200) for step in range(10, 210)]
    assert rates[: 150 - 10] == [1.0] * 140
    assert rates[150 - 10 + 12] == pytest.approx(0.1 + 0.9 * (1 - (12 / 50) ** 0.5))
    assert all(later < earlier for earlier, later in pairwise(rates[140:191]))
    assert rates[190:] == pytest.approx([0.1] * 10)


def test_a_longer_run_takes_the_same_steps_up_to_the_cooldown() -> None:
    config = ScheduleConfig(kind=ScheduleKind.WSD, warmup_steps=5)
    assert [lr_at(config, 1.0, s, 100) for s in range(80)] == [lr_at(config, 1.0, s, 1000) for s in range(80)]
