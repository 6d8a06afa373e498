"""Balance of tasks: what the learned weights come to, and what is logged of the tasks' pull, against gradients taken by hand."""

from __future__ import annotations

import math

import pytest
import torch

from mm_core.distributed import GlobalBatch
from mm_core.objectives.balance import BalanceConfig, damping, gradnorm_loss, gradnorm_weights, pulls_of, uncertainty_terms

ALONE = GlobalBatch((4,))


def test_steps_of_every_kind_are_probed() -> None:
    """Where sources come by turns, every fiftieth step may be of one of them alone."""
    config = BalanceConfig(probe_every_steps=50)
    probed = [step for step in range(20_000) if config.probes(step)]
    assert len(probed) == pytest.approx(400, rel=0.15)
    assert len({step % 5 for step in probed}) == 5
    assert not any(BalanceConfig().probes(step) for step in range(100))
    assert BalanceConfig(modulation=0.5).probes(3)


def test_a_variance_settles_where_its_weight_is_half_over_the_loss() -> None:
    """exp(-s) L + s / 2 is least at exp(-s) = 1 / (2 L)."""
    s = torch.zeros((), requires_grad=True)
    optimizer = torch.optim.Adam([s], lr=0.05)
    for _ in range(600):
        optimizer.zero_grad()
        uncertainty_terms({"itm": torch.tensor(3.0)}, {"itm": s}, 1)["itm"].backward()
        optimizer.step()
    assert float(torch.exp(-s.detach())) == pytest.approx(1 / 6, rel=1e-2)


def test_gradnorm_gives_tasks_that_pull_less_more_weight() -> None:
    """With losses that fall alike, weighted norms become equal."""
    logits = [torch.zeros((), requires_grad=True) for _ in range(3)]
    norms, losses = torch.tensor([4.0, 1.0, 2.0]), torch.tensor([1.0, 1.0, 1.0])
    optimizer = torch.optim.Adam(logits, lr=0.01)
    for _ in range(1500):
        optimizer.zero_grad()
        gradnorm_loss(gradnorm_weights(logits), norms, losses, [2.0, 2.0, 2.0], 1.5).backward()
        optimizer.step()
    weights = gradnorm_weights(logits).detach()
    assert float(weights.sum()) == pytest.approx(3)
    pulls = weights * norms
    assert float(pulls.max() / pulls.min()) < 1.15


def test_a_task_that_learns_slowly_is_to_pull_more() -> None:
    logits = [torch.zeros((), requires_grad=True) for _ in range(2)]
    loss = gradnorm_loss(gradnorm_weights(logits), torch.ones(2), torch.tensor([1.9, 0.5]), [2.0, 2.0], 1.5)
    slow, fast = torch.autograd.grad(loss, logits)
    assert slow < 0 < fast  # its weight grows


def test_pulls_are_the_gradients_at_the_tokens() -> None:
    torch.manual_seed(0)
    weight = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
    inputs = torch.randn(2, 4, 3, dtype=torch.float64)
    image, text = inputs @ weight, (inputs + 1) @ weight
    first, second = (image * 2).sum() + text.square().sum(), image.square().sum()
    found = pulls_of([first, second], [image, text], ALONE)
    expected = [torch.cat([torch.full_like(image, 2).flatten(), (2 * text).flatten()])]
    expected.append(torch.cat([(2 * image).flatten(), torch.zeros_like(text).flatten()]))
    matrix = torch.stack(expected).detach()
    torch.testing.assert_close(found.gram, matrix @ matrix.T)
    torch.testing.assert_close(found.by_tower[1], torch.stack([(2 * image).square().sum(), torch.zeros((), dtype=torch.float64)]).detach())
    measures = found.measures(["a", "b"], 1)
    cosine = torch.nn.functional.cosine_similarity(matrix[0], matrix[1], dim=0)
    assert float(measures["gradient_cosine/a-b"]) == pytest.approx(float(cosine))
    (first + second).backward()  # the graph is still there
    assert weight.grad is not None


def test_the_tower_that_is_pulled_harder_is_damped_alone() -> None:
    image, text = damping(torch.tensor([16.0, 4.0]), 0.5).tolist()
    assert image == pytest.approx(1 - math.tanh(0.5 * (4 / 2 - 1)))
    assert text == 1
    assert damping(torch.tensor([3.0, 3.0]), 0.5).tolist() == [1, 1]
