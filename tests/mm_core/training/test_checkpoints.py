"""Checkpoints: what is saved comes back, what cannot be used is one clear error, what is under way when a run dies is not there."""

from __future__ import annotations

import dataclasses
import io
import logging
import os
import pickle
from datetime import timedelta
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.distributed_c10d import _world

from mm_core.errors import CheckpointError
from mm_core.store import open_store, write_whole
from mm_core.training.checkpoint import CheckpointState, load_checkpoint, load_weights, read_state
from mm_core.training.checkpoints import BestIs, CheckpointFolder, CheckpointWriter, LateMetrics, Retention
from mm_core.training.ema import WeightMean

pytestmark = pytest.mark.usefixtures("process_group")


@pytest.fixture(params=["local", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> CheckpointFolder:
    """On the disk, and in a store that only fsspec knows."""
    return CheckpointFolder(str(tmp_path / "run") if request.param == "local" else f"memory://{tmp_path.name}/run")


def state_at(step: int) -> CheckpointState:
    return CheckpointState(step=step, chunks_consumed=12, plan_fingerprint="p", data_fingerprint="d", config={}, code_revision="r")


def trained(width: int = 4, seed: int = 0) -> tuple[nn.Linear, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = nn.Linear(width, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, width)).sum().backward()
    optimizer.step()
    return model, optimizer


def writer_of(folder: CheckpointFolder, *parts: Any, reach_back: int = 0, **retention: Any) -> CheckpointWriter:
    return CheckpointWriter(folder, *(parts or trained()), retention=Retention(**retention), reach_back=reach_back)


def saved(folder: CheckpointFolder, *parts: Any) -> str:
    writer = writer_of(folder, *parts)
    writer.save(state_at(3), {}, wait=True)
    writer.close()
    return folder.at(3)


def test_what_was_saved_comes_back(folder: CheckpointFolder) -> None:
    url = saved(folder)
    expected, (model, optimizer) = trained()[0], trained(seed=1)
    load_checkpoint(url, model, optimizer)
    torch.testing.assert_close(model.state_dict(), expected.state_dict())
    alone = nn.Linear(4, 2)
    load_weights(url, alone)
    torch.testing.assert_close(alone.state_dict(), expected.state_dict())
    assert read_state(url) == state_at(3)
    assert folder.steps() == [3]


def test_training_goes_on_while_the_state_of_its_step_is_written(folder: CheckpointFolder) -> None:
    model, optimizer = trained()
    before = model.weight.detach().clone()
    writer = writer_of(folder, model, optimizer)
    for step in (1, 2):  # the second is copied to where the first one was
        writer.save(state_at(step), {"loss": 2.0})
        with torch.no_grad():
            model.weight.add_(1)
    writer.finish()
    for step in (1, 2):
        alone = nn.Linear(4, 2)
        load_weights(folder.at(step), alone)
        torch.testing.assert_close(alone.weight.detach(), before + step - 1)
    assert folder.metrics() == {1: {"loss": 2.0}, 2: {"loss": 2.0}}


def test_the_mean_of_the_weights_is_what_is_exported(folder: CheckpointFolder) -> None:
    model, optimizer = trained()
    mean, first = WeightMean(model, 0.75), model.weight.detach().clone()
    history = [first]
    for step in range(30):
        optimizer.step()
        mean.update(step)
        decay = min(0.75, (1 + step) / (10 + step))
        history.append(decay * history[-1] + (1 - decay) * model.weight.detach())
    torch.testing.assert_close(mean.state["weight"], history[-1])
    url = saved(folder, model, optimizer, mean)

    exported = nn.Linear(4, 2)
    load_weights(url, exported, WeightMean(exported, 0.75))
    torch.testing.assert_close(exported.weight.detach(), history[-1])
    other, other_optimizer = trained(seed=1)
    resumed = WeightMean(other, 0.75)
    load_checkpoint(url, other, other_optimizer, resumed)
    torch.testing.assert_close(other.weight.detach(), model.weight.detach())
    torch.testing.assert_close(resumed.state["weight"], history[-1])


def test_another_model_or_a_damaged_file_is_one_line(tmp_path: Path) -> None:
    url = saved(CheckpointFolder(str(tmp_path)))
    message = rf"^the checkpoint {url} is damaged or of another model: \w+: [^\n]+$"
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(url, *trained(width=5))
    with pytest.raises(CheckpointError, match=message):
        load_weights(url, nn.Linear(5, 2))
    (data,) = Path(url).glob("*.distcp")
    data.write_bytes(data.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=message.replace(": [^", "[^").replace(r"\n]+", r"\n]*")):
        load_checkpoint(url, *trained())
    with pytest.raises(CheckpointError, match="damaged or of another model"):
        load_weights(url, nn.Linear(4, 2))


class Payload:
    """What a tampered file holds: reading it would make a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


def test_a_tampered_checkpoint_runs_nothing(folder: CheckpointFolder, tmp_path: Path) -> None:
    """Neither by what torch unpickles to find its way, nor by what is no tensor."""
    url, done = saved(folder), tmp_path / "done"
    fs, path = open_store(url)
    good = fs.cat_file(f"{path}/.metadata")
    fs.pipe_file(f"{path}/.metadata", pickle.dumps(Payload(done)))
    with pytest.raises(CheckpointError, match=r"names posix\.mkdir, which no checkpoint is made of"):
        load_checkpoint(url, *trained())
    with pytest.raises(CheckpointError, match=r"names posix\.mkdir"):
        load_weights(url, nn.Linear(4, 2))

    metadata = pickle.loads(good)
    index, place = next((index, place) for index, place in metadata.storage_data.items() if "param_groups" in index.fqn)
    harmful = io.BytesIO()
    torch.save(Payload(done), harmful)
    metadata.storage_data[index] = dataclasses.replace(place, relative_path="harm", offset=0, length=len(harmful.getvalue()))
    fs.pipe_file(f"{path}/harm", harmful.getvalue())
    fs.pipe_file(f"{path}/.metadata", pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match="damaged or of another model"):
        load_checkpoint(url, *trained())
    assert not done.exists()


def test_one_that_is_not_whole_is_not_there_and_is_written_anew(folder: CheckpointFolder, tmp_path: Path) -> None:
    writer = writer_of(folder)
    writer.save(state_at(1), {}, wait=True)
    writer.save(state_at(2), {}, wait=True)
    fs, path = __import__("fsspec").core.url_to_fs(folder.at(2))
    fs.rm_file(f"{path}/state.json")  # as a kill before the end leaves it
    assert folder.newest() == 1
    with pytest.raises(CheckpointError, match="is no checkpoint of mm"):
        read_state(folder.at(2))
    writer.save(state_at(2), {}, wait=True)
    assert folder.steps() == [1, 2]


def test_the_newest_those_at_multiples_and_the_best_stay(folder: CheckpointFolder) -> None:
    writer = writer_of(folder, keep=2, keep_every_steps=40, best_metric="eval/loss", best_is="lowest")
    for step, loss in {10: 3.0, 20: 1.0, 30: 2.0, 40: 4.0, 50: 1.5, 60: 2.5, 70: 2.0}.items():
        writer.save(state_at(step), {"eval/loss": loss})
    writer.finish()
    assert folder.steps() == [20, 40, 60, 70]
    folder.add_metrics(60, {"eval/loss": 0.5})  # measured later, beside training
    writer.save(state_at(80), {}, wait=True)
    writer.save(state_at(90), {}, wait=True)
    assert folder.steps() == [40, 60, 80, 90]


def test_what_was_measured_is_read_only_where_something_is_chosen_by_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A folder in the place of the figures cannot be read."""
    for named, warned in ((None, False), ("loss", True)):
        folder = CheckpointFolder(str(tmp_path / str(named)))
        writer = writer_of(folder, keep=5, best_metric=named)
        writer.save(state_at(1), {}, wait=True)
        Path(folder.at(1), "metrics.json").mkdir()
        writer.save(state_at(2), {}, wait=True)
        assert folder.steps() == [1, 2]
        assert ("could not be removed" in caplog.text) is warned


def test_one_is_old_enough_to_go_back_to() -> None:
    metrics: dict[int, dict[str, float]] = {step: {} for step in range(0, 100, 10)}
    assert Retention(keep=1).kept(metrics, reach_back=25) == {60, 90}
    assert Retention(keep=1).kept(metrics, reach_back=500) == {90}


def test_the_best_is_by_the_metric_and_the_later_of_equals() -> None:
    metrics = {1: {"r": 0.5}, 2: {"r": 0.7}, 3: {"r": 0.7}, 4: {}}
    assert Retention(best_metric="r").best(metrics) == 3
    assert Retention(best_metric="r", best_is=BestIs.LOWEST).best(metrics) == 1
    assert Retention(best_metric="other").best(metrics) is None
    assert Retention().best(metrics) is None


def test_what_is_measured_before_a_checkpoint_is_whole_reaches_it(folder: CheckpointFolder) -> None:
    writer, late = writer_of(folder, keep=9), LateMetrics(folder)
    late.add(2, {"eval/loss": 2.0})
    late.add(3, {"eval/loss": 3.0})
    for step in (1, 2):
        writer.save(state_at(step), {"loss": 1.0}, wait=True)
    late.hand_on()
    writer.save(state_at(4), {}, wait=True)
    late.hand_on()  # no checkpoint will be of step 3
    assert folder.metrics() == {1: {"loss": 1.0}, 2: {"loss": 1.0, "eval/loss": 2.0}, 4: {}}


def test_going_back_removes_what_is_newer(folder: CheckpointFolder) -> None:
    writer = writer_of(folder, keep=9)
    for step in (1, 2, 3):
        writer.save(state_at(step), {}, wait=True)
    folder.remove_after(1)
    assert folder.steps() == [1]


def test_a_closed_writer_leaves_no_process_group_but_one_in_use(folder: CheckpointFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    before, going_on = len(_world.pg_map), Event()
    saved(folder)
    assert len(_world.pg_map) == before
    monkeypatch.setattr("mm_core.training.checkpoints.write_whole", lambda url, data: going_on.wait())
    writer = writer_of(folder)
    writer.save(state_at(4), {})
    writer.close()
    assert len(_world.pg_map) == before + 1
    going_on.set()
    writer.finish()


def test_a_store_that_fails_once_is_borne_and_twice_ends_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = CheckpointFolder(str(tmp_path / "run"))
    writer = writer_of(folder)
    writer.save(state_at(1), {}, wait=True)
    with monkeypatch.context() as patched:
        patched.setattr("mm_core.training.checkpoints.write_whole", _no_space)
        with caplog.at_level(logging.WARNING):
            writer.save(state_at(2), {})
            writer.finish()
        assert "could not be written" in caplog.text
        assert folder.steps() == [1]
        writer.save(state_at(3), {})
        with pytest.raises(CheckpointError, match=r"No space left.*, twice in a row: look at the store"):
            writer.finish()
    assert folder.steps() == [1]


def test_the_last_one_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After it there is no next one: without it an older model would be exported as if it were this one."""
    folder = CheckpointFolder(str(tmp_path / "run"))
    writer, fails = writer_of(folder), [True]

    def fail_once(url: str, data: bytes) -> None:
        if fails:
            fails.clear()
            _no_space(url, data)
        write_whole(url, data)

    monkeypatch.setattr("mm_core.training.checkpoints.write_whole", fail_once)
    writer.save(state_at(1), {}, wait=True)
    assert folder.steps() == [1]
    monkeypatch.setattr("mm_core.training.checkpoints.write_whole", _no_space)
    with pytest.raises(CheckpointError, match="twice in a row"):
        writer.save(state_at(2), {}, wait=True)
    assert folder.steps() == [1]


def test_a_store_that_does_not_answer_is_no_damage(folder: CheckpointFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that starts again may find it well."""
    url = saved(folder)

    def refuse(*arguments: Any, **named: Any) -> None:
        raise ConnectionResetError(104, "Connection reset by peer")

    monkeypatch.setattr("mm_core.training.guarded_read._metadata", refuse)
    with pytest.raises(OSError, match="could not be read: ConnectionResetError") as caught:
        load_checkpoint(url, *trained())
    assert not isinstance(caught.value, CheckpointError)


class Stubborn(CheckpointFolder):
    """A store that fails when what was left at step 2 is to be removed."""

    def remove(self, step: int) -> None:
        if step == 2:
            raise IsADirectoryError(21, "Is a directory")
        super().remove(step)


def _save_four(rank: int, folder: str, rendezvous: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2, timeout=timedelta(seconds=30))
    model, optimizer = trained()
    writer = writer_of(Stubborn(folder) if rank == 0 else CheckpointFolder(folder), model, optimizer, keep=9)
    for step in (1, 2, 3, 4):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(step)
        writer.save(state_at(step), {})
        writer.finish()
    writer.close()
    dist.destroy_process_group()


def test_ranks_give_up_a_checkpoint_together_and_none_is_of_two_steps(tmp_path: Path) -> None:
    """Rank 0 alone cannot begin the second one. Giving up alone, it would have been one ahead of the other rank from then on."""
    folder = CheckpointFolder(str(tmp_path / "run"))
    mp.start_processes(_save_four, (folder.url, str(tmp_path / "of-two")), nprocs=2, start_method="forkserver")
    assert folder.steps() == [1, 3, 4]
    for step in folder.steps():
        alone = nn.Linear(4, 2)
        load_weights(folder.at(step), alone)
        assert {value for p in alone.parameters() for value in p.flatten().tolist()} == {step}


def _lose_a_peer(rank: int, folder: str, rendezvous: str, said: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2, timeout=timedelta(seconds=30))
    writer = writer_of(CheckpointFolder(folder))
    writer.save(state_at(1), {}, wait=True)
    if rank == 0:
        try:
            writer.save(state_at(2), {}, wait=True)
        except Exception as error:
            Path(said).write_text(repr(error))
    os._exit(0)


def test_a_peer_that_is_gone_is_no_fault_of_the_store(tmp_path: Path) -> None:
    """As a node that is taken away while it writes its last one: what would end the run is none of mm's own errors, and all begin again."""
    folder, said = CheckpointFolder(str(tmp_path / "run")), tmp_path / "said"
    mp.start_processes(_lose_a_peer, (folder.url, str(tmp_path / "of-two"), str(said)), nprocs=2, start_method="forkserver")
    assert said.read_text().startswith("RuntimeError(")
    assert folder.steps() == [1]


def test_what_a_kill_left_unfinished_goes_with_what_is_old(folder: CheckpointFolder) -> None:
    writer = writer_of(folder, keep=1)
    for step in (1, 3):
        folder.add_metrics(step + 1, {"loss": 1.0})  # begun, and killed before it was whole
        writer.save(state_at(step), {}, wait=True)
    assert folder.begun() == [3, 4]


def _no_space(url: str, data: bytes) -> None:
    raise OSError(28, "No space left on device")
