"""FLAVA through Ray: a codebook, a run on pairs, images and texts; among the tests that kill, a resumption on another number of workers."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import psutil
import pytest
import torch
from mlflow import MlflowClient
from transformers import FlavaForPreTraining, FlavaModel

from mm_core.bundle import load_bundle
from mm_core.config import resolve
from mm_core.console import Console
from mm_core.data.ledger import Source
from mm_core.data.synth.corpus import SynthConfig, write_corpus
from mm_core.errors import BundleError, ConfigError, TrainingError
from mm_core.models.codebook import load_codebook
from mm_core.models.hallucination import HALLUCINATION
from pipelines.evaluate import evaluate_model
from pipelines.index import build_index
from pipelines.recipes import recipe
from pipelines.train.audit import read_audit
from pipelines.train.config import TrainRun
from pipelines.train.driver import TrainRequest, TrainResult, train
from pipelines.train.run_folder import RunFolder

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]

STEPS = 16
TOWER = "{width: 16, layers: 1, heads: 2}"


def shared(storage: Path) -> list[str]:
    return [
        "global_batch_size=24", "data.chunk=8", "precision=fp32", "tracking.system_metrics=false",
        f"storage={storage / 'runs'}", f"tracking.uri=sqlite:///{storage / 'mlflow.db'}",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def sources(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Source, ...]:
    """Pairs, images, texts."""
    folder = tmp_path_factory.mktemp("flava")
    kinds = {"pairs": ("image", "text"), "images": ("image",), "texts": ("text",)}
    found = [build_index([str(corpus / "train")], str(folder / name), need=need) for name, need in kinds.items()]
    return tuple(Source(index=index.url) for index in found)


@pytest.fixture(scope="module")
def codebook(sources: tuple[Source, ...], tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainRun, TrainResult]:
    folder = tmp_path_factory.mktemp("codebook")
    model = ["model.image_size=16", "model.codebook={width: 8, blocks_per_group: 1, entries: 12}", "model.decoder_width=8"]
    settings = [*shared(folder), *model, "steps=6", "log_every_steps=3"]
    run = resolve(recipe("codebook-tiny"), overrides=settings)[0]
    return run, train(TrainRequest(run, sources[:1], name="book"), Console(json=True))


def flava(storage: Path, codebook: str, workers: int, *more: str) -> TrainRun:
    model = ["model.image_size=32", f"model.vision={TOWER}", f"model.text={TOWER}", f"model.fusion={TOWER}", "model.embed_dim=8"]
    settings = ["tokenizer.vocab_size=320", "data.mix.weights=[2,1,1]", "log_every_steps=1", f"model.codebook_source={codebook}"]
    settings += ["objective.modality_dropout=0.3", "objective.hallucination=1"]
    steps = [f"steps={STEPS}", "checkpoint.every_steps=4", f"resources.workers={workers}", "faults.max_failures=0"]
    return resolve(recipe("flava-tiny"), overrides=[*shared(storage), *model, *settings, *steps, *more])[0]


def batches(audit: Path) -> dict[int, list[tuple[int, int, str]]]:
    """Per step source, epoch and uid of each sample."""
    found: dict[int, list[tuple[int, int, str]]] = {}
    for row in read_audit(str(audit)).to_pylist():
        found.setdefault(row["step"], []).append((row["source"], row["epoch"], row["uid"]))
    return found


def losses(run: TrainRun, run_id: str) -> dict[str, dict[int, float]]:
    """Each term by step; of a step that was taken twice, the last."""
    client = MlflowClient(run.tracking.uri)
    names = [name for name in client.get_run(run_id).data.metrics if name.startswith("loss")]
    history = {name: sorted(client.get_metric_history(run_id, name), key=lambda m: m.timestamp) for name in names}
    return {name: {m.step: m.value for m in points} for name, points in history.items()}


@pytest.fixture(scope="module")
def undisturbed(
    sources: tuple[Source, ...], codebook: tuple[TrainRun, TrainResult], tmp_path_factory: pytest.TempPathFactory
) -> tuple[TrainRun, TrainResult, Path]:
    folder = tmp_path_factory.mktemp("undisturbed")
    run = flava(folder, codebook[1].bundle, 1)
    return run, train(TrainRequest(run, sources, name="whole", audit=str(folder / "audit")), Console(json=True)), folder / "audit"


def test_a_codebook_is_trained_and_drawn(codebook: tuple[TrainRun, TrainResult]) -> None:
    run, result = codebook
    assert load_codebook(result.bundle).config.vocab_size == 12
    client = MlflowClient(run.tracking.uri)
    assert {"loss.png", "reconstructions.png"} <= {Path(a.path).name for a in client.list_artifacts(result.run_id, "plots")}
    metrics = client.get_run(result.run_id).data.metrics
    assert 1 <= metrics["codebook/perplexity"] <= 12
    assert 0 < metrics["codebook/used"] <= 1
    assert {"loss/reconstruction", "loss/divergence", "loss/usage"} <= metrics.keys()


def test_each_kind_of_step_has_its_tasks(undisturbed: tuple[TrainRun, TrainResult, Path]) -> None:
    run, result, audit = undisturbed
    source_of = {step: {source for source, _, _ in rows} for step, rows in batches(audit).items()}
    assert all(len(sources) == 1 for sources in source_of.values())
    tasks = {0: {"mmm_image", "mmm_text", "itm", "contrastive", "hallucination"}, 1: {"mim"}, 2: {"mlm"}}
    found = losses(run, result.run_id)
    for step, sources in source_of.items():
        there = {name.removeprefix("loss/") for name, points in found.items() if step + 1 in points and name != "loss"}
        assert there == tasks[sources.pop()], step
    counts = [sum(rows[0][0] == source for rows in batches(audit).values()) for source in range(3)]
    assert counts == [8, 4, 4]


@pytest.mark.chaos
def test_killed_and_resumed_on_other_workers_it_is_as_undisturbed(
    undisturbed: tuple[TrainRun, TrainResult, Path], sources: tuple[Source, ...], codebook: tuple[TrainRun, TrainResult], tmp_path: Path
) -> None:
    """From two ranks that divide the model to one: tasks and samples are the same, losses but for rounding; the weights at the end too."""
    whole, ended, audit = undisturbed
    run = flava(tmp_path, codebook[1].bundle, 2, "parallel.kind=fsdp")
    folder = RunFolder.of(str(tmp_path / "runs"), "torn")
    killer = threading.Thread(target=_kill_a_worker_after, args=(folder, 4), daemon=True)
    killer.start()
    with pytest.raises(TrainingError):
        train(TrainRequest(run, sources, name="torn", audit=str(tmp_path / "audit")), Console(json=True))
    killer.join()
    reached = folder.checkpoints.newest()
    assert reached is not None
    assert reached < STEPS
    again = flava(tmp_path, codebook[1].bundle, 1)
    result = train(TrainRequest(again, sources, name="torn", resume=True, audit=str(tmp_path / "audit")), Console(json=True))
    assert batches(tmp_path / "audit") == batches(audit)
    expected, found = losses(whole, ended.run_id), losses(run, result.run_id)
    assert found.keys() == expected.keys()
    for name, points in expected.items():
        assert found[name].keys() == points.keys()
        for step, value in points.items():
            assert found[name][step] == pytest.approx(value, rel=1e-3, abs=1e-4), (name, step)
    ours, theirs = load_bundle(result.bundle).model, load_bundle(ended.bundle).model
    for name, tensor in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], tensor, rtol=1e-2, atol=2e-4, msg=name)


def _kill_a_worker_after(folder: RunFolder, step: int) -> None:
    while (folder.checkpoints.newest() or 0) < step:
        time.sleep(0.1)
    ours = psutil.Process().children(recursive=True)  # of the Ray that this session has started
    next(p for p in ours if "RayTrainWorker" in " ".join(_command(p))).kill()


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def test_its_bundle_is_transformers(undisturbed: tuple[TrainRun, TrainResult, Path], codebook: tuple[TrainRun, TrainResult]) -> None:
    bundle = undisturbed[1].bundle
    whole, bare = FlavaForPreTraining.from_pretrained(bundle), FlavaModel.from_pretrained(bundle)
    book = load_codebook(codebook[1].bundle).state_dict()
    assert all(torch.equal(tensor, book[name]) for name, tensor in whole.image_codebook.state_dict().items())
    assert torch.equal(bare.text_projection.weight, whole.flava.text_projection.weight)
    loaded = load_bundle(bundle)
    assert loaded.text_features(["a red circle"]).shape == (1, 8)
    assert loaded.manifest is not None
    assert HALLUCINATION in loaded.manifest.files
    assert loaded.multimodal_features(None, ["a red circle"]).shape == (1, 16)


def test_it_is_fine_tuned_on_its_own_tokenizer_and_codebook(
    undisturbed: tuple[TrainRun, TrainResult, Path], corpus: Path, tmp_path: Path
) -> None:
    """Two ranks, with the image alone; the same command goes on with it, and `mm eval` says what it has learned."""
    write_corpus(tmp_path / "more", SynthConfig(samples=1, heldout_samples=24, zeroshot_samples=0, matching_samples=60, image_size=32))
    train_index, held = (
        build_index([str(tmp_path / "more" / "matching" / part)], str(tmp_path / part), need=("image", "text"))
        for part in ("train", "heldout")
    )
    start = undisturbed[1].bundle
    model = ["model.image_size=32", f"model.vision={TOWER}", f"model.text={TOWER}", f"model.fusion={TOWER}", "model.embed_dim=8"]
    settings = [*model, f"init={start}", "resources.workers=2", "objective.sides=image", "steps=4", "log_every_steps=1"]
    run = resolve(recipe("flava-tiny-classify"), overrides=[*shared(tmp_path), *settings, "checkpoint.every_steps=2"])[0]
    result = train(TrainRequest(run, (Source(index=train_index.url),), name="told"), Console(json=True))
    assert train(TrainRequest(run, (Source(index=train_index.url),), name="told", resume=True), Console(json=True)).bundle == result.bundle
    metrics = MlflowClient(run.tracking.uri).get_run(result.run_id).data.metrics
    assert {"loss/classify", "accuracy/classify"} <= metrics.keys()
    before, after = load_bundle(start), load_bundle(result.bundle)
    assert after.class_head.num_classes == 2
    assert after.tokenizer.get_vocab() == before.tokenizer.get_vocab()
    same = {name for name, tensor in before.model.state_dict().items() if torch.equal(tensor, after.model.state_dict()[name])}
    assert any(name.startswith("flava.text_model") for name in same)
    assert "flava.image_model.encoder.layer.0.attention.attention.query.weight" not in same
    report = evaluate_model(
        result.bundle, zeroshot=None, retrieval=(), classify=held.url, tracking=run.tracking, console=Console(json=True)
    )
    assert report["classify"].keys() == {"image/accuracy"}
    assert "eval/classify/image/accuracy" in MlflowClient(run.tracking.uri).get_run(result.run_id).data.metrics
    with pytest.raises(BundleError, match="has no classes"):
        evaluate_model(start, zeroshot=None, retrieval=(), classify=held.url, tracking=run.tracking, console=Console(json=True))


def test_a_run_without_a_codebook_says_where_one_comes_from(sources: tuple[Source, ...], tmp_path: Path) -> None:
    run = flava(tmp_path, "null", 1)
    with pytest.raises(ConfigError, match=r"mm train codebook-tiny"):
        train(TrainRequest(run, sources), Console(json=True))
    with pytest.raises(ConfigError, match=r"data\.mix\.choice=step"):
        train(TrainRequest(flava(tmp_path, "null", 1, "data.mix.choice=chunk"), sources), Console(json=True))
