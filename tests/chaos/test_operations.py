"""docs/operations.md, command by command: three nodes, a run, a node lost, the head lost, and the run goes on to its end."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import duckdb
import psutil
import pytest
import requests

from mm_core.data.index import Index
from mm_core.ports import free_ports

pytestmark = pytest.mark.chaos
PAGE = Path(__file__).parents[2] / "docs" / "operations.md"
BLOCKS = re.findall(r"^```sh\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
(QUERY,) = re.findall(r"^```sql\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


class Terminals:
    """Shells in one folder, with a home of its own; the page's ports are given others, as another cluster may have them."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._open = folder, list[subprocess.Popen[bytes]]()
        gcs, dashboard, client, metrics, agent = free_ports(5)
        self.dashboard = f"http://127.0.0.1:{dashboard}"
        self._temporary = tempfile.mkdtemp(prefix="mmo")  # short: the paths of Ray's sockets must fit 107 bytes
        beside = f"--dashboard-port {dashboard} --ray-client-server-port {client} --metrics-export-port {metrics}"
        beside += f" --dashboard-agent-listen-port {agent} --object-store-memory 100000000 --temp-dir {self._temporary}/r"
        self._others = {"--port 6379": f"--port {gcs} {beside}", ":6379": f":{gcs}", ":8265": f":{dashboard}"}
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "AWS_", "MM_"))}
        self._environment = kept | {
            "HOME": str(folder),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(PAGE.parents[1]),
            "RAY_AUTH_MODE": "token",
            "RAY_API_SERVER_ADDRESS": self.dashboard,
        }

    def _here(self, commands: str) -> str:
        for theirs, ours in self._others.items():
            commands = commands.replace(theirs, ours)
        return f"set -e\n{commands}"

    def run(self, commands: str) -> str:
        done = subprocess.run(
            ["bash", "-c", self._here(commands)], cwd=self.folder, env=self._environment, capture_output=True, text=True, timeout=1800
        )
        assert done.returncode == 0, f"{commands}\n{done.stdout}\n{done.stderr}"
        return done.stdout + done.stderr

    def open(self, commands: str) -> subprocess.Popen[bytes]:
        log = (self.folder / f"terminal{len(self._open)}.log").open("wb")
        self._open.append(
            subprocess.Popen(["bash", "-c", self._here(commands)], cwd=self.folder, env=self._environment, stdout=log, stderr=log)
        )
        return self._open[-1]

    def lose(self, terminal: subprocess.Popen[bytes]) -> None:
        """With all that runs in it, at once."""
        family = [psutil.Process(terminal.pid), *psutil.Process(terminal.pid).children(recursive=True)]
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(family, timeout=30)

    def close(self) -> None:
        for terminal in self._open:
            with contextlib.suppress(psutil.NoSuchProcess):
                self.lose(terminal)
        shutil.rmtree(self._temporary, ignore_errors=True)


@pytest.fixture
def terminals(tmp_path: Path) -> Iterator[Terminals]:
    terminals = Terminals(tmp_path)
    yield terminals
    terminals.close()


def wait(done: Callable[[], bool], what: str, timeout_s: float = 240) -> None:
    until = time.monotonic() + timeout_s
    while not done():
        assert time.monotonic() < until, f"no {what} in {timeout_s:g} s"
        time.sleep(0.5)


def is_up(terminals: Terminals, nodes: int) -> Callable[[], bool]:
    token = {"Authorization": f"Bearer {(terminals.folder / '.ray' / 'auth_token').read_text().strip()}"}

    def look() -> bool:
        try:
            answer = requests.get(f"{terminals.dashboard}/api/v0/nodes?detail=1", headers=token, timeout=5)
            found = answer.json()["data"]["result"]["result"]
            return sum(node["state"] == "ALIVE" for node in found) == nodes
        except (requests.RequestException, ValueError, KeyError, TypeError):
            return False

    return look


def test_the_page_from_top_to_bottom(terminals: Terminals) -> None:
    head, node, run_it, look, go_on, status = BLOCKS
    setting_up, starting = head.splitlines()[:3], head.splitlines()[3:]
    terminals.run("\n".join(setting_up))
    first_head = terminals.open("\n".join(starting))
    wait(is_up(terminals, 1), "head")
    nodes = [joined(terminals, node, 2), joined(terminals, node, 3)]

    shown = terminals.run(run_it)
    run = terminals.folder / "runs" / "first"
    assert "job first-1" in shown
    wait(lambda: on_two_ranks(run), "checkpoint of two ranks")

    before = attempt(run)
    terminals.lose(nodes.pop())
    wait(lambda: attempt(run) > before, "new attempt after a node was lost")
    terminals.run(look)
    assert "Total Usage" in terminals.run(status)
    wait(lambda: newest(run).exists() and not on_two_ranks(run), "checkpoint of one rank")
    nodes.append(joined(terminals, node, 3))
    wait(lambda: on_two_ranks(run), "checkpoint of two ranks again")

    record = json.loads((run / "run.json").read_text())
    assert not (run / "bundle").exists(), "the run ended before the head was lost: more steps are needed"
    terminals.lose(first_head)
    wait(lambda: all(each.poll() is not None for each in nodes), "end of the nodes by themselves")
    terminals.open("\n".join(starting))
    wait(is_up(terminals, 1), "second head")
    joined(terminals, node, 2)
    shown = terminals.run(go_on)

    assert record["tracking_run_id"] in shown
    assert json.loads((run / "bundle" / "mm.json").read_text())["run_id"] == record["tracking_run_id"]
    assert "t2i_r1" in shown
    assert attempt(run) >= 4
    each_sample_once(terminals.folder, record["config"]["steps"] * record["config"]["global_batch_size"])


def each_sample_once(folder: Path, consumed: int) -> None:
    """As the page's query shows it, and the index knows how many there are."""
    samples = Index.open(str(folder / "index")).summary.samples
    rows = duckdb.sql(QUERY.replace("audit/", f"{folder}/audit/")).fetchall()
    whole, rest = divmod(consumed, samples)
    assert rows == [(epoch, count, count) for epoch, count in enumerate([*[samples] * whole, rest])]


def joined(terminals: Terminals, node: str, count: int) -> subprocess.Popen[bytes]:
    """A terminal with one more node, as the `count`th."""
    terminal = terminals.open(node)
    wait(is_up(terminals, count), f"cluster of {count} nodes")
    return terminal


def attempt(run: Path) -> int:
    return int((run / "attempt").read_text())


def newest(run: Path) -> Path:
    """State of the newest whole checkpoint."""
    return max(run.glob("checkpoint_*/state.json"), default=run / "none")


def on_two_ranks(run: Path) -> bool:
    return (newest(run).parent / "__1_0.distcp").exists()
