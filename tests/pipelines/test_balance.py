from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from typer.testing import CliRunner

import mm
from mm_core.curation.concepts import read_concepts
from mm_core.curation.ruleset import RuleSet
from mm_core.curation.text_file import TextFile
from mm_core.data import side_table
from mm_core.data.among import Among
from mm_core.data.index import Index
from mm_core.data.ledger import Ledger, compile_kept
from mm_core.data.split import split
from mm_core.errors import ConfigError, DataError
from pipelines.curate import batches
from pipelines.curate import filter as filtering
from pipelines.curate.filter import filter_index
from pipelines.curate.groups import report_index
from pipelines.index import build_index

pytestmark = pytest.mark.usefixtures("ray_cluster")

ENTRIES = ["square", "circle", "Star", "small blue", "unicorn"]
GROUPS = "groups:\n  colour: {red: [red], blue: [blue]}\n  size: {large: [large], small: [small]}\ncrosses: [[colour, size]]\n"
RULES: dict[str, dict[str, Any]] = {
    "few_words": {"rule": "words", "min": 8},
    "even": {"rule": "balance", "entries": "entries.txt", "per_entry": 6},
    "weigh": {"rule": "reweight", "terms": "groups.yaml", "category": "colour", "target": {"red": 0.7, "blue": 0.3}},
}


