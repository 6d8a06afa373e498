"""The loop of docs/training.md under `torchrun`, as it stands there: two ranks, and a second command that goes on."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

DOCS = Path(__file__).parents[3] / "docs" / "training.md"


def run(folder: Path, steps: int) -> dict[int, float]:
    """By step the loss that it prints."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "own_loop.py"]
    environment = os.environ | {"STEPS": str(steps), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(DOCS.parents[1])}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return {int(number): float(loss) for number, loss in re.findall(r"^(\d+) ([\d.]+)$", done.stdout, re.MULTILINE)}


def test_the_loop_of_the_page_trains_and_goes_on(tmp_path: Path) -> None:
    (code,) = re.findall(r"## Without Ray\n.*?```python\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "own_loop.py").write_text(code, encoding="utf-8")
    first = run(tmp_path, 10)
    assert [*first] == [*range(1, 11)]
    assert first[10] < first[1]
    second = run(tmp_path, 20)
    assert [*second] == [*range(11, 21)]
    assert second[20] < first[10]
