"""What a person reads while a run's workers do not begin."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import ray

from mm_core.console import Console
from pipelines.train import following
from pipelines.train.board import Board, News, start_board
from pipelines.train.following import Waiting, followed
from pipelines.train.run_folder import RunFolder


def news(workers: int, step: int | None = None) -> News:
    return News(step, workers, {}, [], {})


def test_a_wait_is_told_after_a_minute_and_each_time_it_is_twice_as_long() -> None:
    waiting = Waiting(2, began=100.0)
    told = [now for now in range(100, 700) if waiting.look(news(0), now) is not None]
    assert told == [160, 220, 340, 580]


def test_it_is_told_how_many_workers_have_begun() -> None:
    assert "no step after 61 s: Ray has not started the first process" in str(Waiting(2, 0.0).look(None, 61))
    assert "1 of 2 workers have begun" in str(Waiting(2, 0.0).look(news(1), 61))
    assert "all 2 workers have begun, and load" in str(Waiting(2, 0.0).look(news(2), 61))


def test_nothing_is_told_once_a_step_is_near() -> None:
    assert Waiting(2, 0.0).look(news(2, step=0), 1000) is None


def test_workers_that_are_started_again_are_counted_anew() -> None:
    board = Board({})
    board.joined(0)
    board.joined(1)
    assert board.news().workers == 2
    board.joined(1)
    assert board.news().workers == 1


@pytest.mark.usefixtures("ray_cluster")
def test_a_run_whose_workers_do_not_come_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(following, "_PATIENCE_S", 1.0)
    folder, board, console = RunFolder(str(tmp_path), "late"), start_board({}), Console(json=True)
    ray.get(board.joined.remote(0))
    with console.progress("train", 10, "steps") as tracker, followed(board, folder, 2, console, tracker):
        time.sleep(2.5)
        board.joined.remote(1)
        ray.get(board.started.remote(0))
        ray.get(board.update.remote(5, {"loss": 1.5}))
    said = capsys.readouterr().err
    assert "1 of 2 workers have begun" in said
    assert "5/10 steps" in said
    assert "loss 1.500" in said
