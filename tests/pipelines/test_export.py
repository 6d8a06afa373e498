from __future__ import annotations

import io
import json
import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset
from typer.testing import CliRunner

import mm
from mm_core.curation.ruleset import RuleSet
from mm_core.data.among import first_reasons
from mm_core.data.augment import AugmentConfig
from mm_core.data.index import Index
from mm_core.data.ledger import Ledger, Source, compile_kept
from mm_core.data.plan import Plan
from mm_core.data.reader import IndexReader, PlanReader, ReadSpec
from mm_core.data.sample import Sample
from mm_core.data.split import split, write_ledger
from mm_core.errors import ConfigError, DataError, MMError
from mm_core.models.tokenizer import caption_tokenizer, train_bpe
from pipelines.curate import export as exporting
from pipelines.curate.combine import combined
from pipelines.curate.export import Export
from pipelines.curate.filter import filter_index
from pipelines.curate.subset import export_uids, import_uids
from pipelines.index import build_index

pytestmark = pytest.mark.usefixtures("ray_cluster")


@pytest.fixture(scope="module")
def index(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Index:
    made = build_index([str(corpus / "train")], str(tmp_path_factory.mktemp("export") / "index"))
    split(made, heldout=0.3, seed=1)
    filter_index(made, RuleSet.parse({"short": {"rule": "words", "min": 5}}, where="test"), "wordy")
    return made


def export(index: Index, *ledgers: str, **settings: Any) -> Export:
    return Export.of(Source(index=index.url, ledgers=ledgers), **settings)


def shards(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.tar"))}


def facts(index: Index, *ledgers: str) -> list[tuple[str, str, list[str]]]:
    """Of every kept sample: uid, digest and captions."""
    kept = set(compile_kept(index, ledgers).ordinals.tolist())
    rows = index.rows(0, index.summary.rows, ["uid", "digest", "captions"]).to_pylist()
    return [(row["uid"], row["digest"], row["captions"]) for n, row in enumerate(rows) if n in kept]


def tar_of(path: Path, members: dict[str, bytes]) -> str:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return str(path)


def picture(corpus: Path) -> bytes:
    with tarfile.open(corpus / "train" / "00000.tar") as tar:
        file = tar.extractfile("00000000.jpg")
        assert file is not None
        return file.read()


def test_an_export_holds_what_is_kept_and_is_read_as_any_shards_are(index: Index, tmp_path: Path) -> None:
    plan = export(index, "wordy", "train", max_bytes=100_000)
    summary = plan.write(str(tmp_path / "out"))
    found = shards(tmp_path / "out")
    expected = facts(index, "wordy", "train")
    assert summary.samples == len(expected) == len(plan.order)
    assert summary.shards == len(found) > 2
    assert summary.bytes == sum(map(len, found.values()))
    assert max(map(len, found.values())) <= 100_000
    assert {path.name for path in (tmp_path / "out").iterdir()} == {*found, "export.json", "sizes.json"}
    again = build_index([str(tmp_path / "out")], str(tmp_path / "index"))
    assert facts(again) == expected
    assert again.summary.bad == {}
    samples = list(webdataset.WebDataset([str(tmp_path / "out" / name) for name in found], shardshuffle=False).decode())
    assert [sample["json"]["uid"] for sample in samples] == [uid for uid, _, _ in expected]
    assert json.loads((tmp_path / "out" / "sizes.json").read_text()).keys() == found.keys()
    kept = compile_kept(again)
    tokenizer = caption_tokenizer(train_bpe(["a red circle"] * 3, vocab_size=300, context_length=12), 12)
    order = Plan(len(kept), 0, 8, 1, kept.fingerprint)
    table = PlanReader(ReadSpec((Source(index=again.url),), order, 24, AugmentConfig(), tokenizer)).read(np.arange(64, dtype=np.uint64))
    assert table["replaced"].null_count == 64


def test_the_bytes_depend_on_index_ledgers_and_settings_alone(index: Index, tmp_path: Path) -> None:
    first = export(index, "train", max_samples=50)
    first.write(str(tmp_path / "tasks"))
    job = exporting._Job(first.source, first.plan, "one process")
    bounds = list(zip([0, *first.ends], first.ends, strict=False))
    for number, (start, end) in reversed(list(enumerate(bounds))):  # in one process, in another order
        exporting._write_shard(job, exporting._Shard(str(tmp_path / "one"), number, f"{number:05d}.tar", start, end))
    assert shards(tmp_path / "one") == shards(tmp_path / "tasks")
    shuffled = [export(index, "train", max_samples=50, shuffle=True, seed=seed) for seed in (1, 1, 2)]
    for number, plan in enumerate(shuffled):
        plan.write(str(tmp_path / f"shuffled-{number}"))
    written = [shards(tmp_path / f"shuffled-{number}") for number in range(3)]
    assert written[0] == written[1] != written[2]
    ordered = build_index([str(tmp_path / "tasks")], str(tmp_path / "a"))
    mixed = build_index([str(tmp_path / "shuffled-0")], str(tmp_path / "b"))
    assert sorted(facts(mixed)) == sorted(facts(ordered))
    assert facts(mixed) != facts(ordered)


def test_after_a_stop_only_what_is_missing_is_written(index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, plan = tmp_path / "out", export(index, max_samples=40)
    monkeypatch.setattr(exporting, "run_tasks", stopped_after(3))
    with pytest.raises(KeyboardInterrupt):
        plan.write(str(out))
    monkeypatch.undo()
    whole = shards(out)
    assert len(whole) == 3
    assert not (out / "export.json").exists()
    with pytest.raises(ConfigError, match="holds a stopped export of other samples or settings"):
        export(index, max_samples=41).write(str(out))
    (out / "00001.tar").write_bytes(whole["00001.tar"][:-1])  # by whom ever
    stamps = {name: os.stat(out / name).st_mtime_ns for name in ("00000.tar", "00002.tar")}
    done = plan.write(str(out))
    assert {name: os.stat(out / name).st_mtime_ns for name in stamps} == stamps
    export(index, max_samples=40).write(str(tmp_path / "straight"))
    assert shards(out) == shards(tmp_path / "straight")
    assert plan.write(str(out)) == done
    with pytest.raises(ConfigError, match="holds another export"):
        export(index, "train", max_samples=40).write(str(out))


def stopped_after(count: int) -> Callable[..., Any]:
    def run(function: Callable[[Any], Any], items: list[Any]) -> Any:
        for number, item in enumerate(items):
            if number == count:
                raise KeyboardInterrupt
            yield number, function(item)

    return run


def test_an_error_leaves_no_part_of_a_shard(index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = export(index, max_samples=200)
    monkeypatch.setattr(exporting, "run_tasks", stopped_after(9))
    monkeypatch.setattr(exporting.ShardFile, "close", lambda self: (_ for _ in ()).throw(OSError("disk is full")))
    with pytest.raises(DataError, match=r"cannot write shards to .*out: disk is full"):
        plan.write(str(tmp_path / "out"))
    assert [path.name for path in (tmp_path / "out").rglob("*") if path.is_file()] == ["plan.json"]


def test_samples_that_cannot_be_read_are_counted_and_tried_again(corpus: Path, tmp_path: Path) -> None:
    shard = tmp_path / "00000.tar"
    whole = (corpus / "train" / "00000.tar").read_bytes()
    shard.write_bytes(whole)
    index = build_index([str(shard)], str(tmp_path / "index"))
    before = os.stat(shard)
    damaged, at = bytearray(whole), int(index.locators["start"][7]) + 600
    damaged[at] ^= 0xFF  # inside the picture
    shard.write_bytes(damaged)
    os.utime(shard, ns=(before.st_atime_ns, before.st_mtime_ns))
    plan = export(index, max_samples=30)
    with pytest.raises(DataError, match=r"1 of 100 samples of .* cannot be read, above --max-bad-fraction 0: changed 1"):
        plan.write(str(tmp_path / "out"), max_bad_fraction=0)
    summary = plan.write(str(tmp_path / "out"))
    assert (summary.samples, summary.skipped) == (99, {"changed": 1})
    with pytest.raises(DataError):
        plan.write(str(tmp_path / "mended"), max_bad_fraction=0)
    shard.write_bytes(whole)
    os.utime(shard, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert plan.write(str(tmp_path / "mended"), max_bad_fraction=0).samples == 100
    shard.write_bytes(whole + bytes(512))
    with pytest.raises(DataError, match=r"00000.tar had .* bytes when it was indexed"):
        plan.write(str(tmp_path / "changed"))


def test_masked_captions_and_derived_uids_stay(corpus: Path, tmp_path: Path) -> None:
    image, mail = picture(corpus), b"write to jane@example.org today"
    first = tar_of(tmp_path / "a.tar", {"x.1.jpg": image, "x.1.txt": mail, "x.2.jpg": image, "x.2.txt": b"plain"})
    second = tar_of(tmp_path / "b.tar", {"x.1.JPG": image, "x.1.json": json.dumps({"caption": mail.decode(), "key": "x.1"}).encode()})
    index = build_index([first, second], str(tmp_path / "index"))
    filter_index(index, RuleSet.parse({"who": {"rule": "personal", "action": "mask"}}, where="test"), "masked")
    export(index, "masked").write(str(tmp_path / "out"))
    assert b"jane@" not in b"".join(shards(tmp_path / "out").values())
    again = build_index([str(tmp_path / "out")], str(tmp_path / "again"))
    hidden = "write to [email] today"
    assert [(uid, captions) for uid, _, captions in facts(again)] == [
        (uid, captions) for (uid, _, _), captions in zip(facts(index), [[hidden], ["plain"], [hidden]], strict=True)
    ]
    samples = list(webdataset.WebDataset(str(tmp_path / "out" / "00000.tar"), shardshuffle=False))
    assert [sorted(key for key in sample if key[0] != "_") for sample in samples] == [["jpg", "json", "txt"]] * 2 + [["jpg", "json"]]
    assert {sample["jpg"] for sample in samples} == {image}


def test_real_shards_keep_uids_and_members(photos: Path, tmp_path: Path) -> None:
    patterns = ("flickr8k-dev/*.tar", "cc12m-sample.tar", "clothing/test/*.tar")
    sources = [path for pattern in patterns for path in sorted(photos.glob(pattern))]
    index = build_index([str(path) for path in sources], str(tmp_path / "index"), need=("image",))
    export(index, max_bytes=4_000_000, shuffle=True).write(str(tmp_path / "out"))
    again = build_index([str(tmp_path / "out")], str(tmp_path / "again"), need=("image",))
    before, after = ({uid: (digest, captions) for uid, digest, captions in facts(each)} for each in (index, again))
    assert len(before) == index.summary.samples
    assert {uid: captions for uid, (_, captions) in after.items()} == {uid: captions for uid, (_, captions) in before.items()}
    same = [uid for uid, (digest, _) in before.items() if after[uid][0] == digest]
    assert len(same) == 1000  # Flickr8k's have a uid; the others got one

    def by_uid(one: Index) -> dict[str, Sample]:
        samples = IndexReader(one).read(np.arange(one.summary.rows, dtype=np.uint64)[-900:])
        return {sample.uid: sample for sample in samples if isinstance(sample, Sample)}

    ours, theirs = by_uid(again), by_uid(index)
    both = ours.keys() & theirs.keys()
    assert len(both) > 100
    assert all((ours[uid].image, ours[uid].label) == (theirs[uid].image, theirs[uid].label) for uid in both)


def test_uids_go_out_and_come_back(index: Index, tmp_path: Path) -> None:
    plan, out = export(index, "wordy", "train"), tmp_path / "kept.parquet"
    assert export_uids(index, plan.order, str(out), parquet=True) == len(plan.order)
    assert pq.read_table(out)["uid"].to_pylist() == [uid for uid, _, _ in facts(index, "wordy", "train")]
    found = import_uids(index, str(out), "back")
    assert (found.listed, found.absent, found.repeated) == (len(plan.order), 0, 0)
    assert compile_kept(index, ["back"]).ordinals.tolist() == plan.order.kept.ordinals.tolist()
    assert found.ledger.dropped == {"not_listed": index.summary.samples - found.ledger.kept}
    assert import_uids(index, str(out), "back") == found
    with pytest.raises(ConfigError, match=r"wordy' by other rules .*--replace"):
        import_uids(index, str(out), "wordy")
    with pytest.raises(ConfigError, match=r"kept.parquet exists"):
        export_uids(index, plan.order, str(out), parquet=True)
    with pytest.raises(ConfigError, match=r"is not 32 hexadecimal digits, .*--format parquet"):
        export_uids(index, plan.order, str(tmp_path / "kept.npy"), parquet=False)
    (tmp_path / "other.txt").write_text("nothing\nof this\n")
    with pytest.raises(DataError, match=r"not one of the 2 uids in .*other.txt is of a usable sample"):
        import_uids(index, str(tmp_path / "other.txt"), "other")
    assert not Ledger(index, "other").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept.parquet", "other.txt"]


def test_a_datacomp_subset_goes_out_and_comes_back(corpus: Path, tmp_path: Path) -> None:
    image = picture(corpus)
    uids = [f"{n * 0x9E3779B97F4A7C15 % 2**64:016x}{n:016x}" for n in range(40)] + ["f" * 32, f"{7:032x}"]
    members = {
        f"{n}.{suffix}": data
        for n, uid in enumerate(uids)
        for suffix, data in (("jpg", image), ("txt", b"a"), ("json", json.dumps({"uid": uid}).encode()))
    }
    index = build_index([tar_of(tmp_path / "0.tar", members)], str(tmp_path / "index"))
    repeat = np.arange(len(uids)) % 3
    write_ledger(index, "weighted", rule="test", repeat=repeat.astype(np.float32), reason="test")
    once, often = (export(index, "weighted", repeat=repeat) for repeat in (False, True))
    assert (once.weighted, often.weighted) == (int((repeat == 2).sum()), 0)
    assert export_uids(index, once.order, str(tmp_path / "once.npy"), parquet=False) == int((repeat > 0).sum())
    export_uids(index, often.order, str(tmp_path / "often.npy"), parquet=False)
    expected = np.array([(int(u[:16], 16), int(u[16:], 16)) for u, n in zip(uids, repeat, strict=True) for _ in range(n)], "u8,u8")
    expected.sort()
    written = np.load(tmp_path / "often.npy")
    assert written.dtype == expected.dtype
    assert written.tolist() == expected.tolist()
    extra = np.append(written, np.array([(1, 1)], "u8,u8"))
    np.save(tmp_path / "extra.npy", extra)
    found = import_uids(index, str(tmp_path / "extra.npy"), "back")
    assert (found.listed, found.absent, found.repeated) == (int((repeat > 0).sum()) + 1, 1, int((repeat == 2).sum()))
    assert Ledger(index, "back").weights().tolist() == repeat.tolist()
    often.write(str(tmp_path / "out"))
    again = build_index([str(tmp_path / "out")], str(tmp_path / "again"))
    assert sorted(uid for uid, _, _ in facts(again)) == sorted(u for u, n in zip(uids, repeat, strict=True) for _ in range(n))


def test_the_order_of_ledgers_does_not_matter_for_what_is_kept(index: Index, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    weights = np.random.default_rng(0).random((3, index.summary.rows)).astype(np.float32) * (np.arange(index.summary.rows) % 5 > 0)
    names = ["w0", "w1", "w2"]
    for name, repeat in zip(names, weights, strict=True):
        write_ledger(index, name, rule=name, repeat=repeat, reason="fifth")
    sets = []
    for number, order in enumerate((names, names[::-1], ["w1", "w0", "w2", "w1"])):
        monkeypatch.setenv("MM_CACHE", str(tmp_path / str(number)))  # each compiles its own
        sets.append(compile_kept(index, order))
    for other in sets[1:]:
        assert other.fingerprint == sets[0].fingerprint
        assert other.ordinals.tolist() == sets[0].ordinals.tolist()
        assert sets[0].copies is not None
        assert other.copies is not None
        assert other.copies.ends.tolist() == sets[0].copies.ends.tolist()
    write_ledger(index, "huge", rule="huge", repeat=np.full(index.summary.rows, 1e38), reason="none")
    write_ledger(index, "vast", rule="vast", repeat=np.full(index.summary.rows, 1e38), reason="none")
    with pytest.raises(DataError, match="sampling weights of huge, vast multiplied"):
        compile_kept(index, ["huge", "vast"])


def test_the_first_ledger_that_drops_a_sample_is_its_reason(index: Index) -> None:
    tables = {name: Ledger(index, name).decisions.tables(["repeat", "reason"]) for name in ("wordy", "train")}
    decisions = {name: pa.concat_tables(table).to_pylist() for name, table in tables.items()}
    for order in (("wordy", "train"), ("train", "wordy")):
        expected = [
            next(((name, decisions[name][row]["reason"]) for name in order if not decisions[name][row]["repeat"]), (None, None))
            for row in range(index.summary.rows)
        ]
        table = pa.concat_tables(first_reasons(index, order))
        assert list(zip(table["ledger"].to_pylist(), table["reason"].to_pylist(), strict=True)) == expected
        kept, dropped = combined(index, order)
        assert kept == expected.count((None, None)) == len(compile_kept(index, order))
        assert dropped == {why: expected.count(why) for why in set(expected) - {(None, None)}}
        assert next(iter(dropped))[0] == order[0]


def run(*arguments: str) -> dict[str, Any]:
    done = CliRunner().invoke(mm.app, ["data", *arguments, "--json"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return dict(json.loads(done.stdout.splitlines()[-1]))


def test_the_commands(index: Index, tmp_path: Path) -> None:
    several = ["--ledger", "wordy", "--ledger", "train"]
    out = str(tmp_path / "out")
    planned = run("export", index.url, *several, "--out", out, "--shard-bytes", "0.1MB", "--dry-run")
    assert not Path(out).exists()
    done = run("export", f"{index.url}#wordy,train", "--out", out, "--shard-bytes", "100kB")
    assert (done["shards"], done["samples"], done["skipped"]) == (planned["shards"], planned["samples"], {})
    assert abs(done["bytes"] - planned["bytes"]) <= 12_000 * done["shards"]
    uids = str(tmp_path / "uids.parquet")
    assert run("export", index.url, *several, "--out", uids, "--format", "parquet")["samples"] == done["samples"]
    back = run("import", index.url, uids, "--name", "from-a-list")
    assert (back["kept"], back["ledger"], back["absent"]) == (done["samples"], "from-a-list", 0)
    together = run("ledgers", index.url, *several)
    assert together["kept"] == done["samples"]
    assert set(together["dropped"]) == {"wordy: short", "train: held_out"}
    assert run("ledgers", index.url)["ledgers"]["wordy"]["kept"] == Ledger(index, "wordy").summary().kept


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("export", "{index}", "--ledger", "nothing", "--out", "{out}"), 1, "has no ledger 'nothing'; it has: .*wordy"),
        (("export", "{out}/no", "--out", "{out}"), 1, "no index at .*out/no"),
        (("export", "{index}", "--out", "{index}"), 2, "exists and holds other things .*give another --out"),
        (("export", "{index}#none", "--out", "{out}"), 1, "nothing of .* is kept by none"),
        (("export", "{index}", "--out", "{index}/index.json/x"), 1, "cannot write shards to .*Not a directory"),
        (("import", "{index}", "{index}/index.json", "--name", "x"), 1, "not one of the"),
        (("import", "{index}", "{out}", "--name", "x"), 1, "cannot read uids from .*out: "),
        (("ledgers", "{index}", "--ledger", "nothing"), 1, "has no ledger 'nothing'"),
    ],
)
def test_wrong_use_is_one_clear_line(arguments: tuple[str, ...], code: int, message: str, index: Index, tmp_path: Path) -> None:
    if not Ledger(index, "none").exists():
        write_ledger(index, "none", rule="none", repeat=np.zeros(index.summary.rows), reason="none")
    places = {"index": index.url, "out": str(tmp_path / "out")}
    with pytest.raises(MMError, match=message) as caught:
        CliRunner().invoke(mm.app, ["data", *(argument.format(**places) for argument in arguments)], catch_exceptions=False)
    assert caught.value.exit_code == code
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_size_is_checked() -> None:
    for text in ("0", "many", "-1MB", "256XB"):
        done = CliRunner().invoke(mm.app, ["data", "export", "index", "--out", "x", "--shard-bytes", text])
        assert done.exit_code == 2
        assert "is no size: give a number of bytes" in " ".join(done.output.replace("│", " ").split())


def test_a_ledger_of_another_index_is_refused(index: Index, corpus: Path, tmp_path: Path) -> None:
    other = build_index([str(corpus / "heldout")], str(tmp_path / "other"))
    shutil.copytree(Path(index.url) / "ledgers" / "wordy", tmp_path / "other" / "ledgers" / "wordy")
    for refused in (lambda: export(other, "wordy"), lambda: combined(other, ["wordy"])):
        with pytest.raises(DataError, match="ledger 'wordy' was made for another state"):
            refused()
