"""What FLAVA learns of rendered scenes in minutes, what each of its objectives brings, and what a missing side costs.

`python benchmarks/flava.py WORK --variants whole no-itm ...` trains each variant in this process, on what `mm train` would read, and
measures it on held-out scenes: every task beside the best constant answer; masked colours and shapes with the right image and another
one; zero-shot classes and retrieval; questions answered by a linear layer on the fusion, with one side or both. `--finetune whole scratch`
trains those variants further, and one that nothing has trained, to answer questions and to tell true captions from false ones. WORK keeps
the corpus, the codebook and each variant's model and figures, so that the program can be stopped and goes on. One JSON line.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from transformers import PreTrainedTokenizerFast

from mm_core.bundle import Bundle, load_bundle, write_bundle
from mm_core.config import resolve
from mm_core.data.decoded import decode_samples
from mm_core.data.index import Index
from mm_core.data.ledger import Source, compile_kept
from mm_core.data.reader import IndexReader, PlanReader, ReadSpec
from mm_core.data.sample import metadata_of
from mm_core.data.synth.corpus import MATCHES, SynthConfig, write_corpus
from mm_core.data.synth.language import ANSWERS
from mm_core.data.synth.scene import COLOURS, SHAPES
from mm_core.errors import BundleError
from mm_core.evaluation.probe import fused_features, linear_probe
from mm_core.evaluation.retrieval import retrieval_metrics
from mm_core.evaluation.tasks import held_out, hiding, task_metrics
from mm_core.evaluation.zeroshot import class_embeddings, read_classnames, read_templates, zeroshot_metrics
from mm_core.models.dvae import DiscreteVae
from mm_core.models.family import build_model, resolved
from mm_core.models.fused import Fused
from mm_core.models.fused_batch import Sides
from mm_core.models.tokenizer import caption_tokenizer, load_tokenizer, mask_token, special_tokens, train_bpe
from mm_core.training.checkpoint import seed_step
from mm_core.training.clock import StepClock
from mm_core.training.transfer import Transfer
from pipelines.batches import Share, steps_of
from pipelines.index import build_index
from pipelines.recipes import recipe
from pipelines.train.config import TrainRun
from pipelines.train.loop import build_step
from pipelines.train.parts import inputs_of, masking_of, modalities_of, num_classes, wrapped
from pipelines.train.preflight import fed_by, named_weights, with_sources
from pipelines.train.run_data import RunData

TASKS = ("mim", "mlm", "mmm_image", "mmm_text", "itm", "contrastive")
LABELLED = {"questions": len(ANSWERS), "matching": len(MATCHES)}
"""What is fine-tuned on, and how many classes it has."""
VARIANTS: dict[str, list[str]] = {
    "whole": [],
    **{f"no-{task}": [f"objective.weights.{task}=0"] for task in TASKS},
    "modality-dropout": ["objective.modality_dropout=0.3"],
    "hallucination": ["objective.modality_dropout=0.3", "objective.hallucination=1"],
    "hard-negatives": ["objective.hard_negatives=1"],
}
_HELDOUT = 480
_CPU = torch.device("cpu")


def train(run: TrainRun, data: RunData, tokenizer: PreTrainedTokenizerFast | None, until_s: float) -> tuple[Any, dict[str, float], int]:
    """The run's steps, or as many as there is time for: the schedule is the run's."""
    tokens = None if tokenizer is None else special_tokens(tokenizer)
    torch.manual_seed(run.seed)
    model = wrapped(run, build_model(run.model, tokens))
    weights, _ = named_weights(run, tokenizer)
    if weights is not None:
        model.model.load_state_dict(weights)
    step = build_step(run, model, StepClock(_CPU))
    masking = None if tokenizer is None else masking_of(run, mask_token(tokenizer), special_tokens(tokenizer).pad)
    light = None if tokenizer is None else caption_tokenizer(tokenizer, run.joint_model.context_length)
    spec = ReadSpec(
        data.sources,
        data.plan(run),
        run.model.image_size,
        run.data.augment,
        light,
        masking=masking,
        labels=num_classes(run) is not None,
        modalities=modalities_of(run),
    )
    reader, share = PlanReader(spec), Share(0, 1, run.global_batch_size // run.data.chunk)
    inputs, to_device = inputs_of(run, [run.global_batch_size], 0), Transfer(_CPU)
    losses: dict[str, float] = {}
    began = time.monotonic()
    for number in range(run.steps):
        table = reader.read(share.positions(number, run.data.chunk))
        (batch,) = steps_of(spec, share, iter([table]), number)
        seed_step(run.seed, number, 0)
        result = step(inputs(batch, to_device), number)
        losses |= {name: float(value) for name, value in (result.terms | result.measures).items()}
        if time.monotonic() - began > until_s:
            break
    return model.eval(), losses | {"seconds": time.monotonic() - began}, number + 1


def sources(work: Path) -> dict[str, Index]:
    """Pairs, images alone, texts alone, and held-out pairs and classes of scenes that are not trained on."""
    if not (work / "corpus").exists():
        labelled = dict.fromkeys(("question_samples", "matching_samples"), 8000)
        write_corpus(work / "corpus", SynthConfig(samples=8000, seed=3, image_size=64, heldout_samples=_HELDOUT, **labelled), workers=2)
    kinds = {"pairs": ("train", ("image", "text")), "images": ("train", ("image",)), "texts": ("train", ("text",))}
    kinds |= {"heldout": ("heldout", ("image", "text")), "classes": ("zeroshot/test", ("image",))}
    kinds |= {f"{kind}-{part}": (f"{kind}/{part}", ("image", "text")) for kind in LABELLED for part in ("train", "heldout")}
    found = {}
    for name, (part, need) in kinds.items():
        there = (work / name / "index.json").exists()
        found[name] = Index.open(str(work / name)) if there else build_index([str(work / "corpus" / part)], str(work / name), need=need)
    return found


def codebook(work: Path, data: dict[str, Index], seconds: float) -> dict[str, float]:
    """Trained once."""
    figures = work / "codebook.json"
    if not figures.exists():
        run = recipe("codebook-tiny")
        model, losses, steps = train(run, RunData.open([Source(index=data["images"].url)]), None, seconds)
        assert isinstance(model, DiscreteVae)
        facts: dict[str, Any] = {"recipe": run.recipe, "data_fingerprint": data["images"].summary.fingerprint, "metrics": {}}
        write_bundle(work / "codebook", model=model.model, beside=model.beside, tokenizer=None, config=run.model, **facts)
        figures.write_text(json.dumps(losses | {"steps": steps}))
    values: dict[str, float] = json.loads(figures.read_text())
    return values


def variant(work: Path, name: str, data: dict[str, Index], options: argparse.Namespace) -> dict[str, Any]:
    """Trained and measured once."""
    figures = work / f"{name}.json"
    if figures.exists():
        values: dict[str, Any] = json.loads(figures.read_text())
        return values
    run, opened = run_of(work, name, data, options)
    folder = work / "models" / name
    if not folder.exists():
        tokenizer = train_bpe(opened.captions(20_000), vocab_size=run.tokenizer.vocab_size, context_length=run.joint_model.context_length)
        run = run.model_copy(update={"model": resolved(run.model).model_copy(update={"vocab_size": len(tokenizer)})})
        model, losses, steps = train(run, opened, tokenizer, options.minutes * 60)
        facts: dict[str, Any] = {"recipe": run.recipe, "data_fingerprint": opened.fingerprint}
        facts["metrics"] = {"steps": steps, "seconds": round(losses["seconds"])}
        write_bundle(folder, model=model.model, beside=model.beside, tokenizer=tokenizer, config=run.model, **facts)
    bundle = load_bundle(folder)
    assert bundle.manifest is not None, "written above"
    row = {"variant": name, **bundle.manifest.metrics} | measure(work, bundle, run, data)
    figures.write_text(json.dumps(row, indent=1))
    return row


def run_of(work: Path, name: str, data: dict[str, Index], options: argparse.Namespace) -> tuple[TrainRun, RunData]:
    """A source that no task is left for is left out, and so are its steps: every variant sees as many pairs."""
    kinds = {"pairs": 3, "images": 1, "texts": 1}
    for alone, kind in (("no-mim", "images"), ("no-mlm", "texts")):
        if name == alone:
            del kinds[kind]
    steps = options.steps * sum(kinds.values()) // 5
    settings = [f"model.codebook_source={work / 'codebook'}", f"steps={steps}", *options.set, *VARIANTS[name]]
    run = resolve(recipe("flava-tiny"), environment={}, overrides=settings)[0]
    run = resolve(run, environment={}, overrides=[f"data.mix.weights={[*kinds.values()]}"])[0]
    return run, RunData.open([Source(index=data[kind].url) for kind in kinds])


def measure(work: Path, bundle: Bundle, run: TrainRun, data: dict[str, Index]) -> dict[str, Any]:
    assert run.data.masking is not None, "the recipe's"
    assert isinstance(bundle.towers, Fused), "of the recipe"
    held = held_out(bundle, IndexReader(data["heldout"]), compile_kept(data["heldout"]).ordinals)
    held = replace(held, masking=replace(held.masking, config=run.data.masking))
    words = {*COLOURS, *SHAPES, *(f"{shape}s" for shape in SHAPES)}
    row: dict[str, Any] = {"tasks": task_metrics(bundle.towers, held, _CPU)}
    hide = hiding(words, held.tokenizer, held.masking.mask_id)
    named = task_metrics(bundle.towers, held, _CPU, hide=hide, whole_images=True)
    asked = ("mlm", "mmm_text", "mmm_text_other_image", "mmm_text_no_image")
    row["colours_and_shapes"] = {key: named[key] for key in asked if key in named}
    pairs = decode_samples(held.reader, held.ordinals, run.model.image_size)
    texts = [captions[0] for captions in pairs.captions]
    row["retrieval"] = retrieval_metrics(bundle.image_features(pairs.images), bundle.text_features(texts), np.arange(len(texts)))
    labelled = decode_samples(IndexReader(data["classes"]), compile_kept(data["classes"]).ordinals, run.model.image_size)
    folder = work / "corpus" / "zeroshot"
    classes = class_embeddings(bundle, read_classnames(folder), read_templates(folder))
    row["zeroshot"] = zeroshot_metrics(bundle.image_features(labelled.images), labelled.labels, classes) | {"chance": 1 / len(classes)}
    row["questions"] = questions(bundle, data, run.model.image_size)
    return row


def questions(bundle: Bundle, data: dict[str, Index], size: int) -> dict[str, dict[str, float]]:
    """Of scenes: a linear layer on the fusion's class token, trained on 1,500 training scenes, with one side, or both; and with both in
    training but each side missing from half of the held-out questions."""
    shown = {part: _questions(data[part], count, size) for part, count in (("pairs", 1500), ("heldout", _HELDOUT))}
    (images, texts, answers), (held_images, held_texts, held_answers) = shown["pairs"], shown["heldout"]
    found = {}
    features = {sides: fused_features(bundle, images, texts, sides) for sides in Sides}
    held = {sides: fused_features(bundle, held_images, held_texts, sides) for sides in Sides}
    for sides in Sides:
        found[sides.value] = linear_probe(features[sides], answers, held[sides], held_answers)
    missing = np.arange(len(held_answers)) // 2 % 2 == 0  # of both kinds of questions half
    for sides, lost in ((Sides.TEXT, "half_without_image"), (Sides.IMAGE, "half_without_text")):
        mixed = np.where(missing[:, None], held[sides], held[Sides.BOTH])
        found[lost] = linear_probe(features[Sides.BOTH], answers, mixed, held_answers)
    return found


def _questions(index: Index, count: int, size: int) -> tuple[np.ndarray, list[str], list[str]]:
    """The third question of each scene, how many objects of a colour there are, and its background's colour by turns."""
    reader, ordinals = IndexReader(index), compile_kept(index).ordinals[:count]
    decoded, groups = decode_samples(reader, ordinals, size), reader.groups(ordinals)
    asked = [metadata_of(group)["qa"][2 + number % 2] for number, group in enumerate(groups) if not isinstance(group, Exception)]
    assert len(asked) == len(decoded.images), "rendered scenes are whole"
    return decoded.images, [qa["question"] for qa in asked], [qa["answer"] for qa in asked]


