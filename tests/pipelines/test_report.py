"""A report's page against the ledgers it is about, worked out from their decisions the plain way."""

from __future__ import annotations

import io
import json
import re
import shutil
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

import mm
from mm_core.curation.ruleset import RuleSet
from mm_core.data import side_table
from mm_core.data.index import Index
from mm_core.data.ledger import Ledger, compile_kept
from mm_core.data.scores import Scores, ScoresSummary
from mm_core.data.split import split
from mm_core.errors import ConfigError, DataError, ServiceError
from pipelines.curate.batches import ALL
from pipelines.curate.dedup import DedupConfig, Method, dedup_index
from pipelines.curate.filter import filter_index
from pipelines.curate.report import findings
from pipelines.curate.report.findings import find
from pipelines.curate.report.page import render
from pipelines.curate.report.view import Question
from pipelines.curate.report.write import write_report
from pipelines.index import build_index
from pipelines.tracking import TrackingConfig, create_run, open_client
from tests.page import Page

pytestmark = pytest.mark.usefixtures("ray_cluster")

RULES = {
    "short": {"rule": "words", "min": 5},
    "long": {"rule": "characters", "max": 90},
    "foreign": {"rule": "language", "languages": ["en"], "min_score": 0.3},
    "pale": {"rule": "bytes_per_pixel", "min": 0.5},
}


