from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from typer.testing import CliRunner

import mm
from mm_core.curation import cells
from mm_core.curation.bands import Bands
from mm_core.data.among import Among
from mm_core.data.columns import vectors_column
from mm_core.data.index import Index
from mm_core.data.ledger import Ledger, compile_kept
from mm_core.data.scores import Scores, ScoresSummary
from mm_core.data.split import write_ledger
from mm_core.errors import ConfigError, DataError
from pipelines.curate import equal_pairs, picture_pairs, score, vector_pairs
from pipelines.curate.batches import ALL
from pipelines.curate.comparison import Comparison, Side
from pipelines.curate.dedup import DedupConfig, Keep, Method, dedup_index
from pipelines.curate.score import score_hashes
from pipelines.index import build_index
from tests.mm_core.curation.test_picture_hash import drawn, saved

pytestmark = pytest.mark.usefixtures("ray_cluster")


def as_png(image: Image.Image) -> bytes:
    data = io.BytesIO()
    image.save(data, "PNG")
    return data.getvalue()


ROWS: list[tuple[Callable[[], bytes], str]] = [
    *((lambda seed=seed: saved(drawn(seed)), f"picture {seed}") for seed in range(12)),
    (lambda: saved(drawn(3)), "picture 3"),  # 12: 3 again, every byte
    (lambda: saved(drawn(4)), "another text"),  # 13: the picture of 4
    (lambda: saved(drawn(5).resize((320, 320)), 60), "larger"),  # 14: 5, with more pixels
    (lambda: saved(drawn(6).crop((8, 3, 160, 155))), "cropped"),  # 15: 6, with fewer
    (lambda: saved(drawn(7).resize((80, 80))), "smaller"),  # 16, 17: 7 and 12's 3
    (lambda: saved(drawn(3), 40), "again"),
    (lambda: saved(Image.new("RGB", (64, 64), "grey")), "plain"),  # 18, 19: nothing to see
    (lambda: saved(Image.new("RGB", (64, 64), "grey"), 50), "plain too"),
    (lambda: as_png(drawn(20))[:2000], "cut off"),  # 20: cannot be decoded
]
GROUPS = {3: 3, 12: 3, 17: 3, 5: 14, 14: 14, 6: 6, 15: 6, 7: 7, 16: 7, 4: 13, 13: 13}
"""By sample what is kept of its group: the largest, then of the longest caption, then the first."""


def shard(path: Path, rows: list[tuple[bytes, str]]) -> str:
    with tarfile.open(path, "w") as tar:
        for number, (picture, text) in enumerate(rows):
            for suffix, data in (("jpg", picture), ("txt", text.encode())):
                entry = tarfile.TarInfo(f"{number:04d}.{suffix}")
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))
    return str(path)


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Index:
    folder = tmp_path_factory.mktemp("dedup")
    found = build_index([shard(folder / "0.tar", [(make(), text) for make, text in ROWS])], str(folder / "index"))
    assert score_hashes(found).complete
    return found


@pytest.fixture(scope="module")
def tests(tmp_path_factory: pytest.TempPathFactory) -> Index:
    """Another index: of pictures that `index` has too, and of others."""
    folder = tmp_path_factory.mktemp("dedup-against")
    rows = [
        (saved(drawn(50)), "elsewhere only"),
        (saved(drawn(8), 50), "8, compressed"),
        (saved(drawn(9)), "picture 9"),
        (saved(drawn(3).resize((100, 100))), "3, smaller"),
        (saved(drawn(9), 70), "9, compressed"),
    ]
    found = build_index([shard(folder / "0.tar", rows)], str(folder / "test set"))
    score_hashes(found)
    return found


def decisions(index: Index, name: str) -> pa.Table:
    return pa.concat_tables(Ledger(index, name).decisions.tables())


