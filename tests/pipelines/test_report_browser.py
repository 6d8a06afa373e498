"""A report in a real browser: nothing fails in it, nothing is asked of others, and it fits narrow and wide windows."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from mm_core.curation.ruleset import RuleSet
from pipelines.curate.filter import filter_index
from pipelines.curate.report.write import write_report
from pipelines.index import build_index

_PROBE = """<!doctype html><title>wait</title><body><script>
const look = (frame) => {
  const page = frame.contentDocument, root = page.documentElement;
  const small = [...page.querySelectorAll("svg text")].map((text) => text.getBoundingClientRect().height);
  const outside = (one) => !one.closest(".scroll, svg") && one.getBoundingClientRect().right > root.clientWidth + 1;
  const wide = [...page.querySelectorAll("main *")].filter(outside);
  return {
    width: root.clientWidth,
    scroll: root.scrollWidth,
    smallest: Math.min(...small),
    wide: wide.slice(0, 3).map((one) => one.outerHTML.slice(0, 120)),
    pictures: page.images.length,
    broken: [...page.images].filter((image) => image.complete && !image.naturalWidth).length,
  };
};
const frames = [400, 1280].map((width) => {
  const frame = document.createElement("iframe");
  frame.style = `width:${width}px;height:30000px;border:0`;
  frame.src = "report.html";
  document.body.append(frame);
  return frame;
});
addEventListener("load", () => { document.body.dataset.found = JSON.stringify(frames.map(look)); });
</script>"""


@pytest.fixture(scope="module")
def chromium() -> str:
    """
    Skips where there is none.
    """
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if found := shutil.which(name):
            return found
    pytest.skip("no Chromium on this machine: .ci/debian-packages installs one on Debian")


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[str, list[str]]]:
    """A server of `tmp_path`, and the paths it was asked for."""
    asked: list[str] = []

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None:
            asked.append(self.path)

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(tmp_path))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()


@pytest.mark.usefixtures("ray_cluster")
def test_a_report_is_readable_at_400_and_1280_pixels(corpus: Path, tmp_path: Path, chromium: str, served: tuple[str, list[str]]) -> None:
    index = build_index([str(corpus / "train")], str(tmp_path / "index"))
    rules = {f"a_rule_with_quite_a_long_name_{n}": {"rule": "words", "min": n} for n in range(4, 9)} | {
        "foreign": {"rule": "language", "languages": ["en"]},
        "long": {"rule": "characters", "max": 80},
    }
    filter_index(index, RuleSet.parse(rules, where="test"), "clean")
    filter_index(index, RuleSet.parse({"short": {"rule": "words", "min": 7}}, where="test"), "other")
    write_report(index, ["clean"], str(tmp_path / "report.html"), compare=("clean", "other"), gallery=4)
    (tmp_path / "probe.html").write_text(_PROBE)
    url, asked = served
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", f"--user-data-dir={tmp_path}/profile"]
    options += ["--virtual-time-budget=10000", "--enable-logging=stderr", "--v=0", "--dump-dom", f"{url}/probe.html"]
    done = subprocess.run([chromium, *options], capture_output=True, text=True, timeout=120, check=False)
    (found,) = re.findall(r'data-found="([^"]*)"', done.stdout) or [pytest.fail(done.stderr[-2000:])]
    for frame, width in zip(json.loads(html.unescape(found)), (400, 1280), strict=True):
        assert frame["width"] == width
        assert frame["scroll"] <= width, f"{width} px: {frame['wide']}"
        assert frame["wide"] == []
        assert frame["smallest"] >= 11, "the writing in charts can be read"
        assert (frame["pictures"] > 8, frame["broken"]) == (True, 0)
    assert [line for line in done.stderr.splitlines() if "CONSOLE" in line] == []
    assert set(asked) <= {"/probe.html", "/report.html", "/favicon.ico"}
