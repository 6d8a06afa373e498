"""The loop's evaluations: by the ranks themselves, or in the background by an actor that is given snapshots of the weights.

The loop calls one of them with a step, on every rank; both log what they find at the step it belongs to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import ray
import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from mm_core.evaluation.chance import chance
from mm_core.evaluation.evaluator import EvaluationSpec, Evaluator
from mm_core.models.family import build_model
from mm_core.models.sizes import SpecialTokens
from mm_core.ranks import Ranks
from mm_core.training.precision import autocast
from mm_core.training.step import TrainStep
from pipelines.train.config import TrainRun
from pipelines.train.parts import Model, wrapped

_LAST_S = 600
"""How long a run waits at its end for an evaluation in the background, seconds."""

Metrics = dict[str, float]
Log = Callable[[int, Metrics], None]
Warn = Callable[[str], None]
"""Takes what a person should know."""


@dataclass(frozen=True)
class EvaluationTask:
    """What every rank is told."""

    spec: EvaluationSpec
    actor: ray.actor.ActorHandle | None
    """A `SnapshotEvaluator` where evaluations run in the background."""


def evaluation_of(task: EvaluationTask | None, train_step: TrainStep, steps: int, log: Log, warn: Warn) -> Callable[[int], Metrics | None]:
    """What the loop calls on every rank after a step at which an evaluation is due."""
    if task is None:
        return lambda step: None
    if task.actor is None:
        return OnRanks(task.spec, train_step, log)
    return InBackground(task.actor, train_step, steps, log, warn)


class OnRanks:
    """Each rank encodes its share while training waits."""

    def __init__(self, spec: EvaluationSpec, train_step: TrainStep, log: Log) -> None:
        self._evaluator = Evaluator(spec, Ranks(train_step.device))
        self._train_step, self._log = train_step, log

    def __call__(self, step: int) -> Metrics:
        """A collective.

        Raises:
            MMError: the data cannot be measured, on one rank or all.
        """
        with self._train_step.evaluating() as model:
            metrics = self._evaluator(model)
        self._log(step, metrics)
        return metrics


class InBackground:
    """Rank 0 hands snapshots to the actor, one at a time; one that is due while another is measured is left out and counted."""

    def __init__(self, actor: ray.actor.ActorHandle, train_step: TrainStep, steps: int, log: Log, warn: Warn) -> None:
        self._actor, self._train_step, self._steps, self._log, self._warn = actor, train_step, steps, log, warn
        self._ranks = Ranks(train_step.device)
        self._running: Future[Metrics | None] | None = None
        self._left_out = 0

    def __call__(self, step: int) -> Metrics | None:
        """A collective. Waits at the last step alone, ten minutes at most; only then are there metrics to return."""
        last = step == self._steps
        if last:
            self._finished()
        if not self._ranks.from_first(self._running is None or self._running.done()):
            self._left_out += 1
            self._log(step, {"eval/left_out": self._left_out})
            return None
        snapshot = self._snapshot()
        if snapshot is not None:
            self._running = self._start(step, snapshot)
        found: Metrics | None = self._ranks.from_first(self._finished()) if last else None
        return found

    def _snapshot(self) -> ray.ObjectRef | None:
        """The weights that an evaluation now would see, on rank 0; elsewhere None."""
        whole = StateDictOptions(full_state_dict=True, cpu_offload=True)  # on rank 0 alone
        with self._train_step.evaluating():
            state = get_model_state_dict(self._train_step.model.module, options=whole)
            return ray.put(state) if self._ranks.rank == 0 else None

    def _start(self, step: int, snapshot: ray.ObjectRef) -> Future[Metrics | None]:
        """Done once its metrics are logged; None where there are none, as whatever goes wrong there, training goes on."""
        ended: Future[Metrics | None] = Future()
        log, warn = self._log, self._warn  # not self, which has the model: a rollback may come first

        def tell(done: Future[Metrics]) -> None:  # in a thread of Ray's
            metrics = None
            if (error := done.exception()) is None:
                metrics = done.result()
                log(step, metrics)
            else:
                warn(f"the evaluation of step {step:,} in the background failed, training goes on: {_line(error)}")
            ended.set_result(metrics)

        self._actor.evaluate.remote(snapshot).future().add_done_callback(tell)
        return ended

    def _finished(self) -> Metrics | None:
        """Wait for what is running; its metrics, if it ends well and in time."""
        if self._running is None:
            return None
        try:
            return self._running.result(timeout=_LAST_S)
        except TimeoutError:
            self._warn(f"an evaluation in the background did not end within {_LAST_S} s, and was not waited for any longer")
            return None


def _line(error: BaseException) -> str:
    return next((line.strip() for line in reversed(str(error).splitlines()) if line.strip()), repr(error))


class SnapshotEvaluator:
    """The actor. Its model is built at the first call: what a constructor raises is lost in Ray's report of a dead actor."""

    def __init__(self, spec: EvaluationSpec, run: TrainRun, tokens: SpecialTokens | None) -> None:
        self._spec, self._run, self._tokens = spec, run, tokens
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    @cached_property
    def _model(self) -> Model:
        if self._device.type == "cpu":
            torch.set_num_threads(1)  # the processor it has booked
        model = wrapped(self._run, build_model(self._run.model, self._tokens))
        model.attend_for(self._device)
        return model.to(self._device).eval()

    @cached_property
    def _evaluator(self) -> Evaluator:
        return Evaluator(self._spec, Ranks(self._device))

    @ray.method(max_task_retries=0)  # type: ignore[untyped-decorator]  # what is lost is lost; the next waits for a new process
    def evaluate(self, state: dict[str, Tensor]) -> dict[str, float]:
        self._model.load_state_dict(state)
        with torch.no_grad(), autocast(self._run.precision, self._device):
            return self._evaluator(self._model)


