"""A step that would spoil the model is left out, or undone with those before it: what comes out is the model that never saw its batch."""

from __future__ import annotations

import re
import weakref
from collections.abc import Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from botocore.exceptions import EndpointConnectionError

from mm_core.config import resolve
from mm_core.models.family import build_model
from mm_core.models.sizes import SpecialTokens
from mm_core.models.two_tower import TwoTower
from mm_core.objectives.output import LossOutput
from mm_core.ranks import Ranks
from mm_core.training.clock import StepClock
from mm_core.training.guard import StepGuard
from mm_core.training.step import TrainStep
from pipelines.batches import StepBatch
from pipelines.recipes import recipe
from pipelines.train import loop
from pipelines.train.config import TrainRun
from pipelines.train.loop import LoopTools, build_step, run_steps
from pipelines.train.outcome import Outcome
from pipelines.train.remedies import LeftOut, Remedies, Rollback
from pipelines.train.run_checkpoints import RunCheckpoints, is_taken_over, next_attempt

STEPS, BAD = 12, 7


pytestmark = pytest.mark.usefixtures("process_group")


def run_of(*settings: str) -> TrainRun:
    tower = "{width: 16, layers: 1, heads: 2}"
    tiny = [f"steps={STEPS}", "global_batch_size=8", "data.chunk=8", "precision=fp32", "log_every_steps=2", "checkpoint.every_steps=3"]
    tiny += ["model.image_size=16", f"model.vision={tower}", f"model.text={tower}", "model.embed_dim=8", "model.context_length=6"]
    return resolve(recipe("clip-tiny"), overrides=[*tiny, "model.vocab_size=20", "schedule.warmup_steps=0", *settings])[0]


def batches_from(step: int) -> Iterator[StepBatch]:
    for number in count(step):
        draw = np.random.default_rng(number)
        ids = draw.integers(5, 20, (8, 1, 6), dtype=np.int32)
        ids[..., -1] = 4
        images = draw.integers(0, 256, (8, 1, 16, 16, 3), dtype=np.uint8)
        rows = pa.table({"uid": [f"u{number}-{i}" for i in range(8)], "replaced": pa.nulls(8, pa.string())})
        yield StepBatch(number, images, ids, np.arange(8, dtype=np.uint64), rows)


class Trained:
    """One rank's run, with a loss that is spoilt at chosen steps."""

    def __init__(self, run: TrainRun, spoil: dict[int, float] | None = None) -> None:
        self.run, self.said, self.logged = run, list[str](), dict[int, dict[str, float]]()
        torch.manual_seed(0)
        self.model = TwoTower(build_model(run.model, SpecialTokens(bos=3, eos=4, pad=0)))
        self.step: TrainStep = build_step(run, self.model, StepClock(torch.device("cpu")))
        self.remedies = Remedies(run.faults, self.said.append)
        self._spoil = dict(spoil or {})
        self._plain = self.step.objective
        self.step.objective = self._objective  # type: ignore[assignment]
        self._number = 0

    def _objective(self, output: Any, batch: Any, counts: Any) -> LossOutput:
        loss, factor = self._plain(output, batch, counts), self._spoil.get(self._number, 1.0)
        return LossOutput(loss.total * factor, {name: term * factor for name, term in loss.terms.items()})

    def steps(self, first: int = 0, left_out: LeftOut = (), save: Any = None, taken_over: bool = False) -> Outcome | Rollback:
        def numbered() -> Iterator[StepBatch]:
            for batch in batches_from(first):
                self._number = batch.step
                yield batch

        tools = LoopTools(log=self.logged.__setitem__, remedies=self.remedies)
        tools = replace(tools, taken_over=lambda: taken_over)
        tools = tools if save is None else replace(tools, save=save)
        return run_steps(self.run, self.step, numbered(), first, tools, left_out=left_out)

    def weights(self) -> torch.Tensor:
        return torch.cat([p.detach().flatten() for p in self.model.parameters()])


def without(*left_out: tuple[int, int]) -> torch.Tensor:
    trained = Trained(run_of())
    trained.steps(left_out=left_out)
    return trained.weights()


