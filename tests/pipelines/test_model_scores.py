"""Scores by models: the values are the bundle's own, whoever computes them, and what would mislead is refused."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from typer.testing import CliRunner

import mm
from mm_core.bundle import MANIFEST, load_bundle, write_bundle
from mm_core.curation.ruleset import RuleSet
from mm_core.data import side_table
from mm_core.data.among import Among
from mm_core.data.columns import vectors_of
from mm_core.data.image import decode_centre
from mm_core.data.index import Index
from mm_core.data.ledger import Ledger, compile_kept
from mm_core.data.reader import IndexReader
from mm_core.data.sample import Sample
from mm_core.data.scores import Scores
from mm_core.data.side_table import SideTable
from mm_core.data.split import split, write_ledger
from mm_core.errors import BundleError, ConfigError, DataError
from mm_core.model_digest import model_digest
from mm_core.models.clip import ClipConfig, build_clip
from mm_core.models.sizes import TowerConfig
from mm_core.models.tokenizer import special_tokens, train_bpe
from pipelines import encode, encoded_table
from pipelines.curate import filter as filtering
from pipelines.curate import model_scores
from pipelines.curate.filter import filter_index
from pipelines.curate.folds import Fold, Folds
from pipelines.curate.model_scores import score_by_models
from pipelines.index import build_index

pytestmark = pytest.mark.usefixtures("ray_cluster")
ROWS = 330


def make_bundle(folder: Path, seed: int, data_fingerprint: str = "none", image_size: int = 32) -> str:
    torch.manual_seed(seed)
    tokenizer = train_bpe(["a red circle", "two blue squares"], vocab_size=300, context_length=16)
    tower = TowerConfig(width=32, layers=1, heads=2)
    config = ClipConfig(
        image_size=image_size, patch_size=16, context_length=16, vocab_size=len(tokenizer), embed_dim=16, vision=tower, text=tower
    )
    write_bundle(
        folder,
        model=build_clip(config, special_tokens(tokenizer)),
        tokenizer=tokenizer,
        config=config,
        recipe="clip-tiny",
        data_fingerprint=data_fingerprint,
        metrics={},
    )
    return str(folder)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_bundle(tmp_path_factory.mktemp("models") / "one", 0)


@pytest.fixture(scope="module")
def other_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_bundle(tmp_path_factory.mktemp("models") / "other", 1)


@pytest.fixture(scope="module")
def index(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Index:
    return build_index([str(corpus / "train")], str(tmp_path_factory.mktemp("scores") / "index"))


@pytest.fixture(scope="module", autouse=True)
def _small() -> Any:
    """Several chunks and blocks of this small index, in all tests, as actors keep what they were started with."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model_scores, "SMALL_CHUNK_ROWS", 100)
        patch.setattr(encoded_table, "_BLOCK_ROWS", 40)
        yield


@pytest.fixture(scope="module")
def embedded(index: Index, model: str) -> Index:
    score_by_models(index, "embeddings", [Fold(None, model)], actors=2)
    return index


def expected(index: Index, source: str) -> dict[str, np.ndarray]:
    """By the bundle itself, a sample at a time."""
    bundle = load_bundle(source)
    rows: dict[str, list[Any]] = {"similarity": [], "similarity_lowest": [], "image": [], "text": []}
    for sample in IndexReader(index).read(np.arange(ROWS, dtype=np.uint64)):
        assert isinstance(sample, Sample)
        image = bundle.image_features(decode_centre(sample.image or b"", bundle.image_size)[None])[0]
        texts = bundle.text_features(sample.captions)
        mean = texts.mean(axis=0)
        rows["similarity"].append((texts @ image).mean())
        rows["similarity_lowest"].append((texts @ image).min())
        rows["image"].append(image)
        rows["text"].append(mean / np.linalg.norm(mean))
    return {name: np.array(values) for name, values in rows.items()}


def divide(index: Index) -> None:
    """Ledgers a and b, that have no sample in common; part, of b; wordy, of both."""
    assert run("split", index.url, "--heldout", "0.5", "--seed", "3", "--names", "a,b").keys() == {"a", "b"}
    half = np.isin(np.arange(ROWS), compile_kept(index, ["b"]).ordinals) & (np.arange(ROWS) % 3 == 0)
    write_ledger(index, "part", rule="test", repeat=half.astype(np.float32), reason="not_in_part")
    filter_index(index, RuleSet.parse({"wordy": {"rule": "words", "min": 6}}, where="test"), "wordy")


def run(*arguments: str) -> dict[str, Any]:
    done = CliRunner().invoke(mm.app, ["data", *arguments, "--json"], catch_exceptions=False)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def table_of(index: Index, name: str) -> pa.Table:
    return pa.concat_tables(Scores(index, name).values.tables()).combine_chunks()


