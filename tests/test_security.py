"""SECURITY.md promises nothing without a test, and the tests it names are there."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROMISES = [
    tuple(cell.strip() for cell in line.strip("|").split(" | "))
    for line in (ROOT / "SECURITY.md").read_text(encoding="utf-8").splitlines()
    if line.startswith("| ") and not line.startswith(("| promise", "|--"))
]


LEFT_OUT = re.compile(r"mark\.(chaos|long|gpu)\b")


@cache
def in_the_suite(file: Path) -> set[str]:
    """The tests that a run of the suite takes: those of `make chaos` and `make long`, marked one by one or by module, keep no promise."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    if any(LEFT_OUT.search(ast.unparse(node)) for node in tree.body if isinstance(node, ast.Assign | ast.AnnAssign) and _marks(node)):
        return set()
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    left_out = [node.name for node in functions if LEFT_OUT.search(" ".join(map(ast.unparse, node.decorator_list)))]
    return {node.name for node in functions if node.name.startswith("test_")} - set(left_out)


def _marks(node: ast.Assign | ast.AnnAssign) -> bool:
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    return "pytestmark" in map(ast.unparse, targets)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("def test_a(): ...", {"test_a"}),
        ("@pytest.mark.long\ndef test_a(): ...\ndef test_b(): ...", {"test_b"}),
        ("pytestmark = pytest.mark.slow\ndef test_a(): ...", {"test_a"}),
        ("pytestmark = [pytest.mark.usefixtures('x'), pytest.mark.chaos]\ndef test_a(): ...", set()),
        ("pytestmark: object = pytest.mark.long\ndef test_a(): ...", set()),
    ],
)
def test_marked_tests_are_not_in_the_suite(tmp_path: Path, text: str, found: set[str]) -> None:
    (tmp_path / "test_x.py").write_text(text)
    assert in_the_suite(tmp_path / "test_x.py") == found


@pytest.mark.parametrize("promise", PROMISES, ids=lambda promise: promise[0][:60])
def test_every_promise_has_tests(promise: tuple[str, ...]) -> None:
    _, named = promise
    tests = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", named)
    assert tests
    assert re.sub(r"`[^`]+`|[, ]", "", named) == ""
    for file, name in tests:
        assert name in in_the_suite(ROOT / file), f"{file} has no {name}"


def test_there_are_promises() -> None:
    assert len(PROMISES) > 30
