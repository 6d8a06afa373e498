"""The discrete VAE: a bound that is what it says, a choice that hardens, and an encoder that transformers loads."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from transformers import FlavaImageCodebook

from mm_core.bundle import load_bundle, write_bundle
from mm_core.distributed import GlobalBatch
from mm_core.errors import BundleError, ConfigError
from mm_core.models.codebook import CodebookSizes, codebook_pixels, codebook_sizes, from_codebook_pixels, load_codebook
from mm_core.models.dvae import DiscreteVae, DvaeBatch, DvaeConfig, build_codebook
from mm_core.objectives.codebook import CodebookObjective, CodebookObjectiveConfig, divergence_from_even, logit_laplace_loss

CONFIG = DvaeConfig(image_size=16, codebook=CodebookSizes(width=8, blocks_per_group=1, entries=6), decoder_width=8, bottleneck=8)


def model_of() -> DiscreteVae:
    torch.manual_seed(0)
    return DiscreteVae(build_codebook(CONFIG), CONFIG)


def stripes(count: int) -> torch.Tensor:
    """Pictures of four blocks, each in one of three colours."""
    colours = torch.tensor([[250, 20, 20], [20, 250, 20], [20, 20, 250]], dtype=torch.uint8)
    chosen = torch.randint(0, 3, (count, 2, 2), generator=torch.Generator().manual_seed(1))
    return colours[chosen].repeat_interleave(8, 1).repeat_interleave(8, 2)


def test_the_likelihood_is_a_density() -> None:
    """Its integral over (0, 1) is 1, whatever location and scale."""
    x = torch.linspace(1e-5, 1 - 1e-5, 200_001, dtype=torch.float64)
    for location, log_scale in ((0.0, -0.7), (1.5, -1.0), (-2.0, -1.5)):
        parameters = torch.tensor([location] * 3 + [log_scale] * 3, dtype=torch.float64).view(1, 6, 1, 1)
        density = torch.stack([torch.exp(-logit_laplace_loss(parameters, one.expand(1, 3, 1, 1))) for one in x[::200]])
        assert float(torch.trapezoid(density, x[::200])) == pytest.approx(1, abs=0.02)


def test_the_divergence_is_nothing_for_even_use_and_most_for_one_entry() -> None:
    assert float(divergence_from_even(torch.zeros(2, 6, 3, 3))) == pytest.approx(0, abs=1e-6)
    sure = torch.zeros(2, 6, 3, 3)
    sure[:, 2] = 100
    assert float(divergence_from_even(sure)) == pytest.approx(math.log(6), abs=1e-4)


def test_the_choice_hardens_and_the_weight_grows() -> None:
    config = CodebookObjectiveConfig()
    assert (config.temperature_at(0), config.temperature_at(1)) == (1, 1 / 16)
    assert (config.kl_weight_at(0), config.kl_weight_at(1)) == (0, 6.6)
    steps = [config.temperature_at(p / 20) for p in range(21)]
    assert steps == sorted(steps, reverse=True)


def test_it_learns_pictures_and_its_entries_say_them_apart() -> None:
    model, objective = model_of(), CodebookObjective(CodebookObjectiveConfig(usage_weight=0.1))
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    losses = []
    for step in range(100):
        batch = DvaeBatch(stripes(16), 1 - 0.9 * step / 100, 0.1, GlobalBatch((16,)))
        loss = objective(model(batch), batch, [16])
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()
        losses.append(float(loss.terms["reconstruction"].detach()))
    assert losses[-1] < losses[0] - 1
    error = (model.reconstruct(stripes(16)).float() - stripes(16)).abs().mean()
    assert error < 60  # of the best single colour 77
    assert 2.5 < float(loss.measures["codebook/perplexity"]) <= 6
    colours = stripes(16)[:, ::8, ::8].argmax(dim=-1).flatten()
    entries = model.model.get_codebook_indices(codebook_pixels(stripes(16), 16)).flatten()
    assert all(len(colours[entries == entry].unique()) == 1 for entry in entries.unique())


def test_pixels_go_there_and_back() -> None:
    images = torch.randint(0, 256, (2, 16, 16, 3), dtype=torch.uint8)
    assert torch.equal(from_codebook_pixels(codebook_pixels(images, 16)), images)
    assert codebook_pixels(images, 8).shape == (2, 3, 8, 8)


def test_a_bundle_of_it_is_a_codebook_for_transformers_and_for_flava(tmp_path: Path) -> None:
    model = model_of()
    arguments = {"tokenizer": None, "config": CONFIG, "recipe": "codebook-tiny", "data_fingerprint": "f", "metrics": {}}
    write_bundle(tmp_path / "book", model=model.model, beside=model.beside, **arguments)  # type: ignore[arg-type]
    pixels = codebook_pixels(stripes(3), 16)
    theirs = FlavaImageCodebook.from_pretrained(tmp_path / "book")
    assert torch.equal(theirs.get_codebook_indices(pixels), model.model.get_codebook_indices(pixels))
    assert codebook_sizes(str(tmp_path / "book")) == CONFIG.codebook
    assert not any(p.requires_grad for p in load_codebook(str(tmp_path / "book")).parameters())
    with pytest.raises(BundleError, match=r"is a codebook, which has no towers.*model\.codebook_source"):
        load_bundle(tmp_path / "book")


def test_a_side_that_the_strides_do_not_divide_is_refused() -> None:
    with pytest.raises(ConfigError, match="20 of a codebook is no multiple of 8"):
        build_codebook(CONFIG.model_copy(update={"image_size": 20}))
