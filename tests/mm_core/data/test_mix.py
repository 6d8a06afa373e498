from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mm_core.data.mix import Choice, MixChange, MixConfig, MixedPlan, Phase, mixed_plan, source_seed
from mm_core.data.plan import Plan, rank_chunks
from mm_core.errors import ConfigError

CHUNK = 4


def _plans(*samples: int, seed: int = 0) -> list[Plan]:
    return [Plan(n, source_seed(seed, i), CHUNK, 1, f"kept-{i}") for i, n in enumerate(samples)]


def _mixed(weights: tuple[int, ...], *, samples: int = 50) -> MixedPlan:
    return MixedPlan(tuple(_plans(*[samples] * len(weights))), (Phase(0, weights),))


def _chunks(plan: MixedPlan, count: int) -> tuple[np.ndarray, np.ndarray]:
    sources, numbers = plan.chunks(np.arange(count, dtype=np.uint64))
    return sources.astype(int), numbers.astype(int)


@given(weights=st.lists(st.integers(0, 40), min_size=2, max_size=7).filter(any))
@settings(deadline=None, max_examples=80)
def test_proportions_are_exact_per_period_and_close_in_between(weights: list[int]) -> None:
    period = sum(weights)
    sources, _ = _chunks(_mixed(tuple(weights)), 3 * period)
    taken = np.cumsum(sources[:, None] == np.arange(len(weights)), axis=0)
    for periods in (1, 2, 3):
        assert taken[periods * period - 1].tolist() == [periods * weight for weight in weights]
    ideal = np.arange(1, 3 * period + 1)[:, None] * np.asarray(weights) / period
    assert np.abs(taken - ideal).max() <= math.ceil(math.log2(len(weights)))


def test_a_thousand_to_one_is_exact_and_spread_out() -> None:
    sources, _ = _chunks(_mixed((1000, 1)), 10 * 1001)
    rare = np.flatnonzero(sources == 1)
    assert set(np.diff(rare)) == {1001}
    assert len(rare) == 10


@given(
    weights=st.lists(st.lists(st.integers(0, 9), min_size=3, max_size=3).filter(any), min_size=1, max_size=4),
    lengths=st.lists(st.integers(1, 30), min_size=4, max_size=4),
    unit=st.integers(1, 5),
)
@settings(deadline=None, max_examples=80)
def test_a_source_s_chunks_come_in_its_own_order_through_every_change(weights: list[list[int]], lengths: list[int], unit: int) -> None:
    starts = np.cumsum([0, *lengths])[: len(weights)] * unit
    plan = MixedPlan(tuple(_plans(9, 50, 31)), tuple(Phase(int(s), tuple(w)) for s, w in zip(starts, weights, strict=True)), unit)
    sources, numbers = _chunks(plan, 120 * unit)
    for source in range(3):
        assert numbers[sources == source].tolist() == list(range((sources == source).sum()))
    assert all(len(set(sources[first : first + unit])) == 1 for first in range(0, len(sources), unit))
    for start, end, phase in zip(starts, [*starts[1:], len(sources)], plan.phases, strict=True):
        assert {s for s in range(3) if phase.weights[s] == 0}.isdisjoint(sources[start:end])


@given(samples=st.lists(st.integers(1, 60), min_size=2, max_size=4), world_size=st.integers(1, 6), seed=st.integers(0, 1000))
@settings(deadline=None, max_examples=25)
def test_an_epoch_of_a_source_holds_each_of_its_samples_once_on_any_number_of_ranks(samples: list[int], world_size: int, seed: int) -> None:
    plan = mixed_plan(_plans(*samples, seed=seed), MixConfig(), 6)
    chunks = [c + 6 * step for step in range(60) for rank in range(world_size) for c in rank_chunks(6, rank, world_size)]
    positions = np.concatenate([np.arange(c * CHUNK, (c + 1) * CHUNK, dtype=np.uint64) for c in chunks])
    places = plan.locate(positions)
    for source, count in enumerate(samples):
        for epoch in range(int(max(places.epochs[places.sources == source], default=0))):  # the last one may be under way
            kept = places.kept[(places.sources == source) & (places.epochs == epoch)]
            if epoch + 1 < places.epochs[places.sources == source].max():
                assert sorted(kept) == list(range(count))
            assert len(set(kept)) == len(kept)


def test_weights_change_at_their_step_and_a_step_is_of_one_source() -> None:
    config = MixConfig(weights=(0.5, 0.25, 0.25), choice=Choice.STEP, changes=(MixChange(step=8, weights=(0, 1, 1)),))
    plan = mixed_plan(_plans(40, 40, 40), config, 3)
    assert isinstance(plan, MixedPlan)
    steps = _chunks(plan, 16 * 3)[0].reshape(16, 3)
    assert (steps == steps[:, :1]).all()
    assert np.bincount(steps[:8, 0]).tolist() == [4, 2, 2]
    assert np.bincount(steps[8:, 0], minlength=3).tolist() == [0, 4, 4]


def test_any_position_alone_is_what_it_is_among_others_far_out_too() -> None:
    plan = _mixed((1000, 1, 7))
    first = 10**12
    whole = plan.locate(np.arange(first, first + 64, dtype=np.uint64))
    for i in (0, 5, 63):
        assert [int(v[0]) for v in plan.locate(np.asarray([first + i], dtype=np.uint64))] == [int(v[i]) for v in whole]


def test_one_source_is_its_plan_and_the_fingerprint_covers_the_mix() -> None:
    (alone,) = _plans(50)
    assert mixed_plan([alone], MixConfig(), 4) is alone
    with pytest.raises(ConfigError, match="there is one index"):
        mixed_plan([alone], MixConfig(weights=(1,)), 4)
    plans = _plans(50, 60)
    configs = [
        MixConfig(weights=(1, 1)),
        MixConfig(weights=(2, 1)),
        MixConfig(weights=(1, 1), choice=Choice.STEP),
        MixConfig(weights=(1, 1), changes=(MixChange(step=5, weights=(2, 1)),)),
        MixConfig(weights=(1, 1), changes=(MixChange(step=6, weights=(2, 1)),)),
    ]
    names = [mixed_plan(order, config, 4).fingerprint for order in (plans, plans[::-1]) for config in configs]
    assert len(set(names)) == len(names)
    assert mixed_plan(plans, MixConfig(weights=(0.2, 0.1)), 4).fingerprint == names[1]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (MixConfig(weights=(1, 2, 3)), "one weight per --data"),
        (MixConfig(weights=(0, 0)), "one must be positive"),
        (MixConfig(weights=(2, -1)), "none may be negative"),
        (MixConfig(weights=(1, 1), changes=(MixChange(step=9, weights=(1, 1)), MixChange(step=2, weights=(1, 1)))), "must ascend"),
    ],
)
def test_a_mix_that_cannot_be_is_refused(config: MixConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        mixed_plan(_plans(5, 6), config, 4)


def test_without_weights_billions_are_mixed_by_their_sizes() -> None:
    plan = mixed_plan(_plans(9 * 10**9, 10**9), MixConfig(), 4)
    assert isinstance(plan, MixedPlan)
    sources, _ = _chunks(plan, 10_000)
    assert abs((sources == 1).sum() - 1000) <= 1


def test_what_a_rare_source_is_owed_goes_through_changes_of_weight() -> None:
    """Of 1,001 chunks one, also where every phase has forty."""
    phases = tuple(Phase(40 * number, (1000, 1)) for number in range(100))
    assert MixedPlan(tuple(_plans(50, 50)), phases).consumed(4004)[1] // _plans(50)[0].chunk == 4