def finetuned(work: Path, name: str, data: dict[str, Index], options: argparse.Namespace) -> dict[str, Any]:
    """A variant trained further on each of `LABELLED`, with both sides; `whole` with each alone too, which is another model."""
    figures = work / f"{name}-finetuned.json"
    row: dict[str, Any] = json.loads(figures.read_text()) if figures.exists() else {"finetuned": name}
    for kind, classes in LABELLED.items():
        for sides in Sides if name == "whole" else [Sides.BOTH]:
            if f"{kind}/{sides.value}" in row:
                continue
            settings = [f"objective.num_classes={classes}", f"objective.sides={sides.value}", f"model.codebook_source={work / 'codebook'}"]
            if name != "scratch":
                settings.append(f"init={work / 'models' / name}")
            run = with_sources(resolve(recipe("flava-tiny-classify"), environment={}, overrides=[*settings, *options.set])[0])
            tokenizer = load_tokenizer(str(work / "models" / (name if name != "scratch" else "whole")))
            run = fed_by(run, tokenizer)
            model, losses, _ = train(run, RunData.open([Source(index=data[f"{kind}-train"].url)]), tokenizer, options.minutes * 60)
            with tempfile.TemporaryDirectory() as temporary:
                facts: dict[str, Any] = {"recipe": run.recipe, "data_fingerprint": "", "metrics": {}}
                write_bundle(Path(temporary) / "b", model=model.model, beside=model.beside, tokenizer=tokenizer, config=run.model, **facts)
                found = accuracies(load_bundle(Path(temporary) / "b"), data[f"{kind}-heldout"], sides)
            row[f"{kind}/{sides.value}"] = found | {"seconds": round(losses["seconds"])}
            figures.write_text(json.dumps(row, indent=1))
    return row