def test_a_run_that_is_taken_over_ends_before_it_saves() -> None:
    saved = list[int]()

    def save(step: int, *_: Any) -> None:
        saved.append(step)

    ended = Trained(run_of()).steps(save=save, taken_over=True)
    assert isinstance(ended, Outcome)
    assert ended.taken_over
    assert saved == []
    assert not Trained(run_of()).steps(save=save).taken_over  # type: ignore[union-attr]
    assert saved != []


def test_what_says_that_a_run_is_taken_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = Ranks(torch.device("cpu"))
    assert not is_taken_over(str(tmp_path), 1, ranks)  # the store does not say
    assert next_attempt(str(tmp_path), ranks) == 1
    assert not is_taken_over(str(tmp_path), 1, ranks)
    assert next_attempt(str(tmp_path), ranks) == 2
    assert is_taken_over(str(tmp_path), 1, ranks)

    def away(*_: Any) -> Any:
        raise EndpointConnectionError(endpoint_url="http://127.0.0.1:9")

    monkeypatch.setattr("pipelines.train.run_checkpoints.open_store", away)
    assert not is_taken_over(str(tmp_path), 1, ranks)


def test_by_default_a_gradient_that_is_not_finite_stops_the_run() -> None:
    ended = Trained(run_of(), {BAD: float("nan")}).steps()
    assert isinstance(ended, Outcome)
    assert ended.failure is not None
    assert ended.failure.startswith(f"the gradient of step {BAD} is not finite, training stopped before it reached a checkpoint")
    assert ended.failed_uids == tuple(f"u{BAD}-{i}" for i in range(8))


@pytest.mark.parametrize("settings", ["faults.not_finite=skip", "faults.not_finite=skip parallel.micro_batch_size=3"])
def test_a_skipped_step_leaves_the_model_as_if_its_batch_had_not_been(settings: str) -> None:
    trained = Trained(run_of(*settings.split()), {BAD: float("nan")})
    ended = trained.steps()
    assert isinstance(ended, Outcome)
    assert ended.failure is None
    torch.testing.assert_close(trained.weights(), without((BAD, BAD + 1)), atol=1e-6, rtol=1e-5)
    assert trained.said == [f"the gradient of step {BAD} is not finite: its update is left out"]
    assert trained.logged[BAD + 1]["faults/skipped_steps"] == 1


def test_a_spike_is_skipped() -> None:
    run = run_of("faults.spike=skip")
    trained = Trained(run, {BAD: 30.0})
    trained.step.guard = StepGuard(run.faults, [2.1 + 0.1 * (i % 7) for i in range(100)])
    trained.steps()
    torch.testing.assert_close(trained.weights(), without((BAD, BAD + 1)))
    assert trained.said == [f"the loss of step {BAD} jumps: its update is left out"]


def test_more_troubles_than_the_bound_stop_the_run() -> None:
    ended = Trained(run_of("faults.not_finite=skip", "faults.max_remedies=2"), dict.fromkeys(range(3, 9), float("nan"))).steps()
    assert isinstance(ended, Outcome)
    assert ended.failure is not None
    assert ended.steps == 5
    assert ended.failure.startswith("the gradient of step 5 is not finite, the last of 3 steps in trouble, training stopped")
    assert settings_in(ended.failure) == {"optimizer.lr", "faults.max_remedies"}


def settings_in(text: str) -> set[str]:
    return set(re.findall(r"(?:faults|optimizer)\.\w+", text))


@pytest.mark.parametrize(
    ("settings", "spoil", "named"),
    [
        (["faults.not_finite=stop"], float("nan"), {"optimizer.lr", "faults.not_finite"}),
        (["faults.spike=stop"], 30.0, {"optimizer.lr", "faults.spike", "faults.spike_spreads"}),
    ],
)
def test_a_run_that_stops_names_the_settings_that_would_let_it_go_on(settings: list[str], spoil: float, named: set[str]) -> None:
    run = run_of(*settings)
    trained = Trained(run, {BAD: spoil})
    if run.faults.looks_before_updating:
        trained.step.guard = StepGuard(run.faults, [2.1 + 0.1 * (i % 7) for i in range(100)])
    ended = trained.steps()
    assert isinstance(ended, Outcome)
    assert ended.failure is not None
    assert settings_in(ended.failure) == named


