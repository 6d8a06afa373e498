from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mm_core.data.permutation import invert, permute
from mm_core.data.plan import Plan, chunks_per_step, rank_chunks, rank_counts
from mm_core.errors import ConfigError


def _plan(samples: int, *, seed: int = 0, chunk: int = 8, run_length: int = 1) -> Plan:
    return Plan(samples, seed, chunk, run_length, "kept")


@given(n=st.integers(1, 3000), key=st.integers(0, 2**63))
@settings(deadline=None)
def test_permutation_is_a_bijection_with_an_inverse(n: int, key: int) -> None:
    everything = np.arange(n, dtype=np.uint64)
    image = permute(everything, n, key)
    assert sorted(image) == list(range(n))
    np.testing.assert_array_equal(invert(image, n, key), everything)


@given(samples=st.integers(1, 400), runs_per_chunk=st.integers(1, 8), run_length=st.integers(1, 9), seed=st.integers(0, 10**6))
@settings(deadline=None, max_examples=60)
def test_every_epoch_holds_every_kept_sample_once(samples: int, runs_per_chunk: int, run_length: int, seed: int) -> None:
    plan = _plan(samples, seed=seed, chunk=runs_per_chunk * run_length, run_length=run_length)
    positions = np.arange(3 * samples + 2 * plan.chunk, dtype=np.uint64)
    epochs, kept = plan.resolve(positions[: len(positions) // plan.chunk * plan.chunk])
    for epoch in range(3):
        assert sorted(kept[epochs == epoch]) == list(range(samples))


@given(chunks=st.integers(1, 200), world_size=st.integers(1, 64))
def test_ranks_share_each_step_without_gap_or_overlap(chunks: int, world_size: int) -> None:
    shares = [rank_chunks(chunks, rank, world_size) for rank in range(world_size)]
    assert [chunk for share in shares for chunk in share] == list(range(chunks))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert rank_counts(chunks, 16, world_size) == [len(share) * 16 for share in shares]


def test_a_position_alone_is_what_it_is_among_others() -> None:
    plan = _plan(1001, chunk=16, run_length=4)
    epochs, kept = plan.resolve(np.arange(4000, dtype=np.uint64))
    for position in (0, 17, 1000, 1001, 3999):
        epoch, place = plan.resolve(np.asarray([position], dtype=np.uint64))
        assert (epoch[0], place[0]) == (epochs[position], kept[position])


def test_epochs_and_seeds_differ_and_mix_evenly() -> None:
    plan, other = _plan(4096, chunk=16), _plan(4096, chunk=16, seed=1)
    _, kept = plan.resolve(np.arange(8192, dtype=np.uint64))
    _, others = other.resolve(np.arange(4096, dtype=np.uint64))
    first, second = kept[:4096].astype(int), kept[4096:].astype(int)
    assert (first == second).mean() < 0.01
    assert (first == others).mean() < 0.01
    # A uniform shuffle moves a sample by a third of the epoch on average, and neighbours end up as far apart.
    place = np.empty(4096, dtype=int)
    place[first] = np.arange(4096)
    assert abs(np.abs(np.arange(4096) - place).mean() / 4096 - 1 / 3) < 0.02
    assert abs(np.abs(np.diff(place)).mean() / 4096 - 1 / 3) < 0.02


def test_runs_stay_together_in_a_chunk() -> None:
    plan = _plan(1000, chunk=32, run_length=8)
    _, kept = plan.resolve(np.arange(32, dtype=np.uint64))
    assert len({int(place) // 8 for place in kept}) == 4


def test_a_billion_samples_cost_no_memory() -> None:
    epochs, kept = _plan(10**9, chunk=64, run_length=64).resolve(np.arange(7 * 10**9, 7 * 10**9 + 64, dtype=np.uint64))
    assert (kept < 10**9).all()
    assert set(epochs) <= {6, 7}


def test_wrong_batches_are_refused() -> None:
    assert chunks_per_step(64, 16, 3) == 4
    with pytest.raises(ConfigError, match="no multiple of the chunk"):
        chunks_per_step(65, 16, 1)
    with pytest.raises(ConfigError, match="4 chunks of 16 for 5 workers"):
        chunks_per_step(64, 16, 5)
    with pytest.raises(ConfigError, match="nothing is kept to train on"):
        _plan(0)
    with pytest.raises(ConfigError, match="no whole number of runs"):
        _plan(10, chunk=8, run_length=3)


@given(
    samples=st.integers(1, 300),
    chunk=st.sampled_from([1, 3, 8, 15]),
    chunks=st.integers(1, 12),
    world_size=st.integers(1, 12),
    seed=st.integers(0, 999),
)
@settings(deadline=None, max_examples=60)
def test_the_ranks_together_read_every_kept_sample_once_per_epoch(
    samples: int, chunk: int, chunks: int, world_size: int, seed: int
) -> None:
    plan = _plan(samples, seed=seed, chunk=chunk)
    steps = -(-2 * samples // (chunk * chunks)) + 1
    taken = [step * chunks + c for rank in range(world_size) for step in range(steps) for c in rank_chunks(chunks, rank, world_size)]
    positions = np.concatenate([np.arange(c * chunk, (c + 1) * chunk, dtype=np.uint64) for c in taken])
    epochs, kept = plan.resolve(positions)
    for epoch in range(2):
        assert sorted(kept[epochs == epoch]) == list(range(samples))


@pytest.mark.parametrize("run_length", [1, 8])
def test_over_seeds_a_sample_is_as_likely_in_any_part_of_the_epoch(run_length: int) -> None:
    samples, seeds, parts = 1024, 200, 8
    counts = np.zeros((samples, parts))
    for seed in range(seeds):
        _, kept = _plan(samples, seed=seed, chunk=32, run_length=run_length).resolve(np.arange(samples, dtype=np.uint64))
        counts[kept.astype(int), np.arange(samples) * parts // samples] += 1
    expected = seeds / parts
    statistics = ((counts - expected) ** 2 / expected).sum(axis=1)
    # χ² with 7 degrees of freedom: mean 7, standard deviation √14; runs of 8 move together, so there are samples / 8 draws at least.
    assert abs(statistics.mean() - (parts - 1)) < 5 * np.sqrt(2 * (parts - 1) / (samples / run_length))


@pytest.mark.parametrize("run_length", [1, 8])
def test_neighbours_of_a_shard_end_up_far_apart_unless_they_share_a_run(run_length: int) -> None:
    samples = 8192
    _, kept = _plan(samples, chunk=64, run_length=run_length).resolve(np.arange(samples, dtype=np.uint64))
    place = np.empty(samples, dtype=int)
    place[kept.astype(int)] = np.arange(samples)
    distance = np.abs(np.diff(place))
    between_runs = distance[run_length - 1 :: run_length]
    assert abs(between_runs.mean() / samples - 1 / 3) < 0.03
    assert np.percentile(between_runs, 5) > samples / 100
    if run_length > 1:
        assert np.delete(distance, np.arange(run_length - 1, samples - 1, run_length)).max() < 64
