"""Over 200 generated shards that are hostile, damaged or only odd: nothing crashes, hangs, grows or is lost without a count."""

from __future__ import annotations

import importlib.util
import io
import signal
import sys
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, ModuleType
from typing import TypeVar

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mm_core.data.image import decode_centre
from mm_core.data.problems import Reason, SampleProblem
from mm_core.data.sample import Sample, group_of_span, read_group
from mm_core.data.scan import Batch, scan_shard

T = TypeVar("T")
LIMIT_S = 20
NEED = ("image", "text")


def _load() -> ModuleType:
    """The module beside this one: tests are imported by path, so there is no package to import it from."""
    spec = importlib.util.spec_from_file_location("adversarial", Path(__file__).with_name("adversarial.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["adversarial"] = module
    spec.loader.exec_module(module)
    return module


adversarial = _load()
CASES = list(adversarial.cases())


@contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    def stop(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"took longer than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def scan(path: Path, **options: int) -> list[Batch]:
    with time_limit(LIMIT_S):
        return list(scan_shard(str(path), 0, NEED, **options))


def reasons_of(batches: list[Batch]) -> Counter[str]:
    return Counter(reason for batch in batches for reason in batch.table["reason"].to_pylist() if reason)


def test_there_are_enough_cases_and_they_are_repeatable() -> None:
    assert len(CASES) >= 200
    assert [case.data for case in adversarial.cases()] == [case.data for case in CASES]
    expected = adversarial.count(CASES)
    found_at_reading = {"undecodable", "read_failed", "changed"}
    assert set(expected) == {reason.value for reason in Reason} - found_at_reading - {"too_many_of_a_key"}


def test_a_key_that_comes_too_often_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mm_core.data.scan.MAX_OCCURRENCE", 2)
    path = tmp_path / "s.tar"
    path.write_bytes(b"".join(adversarial.pair("same") for _ in range(5)) + bytes(2 * 512))
    (batch,) = scan(path)
    assert batch.table["reason"].to_pylist() == [None, None, None, "too_many_of_a_key", "too_many_of_a_key"]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_case(case: adversarial.Case, tmp_path: Path) -> None:  # type: ignore[name-defined]
    shards = tmp_path / "shards"
    shards.mkdir()
    path = shards / "s.tar"
    path.write_bytes(case.data)
    batches = scan(path)
    reasons = reasons_of(batches)
    usable = sum(reason is None for batch in batches for reason in batch.table["reason"].to_pylist())
    if case.samples is not None:
        assert (usable, dict(reasons)) == (case.samples, case.reasons)
    else:
        assert usable + reasons.total() > 0
    assert [entry.name for entry in tmp_path.rglob("*")] == ["shards", "s.tar"], "something was written"
    for batch in batches:
        pq.write_table(batch.table, io.BytesIO())
        for row, locator in zip(batch.table.to_pylist(), batch.locators, strict=True):
            if row["span"]:
                _assert_span_reads_as_indexed(case.data, row, locator)


def _assert_span_reads_as_indexed(data: bytes, row: dict[str, object], locator: np.void) -> None:
    """A ranged read of the span alone comes to what the index says, and usable images decode or say why not."""
    start, span = int(locator["start"]), int(locator["span"])
    locate = {"check": int(locator["check"]), "occurrence": int(locator["occurrence"])}
    sample = _or_reason(lambda: read_group(group_of_span(data[start : start + span], "s.tar", **locate), "s.tar"))
    if not isinstance(sample, Sample):
        assert sample == row["reason"]
        return
    assert sample.uid == row["uid"]
    if row["reason"] is None:
        assert sample.image is not None
        with time_limit(LIMIT_S):
            pixels = _or_reason(lambda: decode_centre(sample.image or b"", 16))
        assert pixels == Reason.UNDECODABLE if isinstance(pixels, str) else pixels.shape == (16, 16, 3)


def _or_reason(read: Callable[[], T]) -> T | str:
    try:
        return read()
    except SampleProblem as problem:
        return problem.reason.value


def _jpeg_with_orientation(image: Image.Image, orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", exif=exif, quality=95, subsampling=0)
    return buffer.getvalue()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int) -> None:
    quarters = np.zeros((64, 64, 3), dtype=np.uint8)
    quarters[:32, :32], quarters[:32, 32:], quarters[32:, :32] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    upright = Image.fromarray(quarters)
    inverse = {
        1: None,
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }[orientation]
    stored = upright if inverse is None else upright.transpose(inverse)
    decoded = decode_centre(_jpeg_with_orientation(stored, orientation), 64).astype(int)
    centres = decoded[16::32, 16::32].reshape(4, 3)
    assert np.abs(centres - [(255, 0, 0), (0, 255, 0), (0, 0, 255), (0, 0, 0)]).max() < 12


@pytest.mark.parametrize(
    ("mode", "colour", "image_format", "expected", "tolerance"),
    [
        ("RGBA", (255, 0, 0, 0), "PNG", (255, 255, 255), 0),
        ("RGBA", (255, 0, 0, 128), "PNG", (255, 127, 127), 1),
        ("LA", (0, 64), "PNG", (191, 191, 191), 1),
        ("RGBA", (0, 0, 255, 128), "WEBP", (127, 127, 255), 3),
        ("L", 77, "PNG", (77, 77, 77), 0),
        ("L", 77, "JPEG", (77, 77, 77), 1),
        ("CMYK", (0, 255, 255, 0), "JPEG", (255, 0, 0), 4),
        ("CMYK", (0, 0, 0, 255), "JPEG", (0, 0, 0), 4),
        ("I;16", 65535, "PNG", (255, 255, 255), 0),
        ("I;16", 32768, "PNG", (127, 127, 127), 1),
        ("1", 1, "PNG", (255, 255, 255), 0),
    ],
)
def test_decoded_colours_are_right(
    mode: str, colour: int | tuple[int, ...], image_format: str, expected: tuple[int, int, int], tolerance: int
) -> None:
    buffer = io.BytesIO()
    Image.new(mode, (32, 32), colour).save(buffer, image_format, **({"lossless": True} if image_format == "WEBP" else {}))
    decoded = decode_centre(buffer.getvalue(), 16).astype(int)
    assert np.abs(decoded - expected).max() <= tolerance


def test_progressive_and_first_frames_are_what_pillow_shows() -> None:
    smooth = Image.linear_gradient("L").resize((64, 64)).convert("RGB")
    other = Image.new("RGB", (64, 64), "red")
    for options in (
        {"format": "JPEG", "progressive": True, "quality": 95},
        {"format": "PNG", "save_all": True, "append_images": [other]},
        {"format": "WEBP", "save_all": True, "append_images": [other], "lossless": True},
    ):
        buffer = io.BytesIO()
        smooth.save(buffer, **options)
        assert np.abs(decode_centre(buffer.getvalue(), 64).astype(int) - np.asarray(smooth)).max() <= 8


def test_other_projects_odd_shards(photos: Path) -> None:
    found = {}
    for path in sorted((photos / "odd-shards").glob("*.tar")):
        batches = scan(path)
        found[path.stem] = (sum(len(b.table) for b in batches), dict(reasons_of(batches)))
    assert found == {
        "directory-entry-gz-members": (3, {"unsupported_member": 3}),
        "images-without-text": (4, {"no_text": 4}),
        "same-stem-jpg-png": (1, {"no_text": 1}),
    }


def test_img2datasets_layout(photos: Path) -> None:
    batches = scan(photos / "cc12m-sample.tar")
    rows = [row for batch in batches for row in batch.table.to_pylist()]
    assert len(rows) == 32
    assert {tuple(sorted(m["suffix"] for m in row["members"])) for row in rows} == {("jpg", "json", "txt")}
    assert {row["reason"] for row in rows} == {None}


def test_batches_hold_the_same_rows_whatever_their_length(tmp_path: Path) -> None:
    path = tmp_path / "s.tar"
    path.write_bytes(b"".join(adversarial.pair(str(i)) for i in range(25)) + adversarial.END)
    (whole,) = scan(path)
    pieces = scan(path, batch_rows=10)
    assert [len(piece.table) for piece in pieces] == [10, 10, 5]
    assert [row for piece in pieces for row in piece.table.to_pylist()] == whole.table.to_pylist()
    np.testing.assert_array_equal(np.concatenate([piece.locators for piece in pieces]), whole.locators)


def test_memory_does_not_grow_with_the_shard(tmp_path: Path) -> None:
    """Eight times the samples: the peak stays where it was but for the keys, at most 250 bytes each."""
    peaks = []
    for samples in (2_000, 16_000):
        path = tmp_path / f"{samples}.tar"
        with path.open("wb") as file:
            for i in range(samples):
                file.write(adversarial.pair(f"{i:08d}", text=b"word " * 40))
            file.write(adversarial.END)
        tracemalloc.start()
        for batch in scan_shard(str(path), 0, NEED, batch_rows=500):
            assert len(batch.table) <= 500
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] - peaks[0] < 14_000 * 250


def test_a_sample_of_many_large_members_is_not_held_whole(tmp_path: Path) -> None:
    path = tmp_path / "s.tar"
    with path.open("wb") as file:
        for i in range(6):
            file.write(adversarial.header(b"a.s%d" % i, 100 << 20))
            file.seek(100 << 20, 1)  # sparse on disk: only the reader pays
        file.write(adversarial.member("a.jpg", adversarial.JPEG) + adversarial.member("a.txt", b"t") + adversarial.END)
    tracemalloc.start()
    (batch,) = scan(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert batch.table["reason"].to_pylist() == [None]
    assert peak < 450 << 20