def test_a_group_keeps_its_best_and_each_other_has_the_first_method_that_found_it(index: Index) -> None:
    config = DedupConfig(methods=(Method.PERCEPTUAL, Method.PICTURE, Method.EXACT))
    summary = dedup_index(index, "all", config)
    table = decisions(index, "all")
    expected = [GROUPS.get(row) for row in range(len(ROWS))]
    assert table["group"].to_pylist() == expected
    reasons = {12: "exact", 4: "picture", 17: "perceptual", 5: "perceptual", 15: "perceptual", 16: "perceptual"}
    assert table["reason"].to_pylist() == [f"duplicate_{reasons[row]}" if row in reasons else None for row in range(len(ROWS))]
    assert table["repeat"].to_pylist() == [float(row not in reasons) for row in range(len(ROWS))]
    assert summary.dropped == {"duplicate_exact": 1, "duplicate_picture": 1, "duplicate_perceptual": 4} == summary.failed
    assert list(summary.rules) == ["duplicate_exact", "duplicate_picture", "duplicate_perceptual"]
    assert summary.counts["exact"] == {"groups": 1, "dropped": 1, "largest": 2}
    assert summary.counts["perceptual"] == {
        **{"groups": 5, "dropped": 4, "largest": 3},
        **{"plain": 2, "unreadable": 1, "cut": 0, "uncompared": 0},
    }
    assert set(compile_kept(index, ["all"]).ordinals.tolist()) == set(range(len(ROWS))) - set(reasons)


def test_of_what_other_ledgers_drop_nothing_is_looked_at(index: Index) -> None:
    """The best of a group is dropped by rules: the group must not go with it."""
    every = dedup_index(index, "everyone", DedupConfig(methods=(Method.PICTURE,)))
    assert every.kept < index.summary.samples
    row, best = next(
        (row, group) for row, group in enumerate(decisions(index, "everyone")["group"].to_pylist()) if group not in (None, row)
    )
    repeat = np.ones(index.summary.rows, dtype=np.float32)
    repeat[best] = 0
    write_ledger(index, "ruled", rule="test", repeat=repeat, reason="by a rule")
    dedup_index(index, "among", DedupConfig(methods=(Method.PICTURE,)), among=Among.of(index, ["ruled"]))
    together = set(compile_kept(index, ["ruled", "among"]).ordinals.tolist())
    assert best not in together
    assert row in together
    assert row not in set(compile_kept(index, ["ruled", "everyone"]).ordinals.tolist())
    assert together == set(compile_kept(index, ["among"]).ordinals.tolist())
    assert decisions(index, "among")["reason"].to_pylist()[best] == "ruled: by a rule"
    with pytest.raises(ConfigError, match="by other rules"):
        dedup_index(index, "among", DedupConfig(methods=(Method.PICTURE,)))


