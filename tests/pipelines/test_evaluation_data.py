"""What `evaluation.…` names is looked at before any worker starts; what goes wrong in the background stays there."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from mm_core.config import resolve
from mm_core.console import Console
from mm_core.data.ledger import Source
from mm_core.data.split import split
from mm_core.errors import ConfigError, DataError, ServiceError
from pipelines.index import build_index
from pipelines.recipes import recipe
from pipelines.tracking import TrackingConfig
from pipelines.train.config import EvaluationConfig, TrainRun
from pipelines.train.driver import TrainRequest, train
from pipelines.train.evaluation import InBackground, evaluation_line
from pipelines.train.evaluation_data import EvaluationData
from pipelines.train.run_data import RunData

pytestmark = pytest.mark.usefixtures("ray_cluster")


def run_of(**evaluation: Any) -> TrainRun:
    return recipe("clip-tiny").model_copy(update={"evaluation": EvaluationConfig(every_steps=5, **evaluation)})


@pytest.fixture(scope="module")
def data(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> RunData:
    index = build_index([str(corpus / "heldout")], str(tmp_path_factory.mktemp("evaluation") / "index"))
    split(index, heldout=0.5, seed=1)
    return RunData.open([Source(index=index.url, ledgers=("train",))])


def test_something_has_to_be_named() -> None:
    with pytest.raises(ConfigError, match=r"every_steps needs held-out data: set evaluation\.retrieval"):
        resolve(recipe("clip-tiny"), environment={}, overrides=["evaluation.every_steps=5"])
    assert recipe("clip-tiny").identity() == run_of(retrieval="x").identity()
    assert [done for done in range(1, 13) if run_of(retrieval="x").evaluation.due(done, 12)] == [5, 10, 12]


def test_what_cannot_be_measured_is_named_by_its_key(data: RunData, corpus: Path, tmp_path: Path) -> None:
    pictures = build_index([str(corpus / "heldout")], str(tmp_path / "pictures"), need=("image",))
    for retrieval, message in {
        str(tmp_path): r"evaluation\.retrieval: no index at",
        pictures.url: r"evaluation\.retrieval: .* was made for image, and this needs text",
        f"{data.indexes[0].url}#mine": r"evaluation\.retrieval: .*mine",
    }.items():
        with pytest.raises(DataError, match=message):
            EvaluationData.open(run_of(retrieval=retrieval), data, Console())
    with pytest.raises(DataError, match=r"evaluation\.zeroshot: no folder"):
        EvaluationData.open(run_of(zeroshot=str(tmp_path / "nothing")), data, Console())
    unlabelled = tmp_path / "unlabelled"
    unlabelled.mkdir()
    (unlabelled / "classnames.txt").write_text("a\nb\n")
    (unlabelled / "0.tar").write_bytes((corpus / "heldout" / "00000.tar").read_bytes())
    opened = EvaluationData.open(run_of(zeroshot=str(unlabelled)), data, Console())
    assert opened is not None
    with pytest.raises(DataError, match=r"evaluation\.zeroshot: .* have no class"), opened.index():
        pass


def test_a_start_that_fails_leaves_nothing_behind(data: RunData, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tracking store cannot be made, when the zero-shot samples' index is there already."""
    (tmp_path / "temporary").mkdir()
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    run = run_of(zeroshot=str(corpus / "zeroshot")).model_copy(
        update={"storage": str(tmp_path / "runs"), "tracking": TrackingConfig(uri=f"sqlite:///{tmp_path}/file/mlflow.db")}
    )
    with pytest.raises(ServiceError, match=r"mlflow\.db"):
        train(TrainRequest(run, data.sources, name="start"), Console(json=True))
    assert not list((tmp_path / "temporary").iterdir())
    assert not list((tmp_path / "runs").glob("*"))


def test_samples_that_are_trained_on_are_noted(data: RunData, capsys: pytest.CaptureFixture[str]) -> None:
    index = data.indexes[0].url
    EvaluationData.open(run_of(retrieval=f"{index}#heldout"), data, Console())
    assert "trained on too" not in capsys.readouterr().err
    EvaluationData.open(run_of(retrieval=index), data, Console())
    assert f"{len(data.kept[0])} of its 60 samples are trained on too" in " ".join(capsys.readouterr().err.split())


class Actor:
    """Ends an evaluation when the test says so."""

    def __init__(self) -> None:
        self.evaluate, self.running = self, Future[dict[str, float]]()

    def remote(self, snapshot: Any) -> Actor:
        self.running = Future()
        return self

    def future(self) -> Future[dict[str, float]]:
        return self.running


def test_the_loop_waits_for_no_evaluation_but_the_last() -> None:
    @contextmanager
    def evaluating() -> Iterator[None]:
        yield

    logged: list[tuple[int, dict[str, float]]] = []
    warned: list[str] = []
    step = SimpleNamespace(device=torch.device("cpu"), evaluating=evaluating, model=SimpleNamespace(module=nn.Linear(2, 2)))
    actor = Actor()
    evaluate = InBackground(actor, step, 50, lambda *one: logged.append(one), warned.append)  # type: ignore[arg-type]
    assert evaluate(10) is None
    assert evaluate(20) is None
    assert logged == [(20, {"eval/left_out": 1})]
    actor.running.set_result({"eval/loss": 1.0})
    assert logged[1:] == [(10, {"eval/loss": 1.0})]

    assert evaluate(30) is None
    actor.running.set_exception(RuntimeError("The actor died"))
    assert warned == ["the evaluation of step 30 in the background failed, training goes on: The actor died"]

    actor.remote = lambda snapshot: ended(actor)  # type: ignore[method-assign]
    assert evaluate(50) == {"eval/loss": 0.5}
    assert logged[2:] == [(50, {"eval/loss": 0.5})]


def ended(actor: Actor) -> Actor:
    actor.running = Future()
    actor.running.set_result({"eval/loss": 0.5})
    return actor


def test_a_line_shows_what_guessing_gives() -> None:
    found = {"t2i_r1": 0.123, "i2t_r1": 0.2, "images": 1000.0, "texts": 5000.0}
    line = evaluation_line(1500, {f"eval/retrieval/{name}": value for name, value in found.items()} | {"eval/loss": 2.0})
    assert line == "step 1,500: R@1 text → image 12.3% (chance 0.1%)   image → text 20.0% (chance 0.1%)   held-out loss 2.000"
    assert evaluation_line(20, {"eval/left_out": 1.0}).startswith("step 20: left out")