@pytest.fixture(scope="module")
def index(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Index:
    """With ledgers of rules, of a split, and with groups and weights; and embeddings of all samples but one."""
    found = build_index([str(corpus / "train")], str(tmp_path_factory.mktemp("report") / "index"))
    filter_index(found, RuleSet.parse(RULES, where="test"), "clean")
    split(found, heldout=0.3, seed=1)
    write_groups(found, "unique")
    rows = found.summary.rows
    vectors = np.random.default_rng(0).normal(size=(rows, 8)).astype("<f2")
    scores = Scores(found, "embeddings")
    facts = {"index_fingerprint": found.summary.fingerprint, "settings": {}, "complete": True}
    scores.begin(ScoresSummary(kind="embeddings", columns=(), vectors={"image": 8}, **facts))
    numbers = Scores(found, "numbers")
    numbers.begin(ScoresSummary(kind="x", columns=("x",), **facts))
    numbers.values.write(0, pa.table({"x": np.zeros(rows)}))
    column = pa.array([None, *(vector.tobytes() for vector in vectors[1:])], pa.binary(16))
    scores.values.write(0, pa.table({"image": column}))
    return found


def write_groups(index: Index, name: str) -> None:
    """Every tenth sample and the two behind it are a group; the first is kept, and weighs 3 where it is a multiple of 50."""
    rows = np.arange(index.summary.rows)
    groups = rows - rows % 10
    copies = (rows % 10 > 0) & (rows % 10 < 3)
    repeat = np.where(copies, 0, np.where(rows % 50 == 0, 3, 1))
    ledger = Ledger(index, name)
    decided = []
    for chunk in range(len(ledger.decisions)):
        first, last = ledger.decisions.bounds(chunk)
        group = pa.array(groups.astype(np.uint64), mask=rows % 10 > 2)[first:last]
        reasons = pa.array(np.where(copies, "duplicate_perceptual", None))[first:last]
        decided.append(ledger.write_chunk(chunk, repeat[first:last], reasons, {"group": group}))
    ledger.finish(decided, rule="groups of the test")


def decisions(index: Index, name: str) -> pa.Table:
    return pa.concat_tables(Ledger(index, name).decisions.tables())


def report(index: Index, path: Path, ledgers: tuple[str, ...] = (), **options: object) -> Page:
    write_report(index, ledgers, str(path), **options)  # type: ignore[arg-type]
    return Page(path.read_text(encoding="utf-8"))


def number(cell: str) -> int:
    return int(cell.split()[0].replace(",", ""))


def test_the_page_has_the_numbers_of_the_ledger(index: Index, tmp_path: Path) -> None:
    page = report(index, tmp_path / "report.html", ("clean",))
    summary, table = Ledger(index, "clean").summary(), decisions(index, "clean")
    reasons = Counter(table["reason"].to_pylist())
    rows = page.tables["What clean drops"][2:]
    left = 330
    for row, rule in zip(rows[:-1], RULES, strict=True):
        left -= reasons[rule]
        assert row[0].split()[0] == rule
        assert (number(row[1]), number(row[2])) == (reasons[rule], left)
    assert number(rows[-1][2]) == left == summary.kept > 0

    fails = table["fails"].to_numpy()
    bits = {rule: fails >> np.uint64(i) & np.uint64(1) for i, rule in enumerate(RULES)}
    for row in page.tables["How many fail each rule, whatever else they fail"][1:]:
        others = sum(bits[rule] for rule in RULES if rule != row[0])
        assert number(row[1]) == summary.failed[row[0]] == bits[row[0]].sum()
        assert number(row[2]) == (bits[row[0]].astype(bool) & (others == 0)).sum()
    header, *pairs = page.tables["Samples that fail both of two rules"]
    assert len(pairs) == sum(count > 0 for count in summary.failed.values()) >= 2
    for row in pairs:
        for rule, cell in zip(header[1:], row[1:], strict=True):
            assert number(cell) == (bits[row[0]] & bits[rule]).sum()

    labels = table["label.foreign"].to_pylist()
    kept = table["repeat"].to_numpy() > 0
    for name, ours, theirs, _ in page.tables["What foreign found"][1:]:
        of_name = np.array([label == name for label in labels])
        assert (number(ours), number(theirs)) == ((of_name & kept).sum(), (of_name & ~kept).sum())
    sizes = page.tables["Sizes of the pictures, pixels"]
    assert [row[:1] + [number(cell) for cell in row[1:]] for row in sizes[1:]] == [["under 64", 330]]


def test_the_bars_of_a_histogram_hold_all_values(index: Index, tmp_path: Path) -> None:
    page = report(index, tmp_path / "report.html", ("clean",))
    bars = [re.fullmatch(r"(.+): kept ([\d,]+), dropped ([\d,]+)", title) for title in page.texts["title"]]
    counts = [(int(found[2].replace(",", "")), int(found[3].replace(",", ""))) for found in bars if found]
    kept = Ledger(index, "clean").summary().kept
    charts = page.texts["svg"]
    drawn = sum(f"{rule}" in " ".join(page.texts["b"]) for rule in RULES) + 1  # and the captions' lengths
    assert len(charts) == drawn >= 4
    assert sum(ours for ours, _ in counts) == drawn * kept
    assert sum(theirs for _, theirs in counts) == drawn * (330 - kept)
    assert any(text == "min 5" for text in page.texts["text"])


def test_ledgers_that_are_read_together_and_two_that_are_compared(index: Index, tmp_path: Path) -> None:
    page = report(index, tmp_path / "report.html", ("clean", "train"), compare=("clean", "unique"))
    clean, train, unique = (decisions(index, name) for name in ("clean", "train", "unique"))
    first = [f"clean: {a}" if a else f"train: {b}" for a, b in zip(clean["reason"].to_pylist(), train["reason"].to_pylist(), strict=True)]
    expected = Counter(why for why in first if why != "train: None")
    rows = page.tables["Several ledgers together"][2:]
    assert {row[0]: number(row[1]) for row in rows[:-1]} == expected
    both = compile_kept(index, ["clean", "train"])
    assert number(rows[-1][2]) == len(both)
    assert both.fingerprint in page.texts["code"]

    pairs = Counter((bool(a), bool(b)) for a, b in zip(clean["repeat"].to_pylist(), unique["repeat"].to_pylist(), strict=True))
    sides = {row[0]: number(row[1]) for row in page.tables["Kept by which"][1:]}
    assert sides == {"both": pairs[1, 1], "clean alone": pairs[1, 0], "unique alone": pairs[0, 1], "neither": pairs[0, 0]}
    crossed = Counter(zip(clean["reason"].to_pylist(), unique["reason"].to_pylist(), strict=True))
    differing = {(a or "kept", b or "kept"): n for (a, b), n in crossed.items() if (a is None) != (b is None)}
    assert {(a, b): number(n) for a, b, n in page.tables["Where they differ, by reason"][1:]} == differing
    titles = page.texts["h3"]
    assert {"Kept by both", "Kept by clean alone", "Kept by unique alone", "Kept by neither", "Dropped by short"} <= set(titles)
    places = sum(unique["repeat"].to_pylist())
    assert any(f"make an epoch of {places:,.0f} places" in text for text in page.texts["p"])


def test_duplicates_stand_beside_the_one_that_is_kept(index: Index) -> None:
    found = find(Question(index.url, ("unique",), ("unique",), None, 4, 5, 0, 0), None)
    duplicates = found.tally.ledgers["unique"].duplicates
    assert (duplicates.groups, duplicates.samples) == (33, 99)
    assert {kept: copies for (_, kept), copies in duplicates.drawn.items()} == {
        kept: [kept + 1, kept + 2] for (_, kept) in duplicates.drawn
    }
    assert len(duplicates.drawn) == 5
    assert "33 groups hold 99 samples; 5 of them" in render(found)


def test_what_another_index_holds_stands_beside_it(corpus: Path, tmp_path: Path) -> None:
    ours = build_index([str(corpus / "train")], str(tmp_path / "ours"))
    theirs = build_index([str(corpus / "train" / "00003.tar")], str(tmp_path / "theirs"))
    config = DedupConfig(methods=(Method.EXACT,), only_against=True)
    assert dedup_index(ours, "apart", config, against=[(theirs, ALL)]).dropped == {"in_theirs": 30}
    page = report(ours, tmp_path / "report.html", ("apart",), gallery=4)
    pairs = [text for text in page.texts["p"] if re.match(r"00003\.tar: ", text)]
    assert len(pairs) == 12, "four pairs, and the gallery of those dropped"
    assert pairs[0:8:2] == pairs[1:8:2]
    shutil.rmtree(tmp_path / "theirs")
    gone = report(ours, tmp_path / "report.html", ("apart",), gallery=4)
    assert not any("Beside what they match" in text for text in gone.texts["h3"])


def test_the_page_does_not_depend_on_how_the_rows_are_divided(index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def page(name: str) -> str:
        question = Question(index.url, (name,), (name,), None, 7, 5, 0, 3)
        text = render(find(question, None))
        fingerprint = Ledger(index, name).summary().fingerprint
        return text.replace(fingerprint, "").replace(name, "NAME")

    whole = page("unique")
    monkeypatch.setattr(findings, "_ALONE_CHUNKS", 0)
    assert page("unique") == whole, "as Ray tasks"
    monkeypatch.undo()
    monkeypatch.setattr(side_table, "CHUNK_ROWS", 37)
    write_groups(index, "parted")
    assert len(Ledger(index, "parted").decisions) == 9
    assert page("parted") == whole


def test_galleries_are_drawn_by_the_seed(index: Index) -> None:
    def kept(seed: int, gallery: int) -> list[int]:
        found = find(Question(index.url, ("clean",), ("clean",), None, gallery, 0, 0, seed), None)
        return [one.ordinal for one in found.tally.draws["kept", "clean"]]

    assert kept(0, 9) == kept(0, 9)
    assert kept(0, 9)[:4] == kept(0, 4)
    assert set(kept(0, 9)) != set(kept(1, 9))
    assert set(kept(0, 9)) <= set(compile_kept(index, ["clean"]).ordinals.tolist())


def test_the_map_shows_every_drawn_sample_that_has_an_embedding(index: Index, tmp_path: Path) -> None:
    page = report(index, tmp_path / "report.html", ("clean",), embeddings="embeddings")
    clusters = page.tables["Points by cluster"][1:]
    kept = Ledger(index, "clean").summary().kept - bool(decisions(index, "clean")["repeat"][0].as_py())
    assert (sum(number(row[1]) for row in clusters), sum(number(row[2]) for row in clusters)) == (kept, 329 - kept)
    assert any("1 of those drawn have none" in text for text in page.texts["p"])
    assert sum(title.startswith("cluster ") for title in page.texts["title"]) == 329


def test_what_stands_in_the_data_stays_text(tmp_path: Path, corpus: Path) -> None:
    hostile = [
        "<script>alert(1)</script></p></section>",
        '" onload="alert(1)',
        "{{ 7 * 7 }}</title><img src=http://x.example/a.png onerror=alert(1)>",
    ]
    with tarfile.open(corpus / "train" / "00000.tar") as source, tarfile.open(tmp_path / "0.tar", "w") as target:
        picture = source.extractfile("00000000.jpg")
        assert picture is not None
        data = picture.read()
        for n, caption in enumerate(hostile):
            for name, content in ((f"<b onclick=x>{n}.jpg", data), (f"<b onclick=x>{n}.txt", caption.encode())):
                entry = tarfile.TarInfo(name)
                entry.size = len(content)
                target.addfile(entry, io.BytesIO(content))
    index = build_index([str(tmp_path / "0.tar")], str(tmp_path / "<i>index"))
    filter_index(index, RuleSet.parse({"<u>rule": {"rule": "words", "min": 3}}, where="test"), "odd")
    text = (tmp_path / "report.html").read_text() if report(index, tmp_path / "report.html", ("odd",)).active else ""
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert text == ""
    assert all(re.match(r"(data:image/jpeg;base64,[A-Za-z0-9+/=]+|#[\w-]+|data:,)$", resource) for resource in page.resources)
    shown = [text for text in page.texts["p"] if text in hostile]
    assert set(shown) == set(hostile)
    assert any("<u>rule" in text for text in page.texts["th"])


def test_personal_data_is_masked_and_unreadable_samples_say_so(tmp_path: Path, corpus: Path) -> None:
    shutil.copy(corpus / "train" / "00003.tar", tmp_path / "gone.tar")
    with tarfile.open(tmp_path / "gone.tar") as source:
        picture = next(source.extractfile(m) for m in source if m.name.endswith(".jpg"))
        assert picture is not None
        data = picture.read()
    with tarfile.open(tmp_path / "here.tar", "w") as target:
        for name, content in (("a.jpg", data), ("a.txt", b"write to jane@example.org about the red square")):
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            target.addfile(entry, io.BytesIO(content))
    index = build_index([str(tmp_path / "gone.tar"), str(tmp_path / "here.tar")], str(tmp_path / "index"))
    filter_index(index, RuleSet.parse({"who": {"rule": "personal", "kinds": ["email"]}}, where="test"), "private")
    (tmp_path / "gone.tar").unlink()
    found = write_report(index, ["private"], str(tmp_path / "report.html"), gallery=3)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "jane@example.org" not in text
    assert "write to [email] about the red square" in text
    assert found.unreadable == {"read_failed": 3}
    assert text.count("cannot be read: read_failed") == 3


def test_wrong_use_is_said_and_writes_nothing(index: Index, tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    with pytest.raises(DataError, match=r"has no ledger 'cleen'; it has: clean"):
        write_report(index, ["cleen"], str(out))
    with pytest.raises(ConfigError, match="differs in nothing from itself"):
        write_report(index, [], str(out), compare=("clean", "clean"))
    with pytest.raises(
        DataError, match=r"scores 'clip' .* are not there; make them: mm data score \S+ embeddings --model MODEL --name clip"
    ):
        write_report(index, ["clean"], str(out), embeddings="clip")
    with pytest.raises(
        ConfigError, match=r"scores 'numbers' .* hold no embeddings of pictures; make some: mm data score \S+ embeddings --model"
    ):
        write_report(index, ["clean"], str(out), embeddings="numbers")
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"cannot write .*/file/report.html"):
        write_report(index, ["clean"], str(tmp_path / "file" / "report.html"))
    (tmp_path / "file").unlink()
    with pytest.raises(ConfigError, match="is a folder: name a file in it"):
        write_report(index, ["clean"], str(tmp_path))
    assert not list(tmp_path.iterdir())


def test_the_command_keeps_the_report_with_a_run(index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tracking = TrackingConfig(uri=f"sqlite:///{tmp_path}/runs.db").resolved()
    run_id = create_run(tracking, run_name="test", params={})
    command = ["data", "report", f"{index.url}#clean", "--set", f"tracking.uri={tracking.uri}", "--samples-per-gallery", "2", "--json"]
    done = CliRunner().invoke(mm.app, [*command, "--run-id", run_id], catch_exceptions=False)
    found = json.loads(done.stdout.splitlines()[-1])
    assert set(found) == {"out", "bytes", "samples", "kept", "ledgers", "pictures", "unreadable"}
    assert found["bytes"] == (tmp_path / "report.html").stat().st_size
    assert [item.path for item in open_client(tracking).list_artifacts(run_id, "report")] == ["report/report.html"]
    with pytest.raises(ServiceError, match="looking up run 0 failed in the MLflow store"):
        CliRunner().invoke(mm.app, [*command, "--run-id", "0"], catch_exceptions=False)


def test_concepts_and_groups_that_lie_beside_a_ledger_are_shown(index: Index, tmp_path: Path) -> None:
    folder = Path(index.url) / "ledgers" / "heldout"
    entries = pa.table({"rule": ["balance"] * 3, "entry": ["red", "<b>blue", "rare"], "matched": [90, 200, 0], "kept": [80, 100, 0]})
    pq.write_table(entries, folder / "concepts.parquet")
    cell = {"groups": ["women"], "samples": 1200, "kept": 300, "keep_rate": 0.25, "share": 0.5, "epoch_share": 0.4, "rules": {}}
    empty = cell | {"groups": ["none"], "samples": 0, "kept": 0, "keep_rate": None}
    difference = {
        "rule": None,
        "category": "gender",
        "within": [],
        "groups": ["men", "women"],
        "keep_rates": [0.5, 0.25],
        "difference": 0.25,
    }
    groups = {
        "ledger_fingerprint": Ledger(index, "heldout").summary().fingerprint,
        "max_difference": 0.05,
        "categories": {"gender": [cell, empty]},
        "crosses": [[["job", "gender"], [cell | {"groups": ["nurse", "women"]}]]],
        "differences": [difference, difference | {"rule": "pale", "within": ["nurse"]}],
    }
    (folder / "groups.json").write_text(json.dumps(groups))
    page = report(index, tmp_path / "report.html", ("heldout",))
    rows = page.tables["The most frequent entries of balance"][1:]
    assert [(row[0], number(row[1]), number(row[2])) for row in rows] == [("<b>blue", 200, 100), ("red", 90, 80)]
    assert page.tables["Groups: gender"][1] == ["women", "1,200", "300", "25.0%", "50.0%", "40.0%"]
    assert page.tables["Groups: job and gender"][1][0] == "nurse, women"
    row, crossed = page.tables["Keep rates that surely differ by more than 5%"][1:]
    assert row == ["gender: men, women", "all of them", "50.0% and 25.0%", "25.0%"]
    assert crossed[:2] == ["gender, of nurse: men, women", "pale"]

    (folder / "groups.json").write_text(json.dumps(groups | {"ledger_fingerprint": "of another state"}))
    assert "Groups: gender" not in report(index, tmp_path / "report.html", ("heldout",)).tables


def test_an_index_alone_is_shown_too(index: Index, tmp_path: Path) -> None:
    page = report(index, tmp_path / "report.html")
    assert page.texts["h1"] == ["What is in index"]
    assert page.texts["h3"] == ["Samples"]
    assert "330" in page.texts["dd"]
