"""What a command's words say that it needs."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster import services
from cluster.check import State
from cluster.needs import configured, needs_of
from mm_core.errors import ConfigError
from mm_core.store import open_store, write_whole
from tests.object_store import ObjectStore


@pytest.mark.parametrize(
    ("command", "tracking", "stores"),
    [
        ("train clip-tiny --data index", "http://own:5000", ()),
        ("mm --debug train clip-tiny --data s3://b/index#clean,near --set storage=s3://b/runs", "http://own:5000", ("s3://b/index", "s3://b/runs")),
        ("train x.yaml --data=gs://b/i --audit gs://b/a --data=gs://b/i --set tracking.uri=http://m:5000", "http://m:5000", ("gs://b/i", "gs://b/a")),
        ("train x --set tracking.uri=http://a --set tracking.uri=postgresql://b/c", "postgresql://b/c", ()),
        ("train x --set tracking.uri=sqlite:////runs/mlflow.db", "sqlite:////runs/mlflow.db", ()),
        ("data index s3://b/shards/{00000..00099}.tar https://web/x.tar --out s3://b/index", None, ("s3://b/shards", "s3://b/index")),
        ("data index s3://b/many/part-*/x.tar s3://{a,b}/x.tar s3://b/{0,1}.tar --out index", None, ("s3://b/many", "s3://b")),
        ("eval models:/clip@champion --retrieval s3://b/heldout", "http://own:5000", ("s3://b/heldout",)),
        ("eval bundle --retrieval heldout", None, ()),
        ("embed models:/clip/3 shards --out s3://b/vectors", "http://own:5000", ("s3://b/vectors",)),
        ("embed bundle 's3://b/two words' --out out", None, ("s3://b/two words",)),
        ("""eval bundle --set 'x=["s3://a/b","s3://c/d"]'""", None, ("s3://a/b", "s3://c/d")),
        ("doctor", None, ()),
    ],
)  # fmt: skip
def test_a_command_needs(command: str, tracking: str | None, stores: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MM_SET__STORAGE", raising=False)
    monkeypatch.setenv("MM_SET__TRACKING__URI", "http://own:5000")
    found = needs_of(command)
    assert (found.tracking_uri, found.stores) == (tracking, stores)


def test_a_run_is_kept_where_this_machine_keeps_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MM_SET__STORAGE", "s3://b/runs")
    assert needs_of("train clip-tiny --data s3://b/index").stores == ("s3://b/index", "s3://b/runs")
    assert needs_of("train clip-tiny --data i --set storage=here").stores == ()
    assert needs_of("data index s3://b/x --out i").stores == ("s3://b/x",)
    monkeypatch.delenv("MM_SET__TRACKING__URI", raising=False)
    assert needs_of("train clip-tiny").tracking_uri == configured().tracking_uri == f"sqlite:///{tmp_path}/mlflow.db"


def test_only_what_computes_needs_gpus_and_an_open_quote_is_said() -> None:
    assert needs_of("train clip-tiny --data i").gpus
    assert not needs_of("data index s --out i").gpus
    with pytest.raises(ConfigError, match="No closing quotation"):
        needs_of("train 'clip")


def test_a_store_that_a_command_names_is_asked(object_store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    object_store.faults()
    check = services.store("s3://needed/index")
    assert (check.state, check.evidence) == (State.OK, "s3://needed/index answers, and has nothing yet")
    assert services.store("s3://needed").state is State.FAIL, "of a bucket, absence is no promise"
    fs, path = open_store("s3://needed")
    fs.mkdir(path)
    assert services.store("s3://needed").evidence == "s3://needed answers, and has nothing yet"
    write_whole("s3://needed/index/summary.json", b"{}")
    assert services.store("s3://needed/index").evidence == "s3://needed/index is there"
    monkeypatch.setattr(services, "_STORE_TIMEOUT_S", 0.2)
    object_store.faults(latency_s=1)
    silent = services.store("s3://needed/index")
    object_store.faults()
    assert (silent.state, silent.evidence) == (State.FAIL, "s3://needed/index: no answer in 0.2 s")


def test_a_store_whose_library_is_not_there_fails() -> None:
    check = services.store("abfs://box@account/index")
    assert (check.state, "adlfs" in check.evidence) == (State.FAIL, True)
