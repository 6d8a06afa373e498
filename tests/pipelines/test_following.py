"""What a person reads while a run's workers do not begin."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import ray
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

from mm_core.console import Console
from pipelines.train import following
from pipelines.train.board import Board, News, start_board
from pipelines.train.following import Waiting, followed
from pipelines.train.losses import _cause, _why
from pipelines.train.run_folder import RunFolder


def news(workers: int, step: int | None = None) -> News:
    return News(step, workers, {}, [], {})


def test_a_wait_is_told_after_a_minute_and_each_time_it_is_twice_as_long() -> None:
    waiting = Waiting(2, 100.0)
    told = [now for now in range(100, 700) if waiting.look(news(0), now) is not None]
    assert told == [160, 220, 340, 580]


def test_it_is_told_how_far_the_workers_are() -> None:
    assert "no step for 61 s: Ray has not started the first process" in str(Waiting(2, 0.0).look(None, 61))
    assert "none of 2 workers has begun" in str(Waiting(2, 0.0).look(news(0), 61))
    assert "all 2 workers have begun, and load" in str(Waiting(2, 0.0).look(news(2), 61))


def test_nothing_is_told_of_a_run_that_takes_steps_though_its_board_is_slow() -> None:
    waiting = Waiting(2, 0.0)
    assert [waiting.look(each, now) for now, each in enumerate([news(2, step=0), None, news(2, step=9), None], 1000)] == [None] * 4


def test_a_wait_after_a_loss_begins_with_it() -> None:
    waiting = Waiting(2, 0.0)
    waiting.look(news(2, step=50), 3600)
    told = [now for now in range(3601, 3800) if waiting.look(news(0), now) is not None]
    assert told == [3661, 3721]


def test_lost_workers_are_told_and_no_longer_there() -> None:
    board = Board({}, max_failures=8)
    board.joined(2)
    board.started(0)
    assert board.news()[:2] == (0, 2)
    assert not board.lost("rank 1: gone", announced=False)
    told = board.news()
    assert told[:2] == (None, 0)
    assert told.said == ["workers were lost (rank 1: gone): all start again from the last checkpoint"]


def test_a_run_gives_up_when_workers_are_lost_again_and_again_at_the_same_step() -> None:
    board = Board({}, max_failures=2)
    for announced in (False, True, False, True):
        board.started(10)
        assert not board.lost("rank 0: out of memory", announced=announced)
    assert board.error() is None
    board.started(10)
    assert board.lost("rank 0: out of memory", announced=False)
    assert "lost 3 times in a row, without a checkpoint between (faults.max_failures); the last time: rank 0" in str(board.error())


def test_a_run_that_gets_on_may_lose_workers_as_often_as_it_will() -> None:
    board = Board({}, max_failures=2)
    for step in range(0, 1000, 10):
        for _ in range(2):
            board.started(step)
            board.lost("rank 1: gone", announced=False)
    assert board.error() is None


def test_a_process_that_is_gone_says_more_than_those_that_missed_it() -> None:
    missed = RuntimeError("Traceback\n  in all_reduce\nConnection closed by peer")
    died = ray.exceptions.RayActorError(error_msg="The actor is dead because its node has died. Worker exit type: NODE_DIED")
    found = _cause(WorkerHealthCheckFailedError("A worker health check failed.", died))
    assert found is died
    assert _why({0: missed, 1: found}) == "rank 1: The actor is dead because its node has died"
    assert _why({0: _cause(missed)}) == "rank 0: Connection closed by peer"


@pytest.mark.usefixtures("ray_cluster")
def test_a_run_whose_workers_do_not_come_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(following, "_PATIENCE_S", 1.0)
    folder, board, console = RunFolder(str(tmp_path), "late"), start_board({}, 8), Console(json=True)
    with console.progress("train", 10, "steps") as tracker, followed(board, folder, 2, console, tracker):
        time.sleep(2.5)
        board.joined.remote(2)
        ray.get(board.started.remote(0))
        ray.get(board.update.remote(5, {"loss": 1.5}))
    said = capsys.readouterr().err
    assert "none of 2 workers has begun" in said
    assert "5/10 steps" in said
    assert "loss 1.500" in said
