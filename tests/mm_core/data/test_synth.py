from __future__ import annotations

import io
import json
import re
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mm_core.data.synth.corpus import CLASSES, MATCHES, SynthConfig, write_corpus, write_shard
from mm_core.data.synth.language import ANSWERS
from mm_core.data.synth.scene import BACKGROUNDS, COLOURS, SHAPES, SIZES
from mm_core.errors import ConfigError

CONFIG = SynthConfig(samples=240, seed=3, samples_per_shard=100, heldout_samples=60, zeroshot_samples=96)
NUMBERS = ["no", "one", "two", "three", "four"]
NAME = rf"(?:{'|'.join(COLOURS)}) (?:{'|'.join(SHAPES)})"
RELATION = "left of|right of|above|below"
CENTRE_IS_FILLED = set(SHAPES) - {"ring"}


def _read(path: Path) -> dict[str, dict[str, bytes]]:
    """Suffix → bytes of every sample of a shard, by key."""
    samples: dict[str, dict[str, bytes]] = {}
    with tarfile.open(path) as tar:
        for entry in tar:
            key, _, suffix = entry.name.partition(".")
            member = tar.extractfile(entry)
            assert member is not None
            samples.setdefault(key, {})[suffix] = member.read()
    return samples


def _samples(folder: Path) -> list[dict[str, bytes]]:
    return [sample for path in sorted(folder.glob("*.tar")) for sample in _read(path).values()]


def _files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def _pixels(sample: dict[str, bytes]) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(sample["jpg"])).convert("RGB")).astype(int)


def _name(thing: dict[str, Any]) -> str:
    return f"{thing['colour']} {thing['shape']}"


def _centre(thing: dict[str, Any]) -> tuple[float, float]:
    left, top, right, bottom = thing["box"]
    return (left + right) / 2, (top + bottom) / 2


def _holds(a: dict[str, Any], predicate: str, b: dict[str, Any]) -> bool:
    """The relation, from the boxes alone."""
    (ax, ay), (bx, by) = _centre(a), _centre(b)
    return {"left of": bx > ax, "right of": ax > bx, "above": by > ay, "below": ay > by}[predicate]


def _singular(word: str) -> str:
    return "cross" if word == "crosses" else word.removesuffix("s") if word != "cross" else word