def test_decisions_do_not_depend_on_how_the_work_is_divided(index: Index, tests: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    config = DedupConfig(methods=(Method.EXACT, Method.PICTURE, Method.PERCEPTUAL))
    whole = [dedup_index(index, "whole", config), dedup_index(index, "whole-against", config, against=[(tests, ALL)])]
    monkeypatch.setattr(equal_pairs, "_PART_SAMPLES", 10)
    monkeypatch.setattr(picture_pairs, "_PART_HASHES", 70)
    monkeypatch.setattr(Bands, "fitted", lambda distance, hashes: Bands(distance, 3))
    parts = [dedup_index(index, "parts", config), dedup_index(index, "parts-against", config, against=[(tests, ALL)])]
    monkeypatch.setattr(picture_pairs, "_CROWD", 1)
    crowds = [dedup_index(index, "crowds", config), dedup_index(index, "crowds-against", config, against=[(tests, ALL)])]
    for name in ("parts", "crowds"):
        for end in ("", "-against"):
            assert decisions(index, name + end).equals(decisions(index, "whole" + end))
    assert whole == parts
    assert [summary.fingerprint for summary in crowds] == [summary.fingerprint for summary in whole]


def test_pairs_do_not_depend_on_how_the_scores_are_divided(
    index: Index, tests: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A chunk has 1,024 rows at least; here 5, and so has what a task deals out, and a range of thumbnails."""
    monkeypatch.setattr(score, "_LEAST_ROWS", 5)
    again = build_index(index.shard_urls, str(tmp_path / "index"))
    score_hashes(again)
    assert len(Scores(again, "hash").values) == 5
    for module, name in ((equal_pairs, "_SLAB_ROWS"), (picture_pairs, "_SLAB_ROWS"), (picture_pairs, "_RANGE_SAMPLES")):
        monkeypatch.setattr(module, name, 5)
    sides = [Side(each.url, 0, each.summary.rows) for each in (index, again)]
    other = Side(tests.url, index.summary.rows, tests.summary.rows)
    whole, parts = (sorted(picture_pairs.picture_pairs(Comparison(side), 8).pairs.tolist()) for side in sides)
    assert parts == whole == [[3, 12], [3, 17], [4, 13], [5, 14], [6, 15], [7, 16]]
    whole, parts = (sorted(picture_pairs.picture_pairs(Comparison(side, (other,)), 8).pairs.tolist()) for side in sides)
    assert parts == whole == [[3, 24], [8, 22], [9, 23], [12, 24], [17, 24]]
    pictures = [sorted(equal_pairs.equal_pairs(Comparison(side), pictures=True).pairs.tolist()) for side in sides]
    assert pictures == [[[3, 12], [4, 13]]] * 2


def test_what_is_in_another_index_goes_and_says_which_it_matches(index: Index, tests: Index, tmp_path: Path) -> None:
    other = build_index([shard(tmp_path / "0.tar", [(saved(drawn(10)), "picture 10")])], str(tmp_path / "more"))
    score_hashes(other)
    summary = dedup_index(index, "clean", DedupConfig(), against=[(tests, ALL), (other, ALL)])
    table = decisions(index, "clean")
    matches = {3: (3, 0), 12: (3, 0), 17: (3, 0), 8: (1, 0), 9: (2, 0), 10: (0, 1)}
    assert table["against"].to_pylist() == [matches.get(row, (None,))[0] for row in range(len(ROWS))]
    assert table["against_index"].to_pylist() == [matches[row][1] if row in matches else None for row in range(len(ROWS))]
    assert summary.dropped["in_test set"] == 5
    assert summary.dropped["in_more"] == 1
    assert set(table["group"].to_pylist()) == {None, 14, 6, 7, 13}
    assert list(summary.rules) == ["in_test set", "in_more", "duplicate_exact", "duplicate_perceptual"]

    only = dedup_index(index, "only", DedupConfig(methods=(Method.EXACT,), only_against=True), against=[(tests, ALL), (other, ALL)])
    assert only.dropped == {"in_test set": 1, "in_more": 1}
    assert decisions(index, "only")["group"].null_count == len(ROWS)


def test_of_another_index_what_its_ledgers_keep_is_looked_at(index: Index, tests: Index) -> None:
    """The test set's 9 as it is and its 3 are dropped there: 9 is found by its compressed copy, and the threes are a group again."""
    for name, dropped in (("public", 2), ("hard", 3)):
        write_ledger(tests, name, rule="test", repeat=np.arange(tests.summary.rows) != dropped, reason="not used")
    summary = dedup_index(index, "against-some", DedupConfig(), against=[(tests, Among.of(tests, ["public", "hard"]))])
    table = decisions(index, "against-some")
    assert {row: match for row, match in enumerate(table["against"].to_pylist()) if match is not None} == {8: 1, 9: 4}
    assert summary.dropped["in_test set#public,hard"] == 2
    assert {3, 12, 17} <= {row for row, group in enumerate(table["group"].to_pylist()) if group == 3}
    assert summary.rules["in_test set#public,hard"]["ledgers"] == ["public", "hard"]
    with pytest.raises(ConfigError, match=r"by other rules .*against \w+, among hard and public"):
        dedup_index(index, "against-some", DedupConfig(), against=[(tests, ALL)])


def test_a_part_of_an_index_is_compared_with_another_part(index: Index) -> None:
    """What a split leaks: copies of what is held out are not trained on."""
    held_out = np.isin(np.arange(len(ROWS)), [12, 6])
    for name, repeat in (("fit", ~held_out), ("exam", held_out)):
        write_ledger(index, name, rule="test", repeat=repeat, reason="of the other side")
    fit, exam = (Among.of(index, [name]) for name in ("fit", "exam"))
    summary = dedup_index(index, "unleaked", DedupConfig(only_against=True), among=fit, against=[(index, exam)])
    table = decisions(index, "unleaked")
    assert {row: match for row, match in enumerate(table["against"].to_pylist()) if match is not None} == {3: 12, 17: 12, 15: 6}
    assert summary.dropped == {"fit: of the other side": 2, "in_index#exam": 3}
    with pytest.raises(ConfigError, match=f"--against {index.url}#fit is what is looked at itself"):
        dedup_index(index, "x", DedupConfig(), among=fit, against=[(index, fit)])
    with pytest.raises(ConfigError, match="'exam' cannot be written while it is read"):
        dedup_index(index, "exam", DedupConfig(only_against=True), among=fit, against=[(index, exam)], replace_ledger=True)


def test_another_rule_keeps_another_of_a_group(index: Index) -> None:
    def kept(keep: Keep, name: str) -> set[int]:
        dedup_index(index, name, DedupConfig(methods=(Method.PERCEPTUAL,), keep=keep))
        return set(decisions(index, name)["group"].to_pylist()) - {None}

    assert kept(Keep.FIRST, "first") == {3, 4, 5, 6, 7}
    spans = index.locators["span"]
    groups = [(3, 12, 17), (4, 13), (5, 14), (6, 15), (7, 16)]
    assert kept(Keep.BYTES, "bytes") == {max(group, key=lambda row: (int(spans[row]), -row)) for group in groups}
    scores = Scores(index, "similarity")
    scores.begin(summary_of(index, "similarity", ("similarity",)))
    values = [None if row in (3, 4, 13) else float(row) for row in range(len(ROWS))]
    scores.values.write(0, pa.table({"similarity": pa.array(values, pa.float32())}))
    assert kept(Keep.SIMILARITY, "similar") == {17, 4, 14, 15, 16}


def summary_of(index: Index, kind: str, columns: tuple[str, ...]) -> ScoresSummary:
    return ScoresSummary(index_fingerprint=index.summary.fingerprint, kind=kind, settings={}, columns=columns, complete=True)


def embed(index: Index, vectors: np.ndarray, present: np.ndarray, name: str = "embeddings") -> None:
    scores = Scores(index, name)
    scores.begin(summary_of(index, "embeddings", ("image",)))
    scores.values.write(0, pa.table({"image": vectors_column(vectors.astype(np.float16), present)}))


@pytest.mark.parametrize("cell_vectors", [4, 2048])
def test_embeddings_of_one_meaning_are_those_that_comparing_all_finds(
    corpus: Path, tmp_path: Path, cell_vectors: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cells, "CELL_VECTORS", cell_vectors)
    monkeypatch.setattr(vector_pairs, "_GROUP_VECTORS", 100)
    train, heldout = (build_index([str(corpus / part)], str(tmp_path / part)) for part in ("train", "heldout"))
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(390, 16))
    vectors[1::5] = vectors[::5] + rng.normal(size=vectors[::5].shape) * 0.05
    vectors[330:340] = vectors[2:52:5] * 3
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16)
    present = np.arange(390) != 6
    embed(train, vectors[:330], present[:330])
    embed(heldout, vectors[330:], present[330:])
    summary = dedup_index(train, "same", DedupConfig(methods=(Method.SEMANTIC,)), against=[(heldout, ALL)])
    close = np.round(vectors.astype(np.float32) @ vectors.astype(np.float32).T, 4) >= np.float32(0.95)
    close &= present & present[:, None]
    matched = {row: int(np.flatnonzero(close[row, 330:])[0]) for row in range(330) if close[row, 330:].any()}
    table = decisions(train, "same")
    assert table["against"].to_pylist() == [matched.get(row) for row in range(330)]
    assert len(matched) == 10
    firsts = [row for row in range(0, 330, 5) if close[row, row + 1] and row not in matched and row + 1 not in matched]
    assert len(firsts) > 50
    assert set(table["group"].to_pylist()) - {None} == {kept for row in firsts for kept in table["group"].to_pylist()[row : row + 1]}
    assert summary.counts["against_semantic"] == {"dropped": 10, "unembedded": 1, "cut": 0}
    assert summary.dropped["duplicate_semantic"] == len(firsts)


