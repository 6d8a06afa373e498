"""Every example of docs/serving.md runs against the endpoint, and the bounds it lists are the defaults."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from PIL import Image

from serve.config import ServeConfig
from serve.run import Server

DOCS = Path(__file__).parents[2] / "docs"
GUIDE = (DOCS / "serving.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```(bash|python)\n(.*?)```", GUIDE, flags=re.DOTALL)


def test_there_are_examples() -> None:
    assert {language for language, _ in EXAMPLES} == {"bash", "python"}


@pytest.mark.parametrize(("language", "code"), EXAMPLES)
def test_the_example_runs(server: Server, tmp_path: Path, language: str, code: str) -> None:
    Image.new("RGB", (60, 40), "red").save(tmp_path / "photo.jpg")
    program = ["bash", "-euo", "pipefail", "-c"] if language == "bash" else [sys.executable, "-c"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    code = code.replace("http://127.0.0.1:8000", server.url)
    done = subprocess.run([*program, code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    if language == "bash":
        assert json.loads(done.stdout)["model"] == server.models[0]
    else:
        assert "cosine" in done.stdout


@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MM_URL", server.url)
    monkeypatch.setenv("PYTHONPATH", str(DOCS.parent))
    notebook = nbformat.read(DOCS / "serving.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "what it showed once is not kept"
    done = NotebookClient(notebook, timeout=120, kernel_name="python3").execute()
    printed = "".join(output.get("text", "") for cell in done.cells for output in cell.get("outputs", ()))
    assert "60 in all" in printed
    assert "not_an_image" in printed


def test_the_bounds_are_the_defaults() -> None:
    config = ServeConfig().bounds
    table = dict(re.findall(r"^\| ([^|]+?) \| ([\d,]+)", GUIDE.split("| bound |")[1], flags=re.MULTILINE))
    found = {name: int(value.replace(",", "")) for name, value in table.items()}
    assert found == {
        "requests computed or waiting at a time": config.max_requests,
        "inputs computed or waiting at a time": config.max_waiting_inputs,
        "bytes of all bodies held at a time": config.max_body_bytes,
        "results of a search, all pages together": config.max_results,
        "bytes of a body": config.max_request_bytes,
        "inputs of a call (labels × templates when classifying)": config.max_inputs,
        "characters of a text": config.max_text_characters,
        "bytes of a picture": config.max_image_bytes,
        "pixels of a picture, from its header": config.max_pixels,
        "time for a request": int(config.request_timeout_s),
    }