@pytest.fixture(scope="module")
def synth(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("synth") / "corpus"
    assert len(write_corpus(folder, CONFIG)) == 3 + 1 + 1
    return folder


@pytest.fixture(scope="module")
def train(synth: Path) -> list[dict[str, bytes]]:
    return _samples(synth / "train")


@pytest.fixture(scope="module")
def truths(train: list[dict[str, bytes]]) -> list[dict[str, Any]]:
    return [json.loads(sample["json"]) for sample in train]


def test_the_same_seed_gives_the_same_bytes_however_many_processes_draw(synth: Path, tmp_path: Path) -> None:
    finished: list[int] = []
    write_corpus(tmp_path / "two", CONFIG, workers=2, on_progress=finished.append)
    assert _files(tmp_path / "two") == _files(synth)
    assert sum(finished) == 240 + 60 + 96


def test_a_shard_written_alone_is_the_shard_of_the_corpus(synth: Path, tmp_path: Path) -> None:
    assert write_shard(tmp_path / "alone.tar", "train", 100, 200, CONFIG) == 100
    assert (tmp_path / "alone.tar").read_bytes() == (synth / "train" / "00001.tar").read_bytes()


def test_another_seed_gives_other_scenes(train: list[dict[str, bytes]], tmp_path: Path) -> None:
    write_shard(tmp_path / "0.tar", "train", 0, 100, CONFIG.model_copy(update={"seed": 4}))
    assert not {s["jpg"] for s in _samples(tmp_path)} & {s["jpg"] for s in train}


def test_held_out_and_zeroshot_scenes_are_not_in_train(synth: Path, train: list[dict[str, bytes]]) -> None:
    seen = {sample["jpg"] for sample in train}
    assert len(seen) == len(train) == 240
    held_out, zeroshot = _samples(synth / "heldout"), _samples(synth / "zeroshot" / "test")
    assert len(held_out) == 60
    assert not seen & {sample["jpg"] for sample in held_out + zeroshot}
    uids = [json.loads(sample["json"])["uid"] for sample in train + held_out]
    assert len(set(uids)) == 300


def test_tar_headers_say_nothing_of_the_machine(synth: Path) -> None:
    with tarfile.open(synth / "train" / "00000.tar") as tar:
        entries = tar.getmembers()
    assert {(e.mtime, e.uid, e.gid, e.uname, e.gname, e.mode) for e in entries} == {(0, 0, 0, "", "", 0o644)}
    assert [e.name.partition(".")[2] for e in entries[:6]] == ["jpg", "txt", "json"] * 2


def test_boxes_bound_what_was_drawn(train: list[dict[str, bytes]], truths: list[dict[str, Any]]) -> None:
    """Where a scene has one object on an even background, the pixels that differ from it fill the box, to a pixel."""
    checked = Counter[str]()
    for sample, truth in zip(train, truths, strict=True):
        for thing in truth["objects"]:
            left, top, right, bottom = thing["box"]
            assert 0 <= left < right <= truth["width"]
            assert 0 <= top < bottom <= truth["height"]
        if len(truth["objects"]) == 1 and not truth["background"]["gradient"]:
            ground = np.asarray(BACKGROUNDS[truth["background"]["colour"]])
            rows, columns = np.nonzero(np.abs(_pixels(sample) - ground).sum(axis=2) > 60)
            drawn = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
            np.testing.assert_allclose(drawn, truth["objects"][0]["box"], atol=2)
            checked[truth["objects"][0]["shape"]] += 1
    assert set(checked) == set(SHAPES)


def test_objects_have_the_colour_they_are_said_to_have(train: list[dict[str, bytes]], truths: list[dict[str, Any]]) -> None:
    checked = Counter[str]()
    for sample, truth in zip(train, truths, strict=True):
        pixels = _pixels(sample)
        for thing in truth["objects"]:
            if thing["texture"] == "plain" and thing["shape"] in CENTRE_IS_FILLED:
                x, y = map(int, _centre(thing))
                seen = pixels[y - 1 : y + 2, x - 1 : x + 2].mean(axis=(0, 1))
                np.testing.assert_allclose(seen, COLOURS[thing["colour"]], atol=12)
                checked[thing["colour"]] += 1
    assert set(checked) == set(COLOURS)


def test_the_background_is_what_it_is_said_to_be(train: list[dict[str, bytes]], truths: list[dict[str, Any]]) -> None:
    for sample, truth in zip(train, truths, strict=True):
        corner = _pixels(sample)[0, 0]
        named = {name: np.abs(corner - np.asarray(colour)).sum() for name, colour in BACKGROUNDS.items()}
        assert min(named, key=lambda name: named[name]) == truth["background"]["colour"]


def test_size_words_mean_the_same_in_every_scene(truths: list[dict[str, Any]]) -> None:
    radii: dict[str, list[float]] = {size: [] for size in SIZES}
    for truth in truths:
        for thing in truth["objects"]:
            if thing["shape"] in ("circle", "ring", "cross"):
                left, _, right, _ = thing["box"]
                radii[thing["size"]].append((right - left) / 2 / truth["width"])
    assert max(radii["small"]) < min(radii["large"])


def test_objects_do_not_overlap(truths: list[dict[str, Any]]) -> None:
    for truth in truths:
        boxes = [thing["box"] for thing in truth["objects"]]
        for i, (left, top, right, bottom) in enumerate(boxes):
            for other in boxes[i + 1 :]:
                assert right <= other[0] or other[2] <= left or bottom <= other[1] or other[3] <= top


def test_relations_hold_and_have_their_inverses(truths: list[dict[str, Any]]) -> None:
    inverse = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    for truth in truths:
        found = {(r["subject"], r["predicate"], r["object"]) for r in truth["relations"]}
        assert len(found) == len(truth["relations"])
        for subject, predicate, other in found:
            assert _holds(truth["objects"][subject], predicate, truth["objects"][other])
            assert (other, inverse[predicate], subject) in found
    assert any(truth["relations"] for truth in truths)


def _is_true(caption: str, truth: dict[str, Any]) -> bool:
    """Whether a caption agrees with the ground truth, read by its own small grammar and not by the templates."""
    things = truth["objects"]
    by_name = {_name(thing): thing for thing in things}
    ground = re.search(r" on a (\w+) background$", caption)
    if ground and ground[1] != truth["background"]["colour"]:
        return False
    said = caption.removesuffix(ground[0]) if ground else caption
    if match := re.fullmatch(rf"an? ({NAME}) ({RELATION}) an? ({NAME})", said):
        return _holds(by_name[match[1]], match[2], by_name[match[3]])
    if match := re.fullmatch(rf"an? ({NAME}) (?:in the|at the|on the) ([a-z ]+) and (\w+) more things?", said):
        return by_name[match[1]]["position"] == match[2] and NUMBERS.index(match[3]) == len(things) - 1
    if match := re.fullmatch(r"(.*) (?:in the|at the|on the) ([a-z ]+)", said):
        if match[2] != things[0]["position"]:
            return False
        said = match[1]
    if match := re.fullmatch(r"there is one (\w+), it is (\w+)", said):
        return [(thing["shape"], thing["colour"]) for thing in things] == [match.groups()]
    if match := re.fullmatch(r"there are (\w+) (\w+), all (\w+)", said):
        said = f"{match[1]} {match[3]} {match[2]}"
    elif match := re.fullmatch(r"(\w+) in (\w+), (\w+) of them", said):
        said = f"{match[3]} {match[2]} {match[1]}"
    elif match := re.fullmatch(r"(\w+) (\w+) things: (\w+)", said):
        said = f"{match[1]} {match[2]} {match[3]}"
    elif match := re.fullmatch(r"(\w+) things: (.*)", said):
        if NUMBERS.index(match[1]) != len(things):
            return False
        said = match[2]
    return _lists(re.split(", | and ", said.removeprefix("a picture of ")), things)


def _lists(phrases: list[str], things: list[dict[str, Any]]) -> bool:
    """Whether the phrases ("two red rings", "a small cross") count out exactly the scene's objects."""
    unclaimed = list(things)
    for phrase in phrases:
        determiner, *words = phrase.split()
        count = 1 if determiner in ("a", "an") else NUMBERS.index(determiner)
        wanted = {_singular(word) for word in words}
        fitting = [t for t in unclaimed if wanted <= {t["shape"], t["colour"], t["size"], t["texture"]}]
        if len(fitting) < count:
            return False
        for thing in fitting[:count]:
            unclaimed.remove(thing)
    return not unclaimed


def test_every_caption_is_true_of_its_scene(synth: Path, train: list[dict[str, bytes]], truths: list[dict[str, Any]]) -> None:
    held_out = [json.loads(sample["json"]) for sample in _samples(synth / "heldout")]
    for truth in truths + held_out:
        assert len(set(truth["captions"])) == 5
        for caption in truth["captions"]:
            assert _is_true(caption, truth), (caption, truth["objects"])
    assert [sample["txt"].decode() for sample in train] == [truth["captions"][0] for truth in truths]


def test_the_caption_checker_notices_what_is_false(truths: list[dict[str, Any]]) -> None:
    """A caption of a scene with other objects is false of this one: without this, the test above could pass anything."""
    uncounted = [t for t in truths if len(t["objects"]) != 3]
    three = next(t for t in truths if len(t["objects"]) == 3 and "a picture of" not in t["captions"][0])
    assert not any(_is_true(three["captions"][0], other) for other in uncounted)


def test_captions_tell_scenes_apart(truths: list[dict[str, Any]]) -> None:
    assert len({truth["captions"][0] for truth in truths}) > 0.9 * len(truths)
    words = {word for truth in truths for caption in truth["captions"] for word in caption.split()}
    assert words >= set(COLOURS) | set(SHAPES) | {"left", "right", "above", "below", "two", "three", "four", "striped", "dotted"}
    assert not any(re.search(r"synth|\d", caption) for truth in truths for caption in truth["captions"])


def _answer(question: str, truth: dict[str, Any]) -> str:
    """The answer, worked out anew from the objects."""
    things = truth["objects"]
    if question == "how many objects are there?":
        return NUMBERS[len(things)]
    if question == "what colour is the background?":
        return str(truth["background"]["colour"])
    if match := re.fullmatch(r"how many (\w+) objects are there\?", question):
        return NUMBERS[sum(thing["colour"] == match[1] for thing in things)]
    if match := re.fullmatch(r"how many (\w+) are there\?", question):
        return NUMBERS[sum(thing["shape"] == _singular(match[1]) for thing in things)]
    if match := re.fullmatch(rf"is there an? ({NAME})\?", question):
        return "yes" if match[1] in map(_name, things) else "no"
    if match := re.fullmatch(rf"is the ({NAME}) ({RELATION}) the ({NAME})\?", question):
        (a,), (b,) = ([thing for thing in things if _name(thing) == name] for name in (match[1], match[3]))
        return "yes" if _holds(a, match[2], b) else "no"
    match = re.fullmatch(r"(what (?:colour|size) is|what texture has|where is) the (\w+)\?", question)
    assert match is not None, question
    (only,) = (thing for thing in things if thing["shape"] == match[2])
    return str(only["position" if match[1] == "where is" else match[1].split()[1]])


def test_every_answer_is_right(truths: list[dict[str, Any]]) -> None:
    kinds = Counter[str]()
    for truth in truths:
        for asked in truth["qa"]:
            assert asked["answer"] == _answer(asked["question"], truth), asked
            kinds[asked["kind"]] += 1
    assert set(kinds) == {"count", "background", "existence", "colour", "size", "texture", "position", "relation"}


def test_a_yes_or_no_cannot_be_guessed_from_the_question(truths: list[dict[str, Any]]) -> None:
    """The absent object that is asked about is a different one from scene to scene."""
    absent = Counter(q["question"] for truth in truths for q in truth["qa"] if q["kind"] == "existence" and q["answer"] == "no")
    assert max(absent.values()) < 0.1 * len(truths)


def test_positions_agree_with_the_pixels(truths: list[dict[str, Any]]) -> None:
    for truth in truths:
        for thing in truth["objects"]:
            x, y = (at / truth["width"] for at in _centre(thing))
            for word, inside in {"left": x < 0.42, "right": x > 0.58, "top": y < 0.42, "bottom": y > 0.55}.items():
                assert inside or word not in thing["position"].split()


def test_zeroshot_has_clip_benchmarks_layout(synth: Path) -> None:
    folder = synth / "zeroshot"
    classes = (folder / "classnames.txt").read_text().splitlines()
    assert classes == CLASSES
    assert len(set(classes)) == len(COLOURS) * len(SHAPES)
    assert all("{c}" in line for line in (folder / "zeroshot_classification_templates.txt").read_text().splitlines())
    assert (folder / "test" / "nshards.txt").read_text() == "1"
    samples = _read(folder / "test" / "0.tar")
    assert Counter(int(sample["cls"]) for sample in samples.values()) == dict.fromkeys(range(len(classes)), 2)
    for sample in samples.values():
        named = np.asarray(COLOURS[classes[int(sample["cls"])].split()[0]])
        assert (np.abs(_pixels(sample) - named).max(axis=2) < 25).sum() > 40


def _holds_of(caption: str, truth: dict[str, Any]) -> bool:
    """`_is_true`, of a caption that may name what is not there."""
    try:
        return _is_true(caption, truth)
    except KeyError:
        return False


def test_questions_and_claims_are_of_the_scenes_and_their_classes_are_right(tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"samples": 60, "heldout_samples": 20, "question_samples": 60, "matching_samples": 60})
    paths = write_corpus(tmp_path / "corpus", config)
    assert sum(len(_read(path)) for path in paths) == sum(config.parts.values())
    for part in ("train", "heldout"):
        scenes, asked, claimed = (_samples(tmp_path / "corpus" / folder / part) for folder in ("", "questions", "matching"))
        claims = Counter[str]()
        for scene, question, claim in zip(scenes, asked, claimed, strict=True):
            assert scene["jpg"] == question["jpg"] == claim["jpg"]
            truth = json.loads(scene["json"])
            assert ANSWERS[int(question["cls"])] == _answer(question["txt"].decode(), truth)
            told = MATCHES[int(claim["cls"])]
            assert _holds_of(claim["txt"].decode(), truth) == (told == "true"), claim["txt"]
            claims[told] += 1
        assert min(claims.values()) > len(scenes) / 4
    assert (tmp_path / "corpus" / "questions" / "classnames.txt").read_text().splitlines() == ANSWERS
    assert (tmp_path / "corpus" / "matching" / "classnames.txt").read_text().splitlines() == MATCHES


