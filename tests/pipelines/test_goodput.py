"""The parts of a run's wall time add up to it, and steps taken again are no training."""

from __future__ import annotations

import pytest

from pipelines.train.goodput import Goodput


def test_the_parts_add_up_over_restarts_and_commands() -> None:
    goodput = Goodput()
    goodput.began(100.0)
    goodput.started(0, 110.0)
    goodput.report(10, {"forward": 0.5, "data_wait": 0.5}, 120.0)
    goodput.report(20, {"forward": 0.5, "data_wait": 0.5}, 130.0)
    goodput.started(10, 145.0)  # workers died, and started again from the checkpoint of step 10
    goodput.report(25, {"forward": 1.0}, 160.0)  # ten of the fifteen steps were taken before
    assert goodput.seconds == pytest.approx({"start_up": 10, "forward": 15, "data_wait": 10, "restart": 15, "replayed": 10})
    assert goodput.wall_s == 60
    assert goodput.fraction == pytest.approx(15 / 60)
    assert goodput.mfu(0.4) == pytest.approx(0.4 * 25 / 60)

    later = Goodput.of(goodput.record())
    later.began(1000.0)
    later.started(25, 1005.0)
    later.report(30, {"optimizer": 1.0}, 1010.0)
    assert later.wall_s == 70
    assert later.seconds["start_up"] == 15
    assert [row[0] for row in later.rows()][:2] == ["start_up", "forward"]
    assert later.metrics()["goodput/fraction"] == pytest.approx(20 / 70)


def test_a_run_without_a_step_has_no_share() -> None:
    assert Goodput.of({}).fraction == 0
    assert Goodput.of({}).rows() == []
