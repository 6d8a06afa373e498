"""A checkpoint that cannot be used is one clear error, in training and for export."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from mm_core.errors import CheckpointError
from mm_core.training.checkpoint import CheckpointState, load_checkpoint, load_weights, read_state, save_checkpoint
from mm_core.training.ema import WeightMean

STATE = CheckpointState(step=3, chunks_consumed=12, plan_fingerprint="p", data_fingerprint="d", config={}, code_revision="r")


@pytest.fixture(autouse=True)
def _alone(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def trained(width: int = 4, seed: int = 0) -> tuple[nn.Linear, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = nn.Linear(width, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, width)).sum().backward()
    optimizer.step()
    return model, optimizer


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    save_checkpoint(tmp_path / "checkpoint", *trained(), STATE, rank=0)
    return tmp_path / "checkpoint"


def test_what_was_saved_comes_back(checkpoint: Path) -> None:
    expected, (model, optimizer) = trained()[0], trained(seed=1)
    load_checkpoint(checkpoint, model, optimizer)
    torch.testing.assert_close(model.state_dict(), expected.state_dict())
    alone = nn.Linear(4, 2)
    load_weights(checkpoint, alone)
    torch.testing.assert_close(alone.state_dict(), expected.state_dict())
    assert read_state(checkpoint) == STATE


def test_the_mean_of_the_weights_is_what_is_exported(tmp_path: Path) -> None:
    model, optimizer = trained()
    mean, first = WeightMean(model, 0.75), model.weight.detach().clone()
    history = [first]
    for step in range(30):
        optimizer.step()
        mean.update(step)
        decay = min(0.75, (1 + step) / (10 + step))
        history.append(decay * history[-1] + (1 - decay) * model.weight.detach())
    torch.testing.assert_close(mean.state["weight"], history[-1])
    save_checkpoint(tmp_path / "checkpoint", model, optimizer, STATE, rank=0, mean=mean)

    exported = nn.Linear(4, 2)
    load_weights(tmp_path / "checkpoint", exported, WeightMean(exported, 0.75))
    torch.testing.assert_close(exported.weight.detach(), history[-1])
    other, other_optimizer = trained(seed=1)
    resumed = WeightMean(other, 0.75)
    load_checkpoint(tmp_path / "checkpoint", other, other_optimizer, resumed)
    torch.testing.assert_close(other.weight.detach(), model.weight.detach())
    torch.testing.assert_close(resumed.state["weight"], history[-1])


def test_another_model_or_a_damaged_file_is_one_line(checkpoint: Path) -> None:
    message = rf"^the checkpoint {checkpoint} is damaged or of another model: \w+: [^\n]+$"
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(checkpoint, *trained(width=5))
    with pytest.raises(CheckpointError, match=message):
        load_weights(checkpoint, nn.Linear(5, 2))
    (data,) = checkpoint.glob("*.distcp")
    data.write_bytes(data.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=message.replace(": [^", "[^").replace(r"\n]+", r"\n]*")):
        load_checkpoint(checkpoint, *trained())
    with pytest.raises(CheckpointError, match="damaged or of another model"):
        load_weights(checkpoint, nn.Linear(4, 2))
