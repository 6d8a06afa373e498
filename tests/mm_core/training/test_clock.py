"""Time is attributed to one phase at a time, and all of it."""

from __future__ import annotations

import time
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mm_core.distributed import gather_features
from mm_core.training.clock import Phase, StepClock, timed_all_reduce


def test_phases_add_up_and_an_inner_one_is_taken_from_its_outer() -> None:
    started = time.perf_counter()
    clock = StepClock(torch.device("cpu"))
    with clock.phase(Phase.FORWARD):
        time.sleep(0.02)
        with clock.phase(Phase.COLLECTIVE):
            time.sleep(0.03)
    spent = clock.read()
    elapsed_s = time.perf_counter() - started
    assert spent[Phase.FORWARD] >= 0.02
    assert spent[Phase.COLLECTIVE] >= 0.03
    assert sum(spent.values()) == pytest.approx(elapsed_s, abs=1e-3)


def test_reading_inside_a_phase_counts_the_rest_of_it_to_the_next_reading() -> None:
    clock = StepClock(torch.device("cpu"))
    with clock.phase(Phase.LOGGING):
        clock.read()
        time.sleep(0.01)
    spent = clock.read()
    assert spent[Phase.LOGGING] >= 0.01
    assert spent[Phase.DATA_WAIT] == 0


def test_a_phase_that_raises_still_ends() -> None:
    clock = StepClock(torch.device("cpu"))
    with pytest.raises(KeyError), clock.phase(Phase.BACKWARD):
        raise KeyError
    clock.read()
    time.sleep(0.005)
    assert clock.read()[Phase.BACKWARD] == 0


def _late_rank(rank: int, rendezvous: str, out: str) -> None:
    """Rank 1 comes 0.3 s late to the gather of forward and to the all-reduce of backward."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    clock = StepClock(torch.device("cpu"))
    model = DistributedDataParallel(nn.Linear(4, 4))
    model.register_comm_hook(clock, timed_all_reduce)
    with clock.phase(Phase.FORWARD):
        time.sleep(0.3 * rank)
        rows = gather_features(model(torch.ones(1, 4)), [1, 1], around=partial(clock.phase, Phase.COLLECTIVE))
    forward = clock.read()
    with clock.phase(Phase.BACKWARD):
        time.sleep(0.3 * rank)
        rows.sum().backward()
    torch.save((forward, clock.read(), model.module.weight.grad), f"{out}/{rank}.pt")
    dist.destroy_process_group()


def test_waiting_for_a_slower_rank_is_collective_time(tmp_path: object) -> None:
    mp.start_processes(_late_rank, (f"{tmp_path}/rendezvous", str(tmp_path)), nprocs=2, start_method="spawn")
    early, late = (torch.load(f"{tmp_path}/{rank}.pt", weights_only=False) for rank in range(2))
    for phase, at in ((Phase.FORWARD, 0), (Phase.BACKWARD, 1)):
        assert early[at][Phase.COLLECTIVE] > 0.1 > early[at][phase]
        assert late[at][phase] >= 0.3
    torch.testing.assert_close(early[2], late[2])