def checkpoints_of(trained: Trained, folder: Path) -> RunCheckpoints:
    task: Any = SimpleNamespace(
        run=trained.run,
        folder=str(folder),
        spec=SimpleNamespace(plan=SimpleNamespace(fingerprint="p")),
        data_fingerprint="d",
        code_revision="r",
        tracking_run_id="t",
    )
    return RunCheckpoints(task, trained.model, trained.step, 1, lambda step, metrics: None)


def rolled_back(folder: Path, rollback_steps: int, bad: int = BAD) -> LeftOut:
    trained = Trained(run_of("faults.not_finite=rollback", f"faults.rollback_steps={rollback_steps}"), {bad: float("inf")})
    checkpoints = checkpoints_of(trained, folder)
    start = checkpoints.restore()
    ended = trained.steps(start.step, start.left_out, checkpoints.save)
    assert isinstance(ended, Rollback)
    return checkpoints.roll_back(ended)


@pytest.mark.parametrize(
    ("rollback_steps", "bad", "goes_on_from", "left_out"),
    [(1, 7, 6, (7, 8)), (2, 7, 6, (6, 8)), (3, 7, 3, (5, 8)), (5, 7, 3, (3, 8)), (50, 7, 3, (3, 8)), (2, 1, 0, (0, 2))],
)
def test_a_rollback_undoes_the_last_updates_and_leaves_their_batches_out(
    rollback_steps: int, bad: int, goes_on_from: int, left_out: tuple[int, int], tmp_path: Path
) -> None:
    leave = rolled_back(tmp_path / "run", rollback_steps, bad)
    trained = Trained(run_of("faults.not_finite=rollback", f"faults.rollback_steps={rollback_steps}"), {bad: float("inf")})
    checkpoints = checkpoints_of(trained, tmp_path / "run")
    start = checkpoints.restore(leave)
    assert (start.step, start.left_out) == (goes_on_from, (left_out,))
    ended = trained.steps(start.step, start.left_out, checkpoints.save)
    assert isinstance(ended, Outcome)
    checkpoints.finish()
    torch.testing.assert_close(trained.weights(), without(left_out))

    # What was left out is known to who continues the run.
    other = Trained(trained.run)
    again = checkpoints_of(other, tmp_path / "run").restore()
    assert (again.step, again.left_out) == (STEPS, (left_out,))
    torch.testing.assert_close(other.weights(), trained.weights())


def test_a_rollback_lets_go_of_a_model_before_it_makes_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_of("faults.not_finite=rollback", "faults.rollback_steps=4")
    models: list[weakref.ref[TwoTower]] = []

    class Attempt:
        """As the loop's own, from batches that are here."""

        def __init__(self, task: Any, clock: StepClock, left_out: LeftOut, log: Any) -> None:
            assert [model() for model in models] == [None] * len(models)
            self.trained = Trained(run, {BAD: float("inf")})
            models.append(weakref.ref(self.trained.model))
            self.checkpoints = checkpoints_of(self.trained, tmp_path / "run")
            self.start = self.checkpoints.restore(left_out)

        def steps(self, *told: Any) -> Outcome | Rollback:
            return self.trained.steps(self.start.step, self.start.left_out, self.checkpoints.save)

        def taken_over(self) -> bool:
            return False

        def close(self) -> None:
            self.checkpoints.close()

    monkeypatch.setattr(loop, "_Attempt", Attempt)
    anything: Any = SimpleNamespace(preemption_watched=False)
    ended = loop._attempts(anything, StepClock(torch.device("cpu")), anything, anything, Remedies(run.faults))
    assert ended.failure is None
    assert len(models) == 2


def test_a_run_killed_after_a_rollback_and_before_its_next_checkpoint_goes_back_again(tmp_path: Path) -> None:
    assert rolled_back(tmp_path / "run", 3) == rolled_back(tmp_path / "run", 3)


def test_the_policy_of_a_run_may_change_when_it_is_continued() -> None:
    assert run_of().identity() == run_of("faults.not_finite=skip").identity()
