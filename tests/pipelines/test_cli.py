"""What a person meets at the command line: configuration from four places, dry runs, and one clear line for wrong input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

import mm
from mm_core.config import resolve
from mm_core.data.index import Index
from mm_core.data.ledger import compile_kept
from mm_core.errors import ConfigError, DataError, MMError
from pipelines.cli import _next, resolve_run
from pipelines.index import build_index
from pipelines.recipes import RECIPES, recipe

pytestmark = pytest.mark.usefixtures("ray_cluster")


def run(*arguments: str) -> str:
    result = CliRunner().invoke(mm.app, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def refused(*arguments: str) -> MMError:
    with pytest.raises(MMError) as caught:
        CliRunner().invoke(mm.app, list(arguments), catch_exceptions=False)
    assert "\n" not in str(caught.value)
    return caught.value


@pytest.fixture(scope="module")
def index(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    return build_index([str(corpus / "train")], str(tmp_path_factory.mktemp("cli") / "index")).url


def test_later_sources_win_and_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "my.yaml"
    file.write_text("recipe: clip-tiny\nsteps: 7\noptimizer: {lr: 0.1, weight_decay: 0.3}\nseed: 5\n")
    monkeypatch.setenv("MM_SET__OPTIMIZER__LR", "2e-3")
    monkeypatch.setenv("MM_SET__SEED", "6")
    config, origins = resolve_run(str(file), ["seed=8"])
    assert (config.steps, config.optimizer.lr, config.optimizer.weight_decay, config.seed) == (7, 2e-3, 0.3, 8)
    assert origins["steps"] == str(file)
    assert origins["optimizer.lr"] == "environment MM_SET__OPTIMIZER__LR"
    assert origins["seed"] == "--set seed"
    assert origins["global_batch_size"] == "recipe clip-tiny"


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("optimizer.lrr=1", "unknown key 'optimizer.lrr'.*did you mean 'optimizer.lr'"),
        ("setps=1", "did you mean 'steps'"),
        ("optimizer=1", "is a group; set one of optimizer.kind, optimizer.lr"),
        ("steps=many", "steps: Input should be a valid integer.*got 'many'"),
        ("steps=0", "steps: Input should be greater than 0"),
        ("steps", "not of the form key=value"),
    ],
)
def test_wrong_settings_are_explained(setting: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve(recipe("clip-tiny"), environment={}, overrides=[setting])


def test_recipes_are_complete_and_listed() -> None:
    assert all(make().recipe == name for name, make in RECIPES.items())
    assert json.loads(run("config", "recipes", "--json").splitlines()[-1])["recipes"] == list(RECIPES)
    assert "151.3 M" in run("config", "recipes")
    assert json.loads(run("config", "schema"))["title"] == "TrainRun"
    shown = json.loads(run("config", "show", "clip-vit-b32", "--json", "--set", "seed=3").splitlines()[-1])
    assert (shown["seed"], shown["model"]["patch_size"]) == (3, 32)


def test_dry_run_starts_nothing(index: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    asked = ("--workers", "3", "--set", "ema_decay=0.99", "--dry-run", "--json")
    report = json.loads(run("train", "clip-tiny", "--data", index, *asked).splitlines()[-1])
    assert (report["steps"], report["samples_kept"], report["global_batch_size"]) == (400, 330, 128)
    assert report["samples_per_rank_and_step"] == 48
    assert report["memory_mean_mb"] == round(4 * report["parameters"] / 1e6)
    assert not list(tmp_path.iterdir())


def test_dry_run_of_a_mix_says_how_often_each_source_is_read(corpus: Path, tmp_path: Path) -> None:
    first, second = (str(tmp_path / name) for name in "ab")
    for index, shard in ((first, "00000"), (second, "00001")):
        build_index([str(corpus / "train" / f"{shard}.tar")], index)
    run("data", "split", first, "--heldout", "0.2")
    mix = ("--set", "data.mix.weights=[3, 1]", "--set", "steps=100")
    report = json.loads(
        run("train", "clip-tiny", "--data", f"{first}#train", "--data", second, *mix, "--dry-run", "--json").splitlines()[-1]
    )
    kept = len(compile_kept(Index.open(first), ["train"]))
    assert 0 < kept < 100
    assert report["samples_kept"] == kept + 100
    assert report["epochs"] == {f"{first}#train": round(9600 / kept, 3), second: 32.0}


@pytest.mark.parametrize(
    ("arguments", "message", "code"),
    [
        (("train", "clip-tinny", "--data", "INDEX"), "unknown recipe 'clip-tinny'; did you mean 'clip-tiny'?", 2),
        (("train", "clip-tiny", "--data", "nowhere"), "no index at", 1),
        (("train", "clip-tiny", "--data", "INDEX", "--ledger", "x"), "has no ledger 'x'; it has: none", 1),
        (("train", "clip-tiny", "--data", "INDEX#x,y"), "has no ledger 'x'; it has: none", 1),
        (("train", "clip-tiny", "--data", "INDEX", "--set", "data.prompt_templates=[a photo]"), "has no {c} where the caption goes", 2),
        (("train", "clip-tiny", "--data", "INDEX", "--init", "./nothing"), "no tokenizer", 2),
        (("train", "clip-tiny", "--data", "INDEX", "--name", "../up"), "run name '../up' may have", 2),
        (("train", "clip-tiny", "--data", "INDEX", "--name", "n", "--resume"), "holds no run that can be continued", 1),
        (("train", "no.yaml", "--data", "INDEX"), "cannot read config file no.yaml", 2),
        (("train", "clip-tiny", "--data", "INDEX", "--set", "resources.gpus_per_worker=4"), "but the cluster has 0", 2),
        (("data", "index", "nothing/*.tar", "--out", "o"), "no shard at nothing/*.tar", 1),
        (("data", "index", "x.tar", "--out", "o", "--modality", "smell"), "--modality 'smell' is not one of image-text, image, text", 2),
        (("eval", "./nothing"), "nothing to evaluate: give --zeroshot", 2),
        (("eval", "./nothing", "--retrieval", "x"), "no bundle at", 1),
        (("eval", "nothing", "--retrieval", "x"), "no bundle at nothing", 1),
        (("eval", "runs/nothing/bundle", "--retrieval", "x"), "no bundle at runs/nothing/bundle", 1),
        (("eval", "memory://nothing", "--retrieval", "x"), "neither a bundle nor the folder of a finished run", 1),
        (("register", "nothing", "--name", "m"), "neither a bundle nor the folder of a finished run", 1),
        (("serve", "./nothing"), "no bundle at", 1),
    ],
)
def test_wrong_use_is_one_clear_line(
    arguments: tuple[str, ...], message: str, code: int, index: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    error = refused(*(argument.replace("INDEX", index) for argument in arguments))
    assert message in str(error)
    assert error.exit_code == code
    assert not list(tmp_path.iterdir()), "left something behind"


def test_shards_changed_since_they_were_indexed_stop_the_run(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shard = tmp_path / "s.tar"
    shard.write_bytes((corpus / "train" / "00000.tar").read_bytes())
    build_index([str(shard)], str(tmp_path / "index"))
    with shard.open("ab") as file:
        file.write(bytes(512))
    error = refused("train", "clip-tiny", "--data", str(tmp_path / "index"))
    assert isinstance(error, DataError)
    assert "s.tar had" in str(error)
    assert "index the shards again" in str(error)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("clip-tiny", ["mm eval b --retrieval", "mm serve b"]),
        ("flava-tiny", ["mm eval b --retrieval", "mm serve b"]),
        ("flava-tiny-classify", ["mm eval b --classify"]),
        ("codebook-tiny", ["model.codebook_source=b"]),
    ],
)
def test_a_runs_end_says_what_its_bundle_is_for(name: str, expected: list[str]) -> None:
    said = _next(recipe(name).objective.kind, "b")
    assert all(one in said for one in expected)
    assert ("mm serve" in said) == ("mm serve b" in expected)