def start_background(
    spec: EvaluationSpec, run: TrainRun, tokens: SpecialTokens | None, gpus_per_worker: float
) -> ray.actor.ActorHandle | None:
    """An actor beside the ranks; None where the cluster has no GPU, or without GPUs no processor, beyond what they use."""
    kind = "GPU" if gpus_per_worker else "CPU"
    taken = run.resources.workers * (gpus_per_worker or 1)  # without GPUs each rank's stream has a processor
    if ray.cluster_resources().get(kind, 0) < taken + 1:
        return None
    options: dict[str, Any] = {"num_gpus": 1, "num_cpus": 0} if gpus_per_worker else {"num_cpus": 1}
    options |= {"max_restarts": -1, "max_task_retries": -1}
    actor: ray.actor.ActorHandle = ray.remote(SnapshotEvaluator).options(**options).remote(spec, run, tokens)
    return actor


def evaluation_line(step: int, metrics: dict[str, float]) -> str:
    """An evaluation in a line, what guessing gives in brackets."""
    parts = [f"{label} {value:.1%} (chance {guess:.1%})" for label, value, guess in _beside_chance(metrics)]
    parts += [f"held-out loss {metrics['eval/loss']:.3f}"] if "eval/loss" in metrics else []
    left_out = "left out, as the one before is not done: a smaller evaluation.max_samples or more steps between them"
    return f"step {step:,}: {'   '.join(parts) or left_out}"


def _beside_chance(metrics: dict[str, float]) -> Iterator[tuple[str, float, float]]:
    shown = (("retrieval", {"t2i_r1": "R@1 text → image", "i2t_r1": "image → text"}), ("zeroshot", {"top1": "zero-shot"}))
    for kind, labels in shown:
        found = {name.removeprefix(f"eval/{kind}/"): value for name, value in metrics.items() if name.startswith(f"eval/{kind}/")}
        if found:
            yield from ((label, found[key], chance(found)[key]) for key, label in labels.items())
