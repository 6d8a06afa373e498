"""What cannot be trained is refused by the command before Ray is even asked for, with the same words by a dry run."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

import mm
from mm_core.bundle import write_bundle
from mm_core.config import resolve
from mm_core.errors import BundleError, ConfigError
from mm_core.models.family import build_model
from mm_core.models.tokenizer import special_tokens, train_bpe
from pipelines.index import build_index
from pipelines.recipes import recipe


@pytest.fixture(scope="module")
def index(ray_cluster: None, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    return build_index([str(corpus / "train")], str(tmp_path_factory.mktemp("preflight") / "index")).url


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> str:
    """clip-tiny with a narrower joint space and a tokenizer of its own."""
    tokenizer = train_bpe(["a red circle", "two blue squares"] * 5, vocab_size=320, context_length=32)
    config = resolve(recipe("clip-tiny"), environment={}, overrides=["model.embed_dim=24", f"model.vocab_size={len(tokenizer)}"])[0].model
    folder = tmp_path_factory.mktemp("preflight") / "bundle"
    model = build_model(config, special_tokens(tokenizer))
    write_bundle(folder, model=model, tokenizer=tokenizer, config=config, recipe="clip-tiny", data_fingerprint="none", metrics={})
    return str(folder)


@pytest.fixture(autouse=True)
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    def started(**_: object) -> None:
        pytest.fail("Ray was asked for")

    monkeypatch.setattr("pipelines.train.driver.ray_session", started)


BATCH = [
    (
        "--set global_batch_size=100",
        "global_batch_size 100 is no multiple of the chunk of 16 samples: give 96 or 112, or a data.chunk that",
    ),
    (
        "--set global_batch_size=10",
        "global_batch_size 10 is no multiple of the chunk of 16 samples: give 16, or a data.chunk that divides it",
    ),
    ("--workers 9", "global_batch_size 128 is 8 chunks of 16 for 9 workers; use at most 8 workers, a larger batch or a smaller data.chunk"),
    ("--workers 2..9", "8 chunks of 16 for 9 workers; use at most 8 workers"),
    ("--set data.run_length=3", "a chunk of 16 samples is no whole number of runs of 3: give a data.run_length that divides it"),
]
PARALLEL = [
    (
        "--set parallel.kind=fsdp",
        "parallel.kind=fsdp divides the model among ranks, and there is one, or may be: give more with --workers, or leave it",
    ),
    ("--set parallel.kind=fsdp --workers 1", "parallel.kind=fsdp divides the model among ranks, and there is one"),
]


def refused(error: type[Exception], arguments: str, monkeypatch: pytest.MonkeyPatch, folder: Path) -> str:
    """What `mm train` says, which a dry run says too."""
    monkeypatch.chdir(folder)
    said = set()
    for more in ((), ("--dry-run",)):
        with pytest.raises(error) as caught:
            CliRunner().invoke(mm.app, ["train", *arguments.split(), *more], catch_exceptions=False)
        said.add(str(caught.value))
    assert not list(folder.iterdir()), "left something behind"
    (words,) = said
    assert "\n" not in words
    return words


@pytest.mark.parametrize(("arguments", "message"), [*BATCH, *PARALLEL])
def test_sizes_that_do_not_fit(arguments: str, message: str, index: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert message in refused(ConfigError, f"clip-tiny --data {index} {arguments}", monkeypatch, tmp_path)


def test_pieces_of_a_batch_that_is_normalised_whole(index: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = refused(ConfigError, f"align-tiny --data {index} --set parallel.micro_batch_size=8", monkeypatch, tmp_path)
    assert "BatchNorm" in words


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            "clip-tiny --init BUNDLE",
            "does not fit the recipe's model: embed_dim is 24 there, 128 here; choose the recipe it was trained with",
        ),
        ("siglip-tiny --init BUNDLE", "does not fit the recipe's model: model_type is clip there, siglip here"),
        (
            "clip-tiny --set objective.kind=distillation --set objective.teacher=BUNDLE --set model.image_size=48",
            "takes images of 64 pixels, the model 48: --set model.image_size=64",
        ),
    ],
)
def test_models_of_another_architecture(
    arguments: str, message: str, index: str, bundle: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = refused(BundleError, f"{arguments.replace('BUNDLE', bundle)} --data {index}", monkeypatch, tmp_path)
    assert bundle in words
    assert message in words


@pytest.mark.parametrize(("arguments", "message"), [*BATCH[:2], (BATCH[2][0].replace("--workers", "--gpus"), BATCH[2][1]), *PARALLEL[:1]])
def test_nor_is_it_counted_for_gpus_that_are_not_here(arguments: str, message: str) -> None:
    gpus = "" if "--gpus" in arguments else "--gpus 1"
    with pytest.raises(ConfigError) as caught:
        CliRunner().invoke(mm.app, ["train", "clip-tiny", "--dry-run", *f"{arguments} {gpus}".split()], catch_exceptions=False)
    assert message in str(caught.value)
