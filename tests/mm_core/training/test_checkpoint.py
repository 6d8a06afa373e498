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

STATE = CheckpointState(step=3, chunks_consumed=12, plan_fingerprint="p", data_fingerprint="d", config={}, code_revision="r")


@pytest.fixture(autouse=True)
def _alone(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def trained(width: int = 4, seed: int = 0) -> tuple[nn.Module, torch.optim.Optimizer]:
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
