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


@cache
def in_the_suite(file: Path) -> set[str]:
    """The tests that a run of the suite takes: those of `make chaos` and `make long` keep no promise."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    left_out = [node.name for node in functions if re.search(r"mark\.(chaos|long|gpu)", " ".join(map(ast.unparse, node.decorator_list)))]
    return {node.name for node in functions if node.name.startswith("test_")} - set(left_out)


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