def test_the_same_settings_give_the_same_ledger_and_others_are_refused(index: Index) -> None:
    first = dedup_index(index, "kept", DedupConfig())
    assert dedup_index(index, "kept", DedupConfig(methods=(Method.PERCEPTUAL, Method.EXACT), similarity=0.5)) == first
    with pytest.raises(ConfigError, match=r"has a ledger 'kept' by other rules.*--replace"):
        dedup_index(index, "kept", DedupConfig(distance=2))
    assert dedup_index(index, "kept", DedupConfig(methods=(Method.EXACT,)), replace_ledger=True).kept == len(ROWS) - 1


def test_what_cannot_be_done_is_said_before_anything_is_written(index: Index, tests: Index, tmp_path: Path) -> None:
    fresh = build_index(tests.shard_urls, str(tmp_path / "index"))
    with pytest.raises(DataError, match=f"scores 'hash'.*make them: mm data score {fresh.url} hash"):
        dedup_index(fresh, "x", DedupConfig())
    with pytest.raises(DataError, match=f"make them: mm data score {fresh.url} embeddings --model MODEL --name clip"):
        dedup_index(fresh, "x", DedupConfig(methods=(Method.SEMANTIC,), embeddings="clip"))
    with pytest.raises(ConfigError, match="name one with --against"):
        dedup_index(index, "x", DedupConfig(only_against=True))
    with pytest.raises(ConfigError, match="is what is looked at itself"):
        dedup_index(tests, "x", DedupConfig(methods=(Method.EXACT,)), against=[(fresh, ALL)])
    scores = Scores(fresh, "hash")
    scores.save(summary_of(fresh, "hash", ()))
    with pytest.raises(ConfigError, match="measured otherwise"):
        dedup_index(index, "x", DedupConfig(), against=[(fresh, ALL)])
    scores = Scores(fresh, "image")
    scores.save(summary_of(fresh, "image", ()))
    with pytest.raises(ConfigError, match="are no embeddings but image"):
        dedup_index(fresh, "x", DedupConfig(methods=(Method.SEMANTIC,), embeddings="image"))
    for each in (index, tests, fresh):
        assert not Ledger(each, "x").exists()


