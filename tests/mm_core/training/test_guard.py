"""Steps in trouble are seen, before their update; ordinary ones are not."""

from __future__ import annotations

import math
import random

import pytest
import torch

from mm_core.objectives.output import LossOutput
from mm_core.training.guard import WINDOW, GuardConfig, Remedy, StepGuard, Trouble


def loss(value: float) -> LossOutput:
    return LossOutput.of({"a": torch.tensor(value / 2), "b": torch.tensor(value / 2)}, world_size=1)


def judged(guard: StepGuard, value: float, norm: float = 1.0) -> Trouble | None:
    return guard.judge(loss(value), torch.tensor(norm))


@pytest.mark.parametrize(("value", "norm"), [(math.nan, 1.0), (1.0, math.inf), (math.inf, 1.0)])
def test_what_is_not_finite_is_trouble_and_no_measure(value: float, norm: float) -> None:
    guard = StepGuard(GuardConfig(not_finite=Remedy.SKIP))
    assert judged(guard, 1.0) is None
    assert judged(guard, value, norm) is Trouble.NOT_FINITE
    assert guard.recent_losses == (1.0,)


def test_a_jump_is_a_spike_and_a_noisy_fall_is_none() -> None:
    draw = random.Random(0)
    guard = StepGuard(GuardConfig(spike=Remedy.SKIP))
    for step in range(1000):
        assert judged(guard, 6 * math.exp(-step / 300) + 1 + draw.gauss(0, 0.1)) is None
    assert judged(guard, 4.0) is Trouble.SPIKE
    assert judged(guard, 4.0) is Trouble.SPIKE  # the first is no measure for the second
    assert judged(guard, 1.2) is None


def test_a_jump_is_none_before_there_is_a_measure_or_unless_asked_for() -> None:
    early = StepGuard(GuardConfig(spike=Remedy.SKIP))
    assert [judged(early, value) for value in (1.0, 100.0)] == [None, None]
    unasked = StepGuard(GuardConfig(), [1.0] * WINDOW)
    assert judged(unasked, 100.0) is None


def test_a_continued_run_judges_as_an_undisturbed_one() -> None:
    first = StepGuard(GuardConfig(spike=Remedy.SKIP))
    for step in range(150):
        judged(first, 2 + math.sin(step))
    second = StepGuard(GuardConfig(spike=Remedy.SKIP), first.recent_losses)
    for value in (3.1, 9.0, 2.5, 14.0):
        assert judged(first, value) is judged(second, value)


def test_only_a_policy_that_acts_waits_for_the_device() -> None:
    assert not GuardConfig().looks_before_updating
    assert GuardConfig(not_finite=Remedy.SKIP).looks_before_updating
    assert GuardConfig(spike=Remedy.STOP).looks_before_updating
    assert GuardConfig(spike=Remedy.ROLLBACK, rollback_steps=7).reach_back == 7
    assert GuardConfig(spike=Remedy.SKIP, rollback_steps=7).reach_back == 0