@pytest.fixture(scope="module")
def index(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Index:
    return build_index([str(corpus / "train")], str(tmp_path_factory.mktemp("balance") / "index"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("terms")
    (folder / "entries.txt").write_text("\n".join(ENTRIES))
    (folder / "groups.yaml").write_text(GROUPS)
    return folder


def words_of(index: Index) -> list[str]:
    rows = index.rows(0, index.summary.rows, ["captions"])["captions"].to_pylist()
    return [f" {' '.join(captions)} ".replace(",", " ,") for captions in rows]


def test_entries_are_counted_behind_the_rules_before_and_capped(index: Index, folder: Path) -> None:
    rules = RuleSet.parse({name: RULES[name] for name in ("few_words", "even")}, where="test", folder=folder)
    calls = []
    summary = filter_index(index, rules, "even", on_progress=calls.append)
    table = pa.concat_tables(Ledger(index, "even").decisions.tables())
    kept, reasons = table["repeat"].to_numpy() > 0, np.array(table["reason"].to_pylist(), dtype=object)
    texts = words_of(index)
    concepts = {row["entry"]: row for row in read_concepts(Ledger(index, "even")).to_pylist()}
    for entry in ENTRIES:
        has = np.array([f" {entry.lower()} " in text for text in texts])
        assert (concepts[entry]["matched"], concepts[entry]["kept"]) == (
            int((has & (reasons != "few_words")).sum()),
            int((has & kept).sum()),
        )
    frequent = [concept for concept in concepts.values() if concept["matched"] > 12]
    assert len(frequent) > 1
    assert all(1 <= concept["kept"] < concept["matched"] for concept in frequent)
    assert {concept["weight"] for concept in concepts.values()} == {None}
    assert summary.dropped["even"] > 0
    assert sum(calls) == 2 * index.summary.rows


def test_ledgers_do_not_depend_on_how_the_rows_are_divided(index: Index, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rules = RuleSet.parse(RULES, where="test", folder=folder)
    summary = filter_index(index, rules, "whole")
    before = pa.concat_tables(Ledger(index, "whole").decisions.tables())
    monkeypatch.setattr(side_table, "CHUNK_ROWS", 100)
    monkeypatch.setattr(batches, "BATCH_ROWS", 7)
    settled = rules.settled(
        lambda asked: sum(filtering._count(filtering._Job(index.url, "parts", asked, Among()), chunk) for chunk in range(4))
    )
    parts = [filtering._decide(filtering._Job(index.url, "parts", settled, Among()), chunk) for chunk in (3, 1, 0, 2)]
    after = pa.concat_tables(Ledger(index, "parts").decisions.tables())
    assert after.combine_chunks().cast(before.schema).equals(before.combine_chunks())
    assert sum(part.decided.kept for part in parts) == summary.kept


def test_an_epoch_holds_the_target_shares(index: Index, folder: Path) -> None:
    rules = RuleSet.parse({"few_words": {"rule": "words", "min": 7}, "weigh": RULES["weigh"]}, where="test", folder=folder)
    filter_index(index, rules, "weighed")
    kept = compile_kept(index, ["weighed"])
    texts = words_of(index)
    red, blue = (np.array([f" {colour} " in text for text in texts]) for colour in ("red", "blue"))
    for epoch in range(3):
        places = np.arange(len(kept), dtype=np.uint64)
        drawn = kept.at(places, np.full(len(kept), epoch, dtype=np.uint64), 5).astype(int)
        reds, blues = (int((one & ~other)[drawn].sum()) for one, other in ((red, blue), (blue, red)))
        assert abs(reds - 0.7 * (reds + blues)) <= 3
        assert reds + blues > 50
    weights = Ledger(index, "weighed").weights()
    alone = weights > 0
    assert weights[alone & red & ~blue].sum() / weights[alone & (red ^ blue)].sum() == pytest.approx(0.7, abs=1e-6)
    assert set(weights[alone & (red == blue)].tolist()) == {1.0}
    shares = {row["entry"]: row["weight"] for row in read_concepts(Ledger(index, "weighed")).to_pylist() if row["rule"] == "weigh"}
    assert shares["none"] is None
    assert shares["red"] > shares["blue"]


def test_groups_are_counted_before_and_after_each_ledger_and_all_together(index: Index, folder: Path) -> None:
    filter_index(index, RuleSet.parse({"few_words": RULES["few_words"]}, where="test", folder=folder), "long")
    split(index, heldout=0.3, seed=1)
    done = []
    terms = TextFile.read("groups.yaml", folder)
    reports = report_index(index, terms, ["long", "train"], on_progress=done.append)
    assert sum(done) == index.summary.rows
    assert [report.ledger for report in reports] == ["long", "train", None]
    texts = words_of(index)
    red = np.array([" red " in text for text in texts])
    small = np.array([" small " in text for text in texts])
    kept_of = [np.isin(np.arange(len(texts)), compile_kept(index, names).ordinals) for names in (["long"], ["train"], ["long", "train"])]
    for report, kept in zip(reports, kept_of, strict=True):
        cell = report.categories["colour"][0]
        assert (cell.groups, cell.samples, cell.kept) == (("red",), int(red.sum()), int((red & kept).sum()))
        assert cell.rules == ({"few_words": cell.keep_rate} if report.ledger == "long" else {})
        crossed = {cell.groups: cell for cell in report.crosses[0][1]}[("red", "small")]
        assert (crossed.samples, crossed.kept) == (int((red & small).sum()), int((red & small & kept).sum()))
        assert (report.samples, report.kept) == (index.summary.samples, int(kept.sum()))
    written = json.loads((Path(index.url) / "ledgers" / "long" / "groups.json").read_text())
    assert written == reports[0].model_dump(mode="json")
    (longer,) = [
        each for each in reports[0].differences if each.rule == "few_words" and each.groups == ("large", "none") and not each.within
    ]
    assert longer.interval[0] > 0.05
    assert longer.keep_rates == tuple(reports[0].categories["size"][i].rules["few_words"] for i in (0, 2))
    (plain,) = report_index(index, terms)
    assert (plain.ledger, plain.kept, plain.differences) == (None, index.summary.samples, [])


def test_the_command_line_shows_concepts_and_groups(index: Index, folder: Path) -> None:
    (folder / "rules.yaml").write_text(json.dumps({"rules": RULES}))

    def run(*arguments: str) -> str:
        return CliRunner().invoke(mm.app, ["data", *arguments], catch_exceptions=False).stdout

    shown = run("filter", index.url, "--rules", str(folder / "rules.yaml"), "--name", "cli")
    assert "even: 4 of 5 entries have samples" in shown
    assert "70.0%" in shown
    terms = str(folder / "groups.yaml")
    shown = run("groups", index.url, "--terms", terms, "--ledger", "cli")
    assert "colour × size" in shown
    assert "keep rates that surely differ by more than 5.0%" in shown
    assert "share of an epoch" not in run("groups", index.url, "--terms", terms)
    result = json.loads(run("groups", index.url, "--terms", terms, "--ledger", "cli", "--json").splitlines()[-1])
    assert result["reports"][0]["ledger"] == "cli"


def test_what_cannot_be_counted_is_one_clear_error(index: Index, folder: Path, corpus: Path, tmp_path: Path) -> None:
    terms = TextFile.read("groups.yaml", folder)
    with pytest.raises(DataError, match="has no ledger 'nothing'"):
        report_index(index, terms, ["nothing"])
    pictures = build_index([str(corpus / "train" / "00003.tar")], str(tmp_path / "index"), need=("image",))
    with pytest.raises(ConfigError, match="need not have any"):
        report_index(pictures, terms)
    with pytest.raises(ConfigError, match=r"cannot read .*missing\.yaml"):
        CliRunner().invoke(mm.app, ["data", "groups", index.url, "--terms", "missing.yaml"], catch_exceptions=False)
    nobody = RULES["weigh"] | {"target": {"red": 0.5, "blue": 0.5}}
    rules = RuleSet.parse({"long": {"rule": "words", "min": 1000}, "weigh": nobody}, where="test", folder=folder)
    with pytest.raises(DataError, match="rule 'weigh': no sample that gets this far is in 'red'"):
        filter_index(index, rules, "nobody")
    assert not Path(index.url, "ledgers", "nobody").exists()
