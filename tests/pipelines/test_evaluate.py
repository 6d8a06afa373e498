from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from mm_core.bundle import load_bundle, write_bundle
from mm_core.console import Console
from mm_core.data.image import decode_centre
from mm_core.data.ledger import compile_kept
from mm_core.data.sample import Group, groups, read_group
from mm_core.data.split import split
from mm_core.data.tar import walk
from mm_core.errors import ConfigError, DataError
from mm_core.models.clip import build_clip, clip_tiny
from mm_core.models.sizes import SpecialTokens
from mm_core.models.tokenizer import special_tokens, train_bpe
from pipelines import evaluate
from pipelines.evaluate import evaluate_retrieval, evaluate_zeroshot
from pipelines.index import build_index
from pipelines.tracking import TrackingConfig, create_run, open_client
from tests.conftest import photos_folder

pytestmark = pytest.mark.usefixtures("ray_cluster")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    tokenizer = train_bpe(["a red circle", "two blue squares"] * 5, vocab_size=320, context_length=32)
    config = clip_tiny().model_copy(update={"vocab_size": len(tokenizer)})
    tokens: SpecialTokens = special_tokens(tokenizer)
    folder = tmp_path_factory.mktemp("model") / "bundle"
    clip = build_clip(config, tokens)
    write_bundle(folder, model=clip, tokenizer=tokenizer, config=config, recipe="clip-tiny", data_fingerprint="none", metrics={})
    return str(folder)


def samples(folder: Path) -> list[tuple[bytes, list[str], int | None]]:
    found = []
    for path in sorted(folder.glob("*.tar")):
        with path.open("rb") as stream:
            for group in groups(walk(stream, max_member_bytes=1 << 20)):
                assert isinstance(group, Group)
                sample = read_group(group, path.name)
                found.append((sample.image or b"", sample.captions, sample.label))
    return found


def test_retrieval_is_what_brute_force_finds(model: str, corpus: Path) -> None:
    bundle = load_bundle(model)
    held = samples(corpus / "heldout")
    images = bundle.image_features(np.stack([decode_centre(image, bundle.image_size) for image, _, _ in held]))
    texts = [(caption, i) for i, (_, captions, _) in enumerate(held) for caption in captions]
    scores = bundle.text_features([caption for caption, _ in texts]) @ images.T

    found = evaluate_retrieval(bundle, model, [str(corpus / "heldout")]).metrics

    assert (found["images"], found["texts"]) == (60, len(texts))
    for k in (1, 5, 10):
        t2i = np.mean([(scores[row] >= scores[row, i]).sum() - 1 < k for row, (_, i) in enumerate(texts)])
        own = [[row for row, (_, owner) in enumerate(texts) if owner == i] for i in range(60)]
        others = [np.delete(scores[:, i], own[i]) for i in range(60)]
        i2t = np.mean([(others[i] >= scores[own[i], i].max()).sum() < k for i in range(60)])
        assert found[f"t2i_r{k}"] == pytest.approx(t2i, abs=0.02)
        assert found[f"i2t_r{k}"] == pytest.approx(i2t, abs=0.02)


def test_zeroshot_reads_the_benchmarks_layout(model: str, corpus: Path) -> None:
    """On real photographs where they are, else on rendered ones."""
    photos = photos_folder()
    folder, samples, classes = (photos / "clothing" / "test", 372, 10) if photos else (corpus / "zeroshot", 96, 48)
    metrics = evaluate_zeroshot(load_bundle(model), model, str(folder))
    assert (metrics["samples"], metrics["classes"]) == (samples, classes)
    assert 0 <= metrics["top1"] <= metrics["top5"] <= 1


def test_folders_that_are_no_benchmark_are_named(model: str, corpus: Path, tmp_path: Path) -> None:
    bundle = load_bundle(model)
    with pytest.raises(DataError, match="no folder"):
        evaluate_zeroshot(bundle, model, str(tmp_path / "nothing"))
    with pytest.raises(DataError, match=r"classnames\.txt"):
        evaluate_zeroshot(bundle, model, str(tmp_path))
    (tmp_path / "classnames.txt").write_text("a\nb\n")
    (tmp_path / "0.tar").write_bytes((corpus / "heldout" / "00000.tar").read_bytes())
    with pytest.raises(DataError, match=r"have no class: each needs a \.cls member"):
        evaluate_zeroshot(bundle, model, str(tmp_path))