def test_max_objects_and_image_size_are_kept(tmp_path: Path) -> None:
    write_shard(tmp_path / "0.tar", "train", 0, 40, CONFIG.model_copy(update={"max_objects": 2, "image_size": 64}))
    samples = _samples(tmp_path)
    assert {len(json.loads(sample["json"])["objects"]) for sample in samples} == {1, 2}
    assert {_pixels(sample).shape for sample in samples} == {(64, 64, 3)}


def test_parts_that_are_not_wanted_are_not_made(tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus", SynthConfig(samples=3, heldout_samples=0, zeroshot_samples=0))
    assert [str(path.relative_to(tmp_path / "corpus")) for path in sorted((tmp_path / "corpus").rglob("*"))] == ["train", "train/00000.tar"]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_is_already_there_is_refused_and_kept(kind: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    mine = out if kind == "file" else out / "mine.txt"
    mine.parent.mkdir(exist_ok=True)
    mine.write_text("mine")
    with pytest.raises(ConfigError, match="give another folder, or remove it first"):
        write_corpus(out, SynthConfig(samples=3))
    assert mine.read_text() == "mine"


@pytest.mark.parametrize("existed", [True, False])
@pytest.mark.parametrize("workers", [1, 2])
def test_an_interrupted_run_leaves_nothing_behind(workers: int, existed: bool, tmp_path: Path) -> None:
    out = tmp_path / "out"
    if existed:
        out.mkdir()

    def interrupt(samples: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_corpus(out, SynthConfig(samples=30, samples_per_shard=10), workers=workers, on_progress=interrupt)
    assert out.exists() == existed
    assert not existed or not list(out.iterdir())