def files_of(index: Index, name: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(Path(Scores(index, name).url, "values").iterdir())}


def test_values_are_the_bundles_own(embedded: Index, model: str) -> None:
    found, wanted = table_of(embedded, "embeddings"), expected(embedded, model)
    for name in ("similarity", "similarity_lowest"):
        np.testing.assert_allclose(found[name].to_numpy(), wanted[name], atol=1e-5)
    for name in ("image", "text"):
        assert found[name].type == pa.binary(32)
        np.testing.assert_allclose(vectors_of(found[name], np.float16).astype(np.float32), wanted[name], atol=1e-3)
    summary = Scores(embedded, "embeddings").complete("")
    assert (summary.columns, summary.vectors) == (("similarity", "similarity_lowest"), {"image": 16, "text": 16})
    assert set(files_of(embedded, "embeddings")) == {f"0000{i}.parquet" for i in range(4)}
    assert found["problem"].null_count == ROWS


def test_one_actor_writes_what_two_do_and_a_stop_loses_no_finished_chunk(
    embedded: Index, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class StoppedError(Exception):
        pass

    seen = 0

    def stop(rows: int) -> None:
        nonlocal seen
        seen += rows
        if seen >= 250:
            until = time.monotonic() + 120
            while not Scores(embedded, "again").values.held():  # the first chunk is handed to a task, which may be slow
                assert time.monotonic() < until
                time.sleep(0.05)
            raise StoppedError

    with pytest.raises(StoppedError):
        score_by_models(embedded, "embeddings", [Fold(None, model)], name="again", actors=1, on_progress=stop)
    with pytest.raises(DataError, match=r"are not finished; to go on: mm data score \S+ embeddings"):
        Scores(embedded, "again").complete("embeddings")
    table = Scores(embedded, "again").values
    held = table.held()
    assert 0 < len(held) < 4
    stamps = {chunk: os.stat(f"{table.url}/{chunk:05d}.parquet").st_mtime_ns for chunk in held}

    made: list[int] = []
    write = encoded_table._blocks
    monkeypatch.setattr(
        encoded_table, "_blocks", lambda models_of, first, last: (made.append(first // 100), write(models_of, first, last))[1]
    )
    progress: list[int] = []
    score_by_models(embedded, "embeddings", [Fold(None, model)], name="again", actors=1, on_progress=progress.append)
    assert set(made) == {0, 1, 2, 3} - held
    assert sum(progress) == ROWS
    assert {chunk: os.stat(f"{table.url}/{chunk:05d}.parquet").st_mtime_ns for chunk in held} == stamps
    assert files_of(embedded, "again") == files_of(embedded, "embeddings")
    assert score_by_models(embedded, "embeddings", [Fold(None, model)], name="again").complete
    assert set(made) == {0, 1, 2, 3} - held


def test_other_weights_under_a_name_that_is_taken_are_refused(embedded: Index, model: str, other_model: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds scores by other settings.*another name"):
        score_by_models(embedded, "embeddings", [Fold(None, other_model)])
    copied = shutil.copytree(model, tmp_path / "elsewhere")
    assert model_digest(copied) == model_digest(model) != model_digest(other_model)
    assert score_by_models(embedded, "embeddings", [Fold(None, str(copied))]).complete

    (copied / MANIFEST).unlink()
    plain = model_digest(copied)
    (copied / "notes.md").write_text("not read")
    assert model_digest(copied) == plain
    with (copied / "model.safetensors").open("ab") as file:
        file.write(b" ")
    assert model_digest(copied) != plain


def test_a_worker_that_finds_another_model_says_so(index: Index, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    of = encode.Model.of
    monkeypatch.setattr(encode.Model, "of", lambda source, bundle: of(source, bundle)._replace(digest="0" * 64))
    with pytest.raises(BundleError, match="is another model here than where the job was started"):
        score_by_models(index, "similarity", [Fold(None, model)], name="changed")
    assert Scores(index, "changed").values.held() == set()


def test_folds_are_scored_by_their_own_models_and_the_rest_by_none(index: Index, model: str, other_model: str) -> None:
    divide(index)
    folds = [f"--fold=a={model}", f"--fold=part={other_model}"]
    said = run("score", index.url, "similarity", *folds, "--name", "crossed")
    assert (said["name"], said["columns"], said["unreadable"]) == ("crossed", ["similarity", "similarity_lowest"], {})
    assert said["fingerprint"] == Scores(index, "crossed").complete("").fingerprint
    found = table_of(index, "crossed")
    for ledger, source in (("a", model), ("part", other_model)):
        ordinals = compile_kept(index, [ledger]).ordinals.astype(int)
        np.testing.assert_allclose(found["similarity"].to_numpy()[ordinals], expected(index, source)["similarity"][ordinals], atol=1e-5)
    rest = set(range(ROWS)) - {int(o) for name in ("a", "part") for o in compile_kept(index, [name]).ordinals}
    assert set(np.flatnonzero(found["similarity"].is_null())) == rest
    assert len(rest) > 50
    assert found["problem"].null_count == ROWS


def test_folds_that_do_not_go_together_are_refused(index: Index, model: str, other_model: str, tmp_path: Path) -> None:
    divide(index)
    shared = len(np.intersect1d(compile_kept(index, ["a"]).ordinals, compile_kept(index, ["wordy"]).ordinals))
    with pytest.raises(ConfigError, match=f"ledgers 'a' and 'wordy' share {shared} samples.*--names a,b"):
        score_by_models(index, "similarity", [Fold("a", model), Fold("wordy", other_model)], name="x")
    with pytest.raises(ConfigError, match="embeddings of several models"):
        score_by_models(index, "embeddings", [Fold("a", model), Fold("b", other_model)], name="x")
    larger = make_bundle(tmp_path / "larger", 0, image_size=48)
    with pytest.raises(ConfigError, match="images of 32 and 48 pixels"):
        score_by_models(index, "similarity", [Fold("a", model), Fold("b", larger)], name="x")
    with pytest.raises(ConfigError, match="both sides of the split are called 'a'"):
        split(index, heldout=0.5, seed=3, names=("a", "a"))
    assert not Path(index.url, "scores", "x").exists()


def test_a_model_that_was_trained_on_a_fold_does_not_score_it(index: Index, other_model: str, tmp_path: Path) -> None:
    divide(index)
    trained = {
        names: make_bundle(tmp_path / ("-".join(names) or "all"), 0, compile_kept(index, names).fingerprint)
        for names in ((), ("a",), ("wordy", "a"), ("wordy",))
    }
    for names, said in (((), "all samples"), (("a",), "ledger a"), (("wordy", "a"), "ledger a and wordy"), (("wordy",), "ledger wordy")):
        shared = np.intersect1d(compile_kept(index, names).ordinals, compile_kept(index, ["a"]).ordinals)
        with pytest.raises(
            ConfigError, match=f"this model was trained on {said} of the index, and {len(shared)} of those samples are in 'a'"
        ):
            Folds.open(index, [Fold("a", trained[names]), Fold("b", other_model)], Among())
    assert Folds.open(index, [Fold("b", trained["a",])], Among()).notes == ()
    (note,) = Folds.open(index, [Fold("b", other_model)], Among()).notes
    assert "was trained on samples of 'b' cannot be known" in note
    (note,) = Folds.open(index, [Fold(None, trained["a",])], Among()).notes
    assert f"was trained on {len(compile_kept(index, ['a']))} of these samples" in note
    (note,) = Folds.open(index, [Fold(None, trained["a",])], Among.of(index, ["b"])).notes
    assert "was trained on 0 of these samples" in note


def test_models_that_are_not_there_and_indexes_without_pairs_are_refused(index: Index, model: str, corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"no bundle at \./nothing"):
        score_by_models(index, "similarity", [Fold(None, "./nothing")], name="x")
    with pytest.raises(ConfigError, match=r"'\.\./x' cannot be a name"):
        score_by_models(index, "similarity", [Fold(None, model)], name="../x")
    assert not Path(index.url, "scores", "x").exists()
    pictures = build_index([str(corpus / "heldout")], str(tmp_path / "index"), need=("image",))
    with pytest.raises(ConfigError, match="need not have text"):
        score_by_models(pictures, "similarity", [Fold(None, model)])


def test_samples_that_cannot_be_read_are_null_with_the_reason(model: str, corpus: Path, tmp_path: Path) -> None:
    data = bytearray((corpus / "heldout" / "00000.tar").read_bytes())
    shard = tmp_path / "0.tar"
    shard.write_bytes(data)
    index = build_index([str(shard)], str(tmp_path / "index"))
    times = shard.stat()
    lost = [*range(40), 50]  # the first block has nothing to encode
    for row in index.locators[lost]:
        data[row["start"] : row["start"] + 512] = bytes(512)
    shard.write_bytes(data)
    os.utime(shard, ns=(times.st_atime_ns, times.st_mtime_ns))
    blocks = [
        encode._decode_block(pa.table({"ordinals": [np.arange(first, last)], "models": [models]}), index.url, 32)
        for first, last, models in ((0, 40, np.zeros(40, np.int8)), (40, 60, np.repeat(np.array([0, encode.LEFT_OUT], np.int8), (18, 2))))
    ]
    encoder = encode.Encoder([encode.Model.of(model, load_bundle(model))], model_scores.embeddings, cuda=False)
    table = SideTable(str(tmp_path / "values"), 60, 60)
    encoded_table._write_chunk(table, 0, *map(encoder, blocks))
    found = table.read(0)
    for name in ("similarity", "similarity_lowest", "image", "text"):
        assert np.flatnonzero(found[name].is_valid()).tolist() == sorted(set(range(58)) - set(lost))
    assert Counter(found["problem"].to_pylist()) == {"changed": 41, None: 19}
    assert encoded_table.count_problems(table) == {"changed": 41}


def test_rules_read_similarities(embedded: Index) -> None:
    rules = {
        "fits": {"rule": "similarity", "scores": "embeddings", "top": 0.5},
        "worst": {"rule": "similarity", "scores": "embeddings", "of": "lowest", "min": -0.1},
        "any": {"rule": "score", "scores": "embeddings", "column": "similarity", "max": 0.5},
    }
    summary = filter_index(embedded, RuleSet.parse(rules, where="test"), "fits")
    values = table_of(embedded, "embeddings")
    mean, lowest = (values[name].to_numpy() for name in ("similarity", "similarity_lowest"))
    bound = np.sort(mean)[::-1][ROWS // 2 - 1]
    assert summary.bounds == {"fits": float(bound)}
    kept = (mean >= bound) & (lowest >= -0.1) & (mean <= 0.5)
    assert compile_kept(embedded, ["fits"]).ordinals.tolist() == np.flatnonzero(kept).tolist()
    decided = pa.concat_tables(Ledger(embedded, "fits").decisions.tables())
    np.testing.assert_array_equal(decided["value.worst"].to_numpy(), lowest)


@pytest.mark.parametrize(
    ("rule", "says"),
    [
        ({"rule": "similarity"}, r"rule 'r': scores 'similarity'.*mm data score \S+ similarity --model MODEL$"),
        ({"rule": "similarity", "scores": "dfn"}, r"similarity --model MODEL --name dfn$"),
        ({"rule": "sharpness", "min": 1}, r"make them: mm data score \S+ image$"),
        ({"rule": "score", "scores": "image", "column": "information"}, r"mm data score \S+ image$"),
        (
            {"rule": "score", "scores": "pixels", "column": "information"},
            r"mm data score \S+ image \(these have no other name: say `scores: image`\)$",
        ),
        ({"rule": "score", "scores": "hash", "column": "contrast"}, r"mm data score \S+ hash$"),
        ({"rule": "score", "scores": "clip", "column": "similarity_lowest"}, r"mm data score \S+ similarity --model MODEL --name clip$"),
        ({"rule": "score", "scores": "head", "column": "score_1"}, r"mm data score \S+ head --weights FILE --sha256 DIGEST$"),
        ({"rule": "score", "scores": "nsfw"}, r"head --weights FILE --sha256 DIGEST --name nsfw$"),
        ({"rule": "score", "scores": "embeddings", "column": "similarty"}, "no column of numbers 'similarty'.*; did you mean 'similarity'"),
        ({"rule": "score", "scores": "embeddings", "column": "image"}, "no column of numbers 'image'"),
        (
            {"rule": "score", "scores": "embeddings", "column": "score"},
            r"made by: mm data score \S+ head --weights FILE --sha256 DIGEST --name NAME; known",
        ),
    ],
)
def test_scores_that_a_rule_lacks_are_named_with_what_makes_them(embedded: Index, rule: dict[str, Any], says: str) -> None:
    with pytest.raises((DataError, ConfigError), match=says):
        filter_index(embedded, RuleSet.parse({"r": rule}, where="test"), "lacks")


def test_the_command_line_refuses_what_makes_no_sense(index: Index, model: str) -> None:
    for arguments, says in (
        (["similarity"], "similarity needs a model: give --model"),
        (["similarity", "--model", model, "--fold", f"x={model}"], "not both"),
        (["similarity", "--fold", "x"], "'x' is not of the form LEDGER=MODEL"),
        (["image", "--model", model], "image takes no --model; it takes no options"),
        (["embeddings", "--fold", f"x={model}"], "embeddings takes no --fold; it takes --name, --model"),
        (["similrity"], "nothing called 'similrity' to measure; did you mean 'similarity'"),
    ):
        with pytest.raises(ConfigError, match=says):
            run("score", index.url, *arguments)


def test_the_table_of_another_chunk_size_is_read_by_rows(embedded: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    """Decisions and scores have files of different lengths, and neither need divide the other."""
    rules = RuleSet.parse({"r": {"rule": "similarity", "scores": "embeddings", "top": 0.3}}, where="test")
    whole = filter_index(embedded, rules, "whole")
    monkeypatch.setattr(side_table, "CHUNK_ROWS", 70)
    bounded = RuleSet.parse({"r": {"rule": "similarity", "scores": "embeddings", "min": whole.bounds["r"]}}, where="test")
    job = filtering._Job(embedded.url, "parts", bounded, Among())
    assert sum(filtering._decide(job, chunk).decided.kept for chunk in range(5)) == whole.kept == round(0.3 * ROWS)