def test_what_is_left_out_is_counted_and_too_much_of_it_stops(model: str, corpus: Path, tmp_path: Path) -> None:
    bundle = load_bundle(model)
    data = bytearray((corpus / "heldout" / "00000.tar").read_bytes())
    shard = tmp_path / "0.tar"
    shard.write_bytes(data)
    index = build_index([str(shard)], str(tmp_path / "index"))
    times = shard.stat()

    for row in index.locators[::30]:
        data[row["start"] : row["start"] + 512] = bytes(512)
    shard.write_bytes(data)
    os.utime(shard, ns=(times.st_atime_ns, times.st_mtime_ns))
    count, found = len(index.locators[::30]), dict[str, int]()
    metrics = evaluate_retrieval(bundle, model, [index.url], on_skipped=found.update).metrics
    assert found == {"changed": count}
    assert metrics["images"] == index.summary.samples - count
    rows = pa.table({"reason": pa.array(["changed"] * 2 + [None] * 8)})
    with pytest.raises(DataError, match=r"2 of 10 samples of .* cannot be evaluated, above 10%: changed 2"):
        evaluate._features(rows, index)


def test_plots_are_copied_and_nothing_else_of_their_folder_is_logged(
    model: str, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracking = TrackingConfig(uri=f"sqlite:///{tmp_path}/mlflow.db").resolved()
    run_id = create_run(tracking, run_name="trained", params={})
    named = load_bundle(model)
    assert named.manifest is not None
    named.manifest = named.manifest.model_copy(update={"run_id": run_id})
    monkeypatch.setattr(evaluate, "load_bundle", lambda *a, **k: named)
    (tmp_path / "plots").mkdir()
    (tmp_path / "plots" / "thesis.txt").write_text("mine")

    def evaluated(store: TrackingConfig) -> None:
        arguments = {"zeroshot": None, "retrieval": [str(corpus / "heldout")], "plots": tmp_path / "plots"}
        evaluate.evaluate_model(model, **arguments, tracking=store, console=Console(json=True))  # type: ignore[arg-type]

    evaluated(tracking)
    assert {path.name for path in (tmp_path / "plots").iterdir()} == {"thesis.txt", "recall.png", "retrieval.png"}
    assert {path.name for path in (tmp_path / "mlartifacts").rglob("plots/*")} == {"recall.png", "retrieval.png"}
    assert open_client(tracking).get_run(run_id).data.tags["eval.retrieval.data"] == str(corpus / "heldout")

    evaluated(TrackingConfig(uri=f"sqlite:///{tmp_path}/elsewhere/mlflow.db"))
    assert not (tmp_path / "elsewhere").exists()


def test_an_index_without_captions_is_refused(model: str, corpus: Path, tmp_path: Path) -> None:
    pictures = build_index([str(corpus / "heldout")], str(tmp_path / "index"), need=("image",))
    with pytest.raises(DataError, match=r"was made for image, and this needs text.*--modality image-text"):
        evaluate_retrieval(load_bundle(model), model, [pictures.url])


def test_ledgers_choose_what_is_retrieved(model: str, corpus: Path, tmp_path: Path) -> None:
    bundle, index = load_bundle(model), build_index([str(corpus / "heldout")], str(tmp_path / "index"))
    split(index, heldout=0.5, seed=1)
    split(index, heldout=0.5, seed=2, names=("this", "that"))
    metrics = evaluate_retrieval(bundle, model, [f"{index.url}#this"], ["train"]).metrics
    assert metrics["images"] == len(compile_kept(index, ["train", "this"])) < index.summary.samples // 2
    assert evaluate._source([f"{index.url}#train,this"], ()) == evaluate._source([index.url], ("train", "this"))
    with pytest.raises(ConfigError, match=r"--ledger train chooses among the samples of an index, and .*heldout is not one index"):
        evaluate_retrieval(bundle, model, [str(corpus / "heldout")], ["train"])