def accuracies(bundle: Bundle, index: Index, sides: Sides) -> dict[str, float]:
    """On held-out samples; of a model of both sides also where each is missing from half of them."""
    decoded = decode_samples(IndexReader(index), compile_kept(index).ordinals, bundle.image_size)
    images, texts, labels = decoded.images, [captions[0] for captions in decoded.captions], decoded.labels

    def right(shown: Sides) -> np.ndarray:
        told = bundle.classify(None if shown is Sides.TEXT else images, None if shown is Sides.IMAGE else texts)
        return np.asarray(told.argmax(axis=1) == labels)

    found = {"accuracy": float(right(sides).mean()), "constant_accuracy": float(np.bincount(labels).max() / len(labels))}
    if sides is Sides.BOTH:
        missing = np.arange(len(labels)) % 2 == 0
        for left, lost in ((Sides.TEXT, "half_without_image"), (Sides.IMAGE, "half_without_text")):
            found[lost] = float(np.where(missing, right(left), right(sides)).mean())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("--variants", nargs="*", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--finetune", nargs="*", choices=[*VARIANTS, "scratch"], default=[], help="Of the variants that are trained.")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--minutes", type=float, default=15.0, help="Of training, at most, for each variant.")
    parser.add_argument("--codebook-minutes", type=float, default=4.0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--set", action="append", default=[], help="Settings of the run, for trying.")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    work = options.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    data = sources(work)
    dist.init_process_group("gloo", init_method=f"file://{tempfile.mkdtemp()}/rendezvous", rank=0, world_size=1)
    try:
        rows = [codebook(work, data, options.codebook_minutes * 60)]
        rows += [variant(work, name, data, options) for name in options.variants]
        rows += [finetuned(work, name, data, options) for name in options.finetune]
    except BundleError as error:
        raise SystemExit(f"{error}; remove what is half done under {work}") from None
    finally:
        dist.destroy_process_group()
    print(json.dumps({"benchmark": "flava", "rows": rows}))


if __name__ == "__main__":
    main()