def test_hashing_goes_on_where_it_was_stopped(index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Scores(index, "hash").values.read(0)
    monkeypatch.setattr(score, "_LEAST_ROWS", 4)
    fresh = build_index(index.shard_urls, str(tmp_path / "index"))

    def stop(rows: int) -> None:
        if len(list(Path(fresh.url).glob("scores/hash/values/*.parquet"))) >= 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score_hashes(fresh, on_progress=stop)
    with pytest.raises(DataError, match="are not finished; to go on: mm data score"):
        Scores(fresh, "hash").complete("hash")
    stamps = {path: path.stat().st_mtime_ns for path in Path(fresh.url).glob("scores/hash/values/*.parquet")}
    assert len(stamps) >= 2
    assert score_hashes(fresh).unreadable == {"undecodable": 1}
    assert stamps.items() <= {path: path.stat().st_mtime_ns for path in Path(fresh.url).glob("scores/hash/values/*.parquet")}.items()
    assert pa.concat_tables(Scores(fresh, "hash").values.tables()).combine_chunks().equals(whole.combine_chunks())


def test_the_command_line_writes_the_ledger_and_names_what_is_wrong(index: Index, tests: Index) -> None:
    command = ["data", "dedup", index.url, "--name", "cli", "--against", tests.url, "--method", "picture", "--json"]
    run = CliRunner().invoke(mm.app, command, catch_exceptions=False)
    found = json.loads(run.stdout.splitlines()[-1])
    assert set(found) == {"kept", "dropped", "groups", "ledger", "counts"}
    assert found["dropped"] == {"in_test set": 1, "duplicate_picture": 2}
    assert found["groups"] == {"picture": 2}
    with pytest.raises(ConfigError, match="'exact', 'picture', 'perceptual' or 'semantic'"):
        CliRunner().invoke(mm.app, ["data", "dedup", index.url, "--name", "x", "--method", "close"], catch_exceptions=False)
