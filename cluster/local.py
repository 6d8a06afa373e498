"""`make cluster-up`, `make cluster-down`: a head and more nodes of this machine, as a cluster of several machines in small.

The nodes (`cluster.nodes`) stay when the command ends; a file in mm's cache remembers them. `up` again starts what is missing.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import psutil

from cluster.nodes import LocalCluster, Node, Room
from mm_core.cache import cache_folder
from mm_core.errors import ConfigError, MMError


def up(file: Path, nodes: int, cpus: int) -> LocalCluster:
    """A head and `nodes` more nodes of `cpus` CPUs, of which those are started that are not there. `file` remembers them.

    Raises:
        ServiceError: one does not come up; the others stay.
    """
    cluster = remembered(file)
    if cluster is None or not cluster.nodes[0].is_up:
        if cluster is not None:
            cluster.stop()
        cluster = LocalCluster.new()
    for lost in [node for node in cluster.nodes if not node.is_up]:
        cluster = cluster.lose(lost)
    room = _share(nodes + 1, cpus)
    while len(cluster.nodes) < nodes + 1:
        cluster = cluster.add(room)
        _remember(file, cluster)
        cluster.wait()  # of two that started at once one has been seen to give up
    return cluster


def is_whole(file: Path, nodes: int) -> bool:
    """Whether `up` would start nothing."""
    cluster = remembered(file)
    return cluster is not None and sum(node.is_up for node in cluster.nodes) > nodes and cluster.nodes[0].is_up


def down(file: Path) -> bool:
    """End the cluster that `file` remembers, and nothing else. False: there is none."""
    cluster = remembered(file)
    if cluster is None:
        return False
    cluster.stop()
    file.unlink()
    return True


def remembered(file: Path) -> LocalCluster | None:
    """
    Raises:
        ConfigError: the file is not one of a cluster.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        return LocalCluster(**found | {"nodes": tuple(Node(**node) for node in found["nodes"])})
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"{file} does not describe a cluster ({error}): end its processes by hand and remove the file") from None


def _remember(file: Path, cluster: LocalCluster) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    written = file.with_suffix(".new")
    written.write_text(json.dumps(asdict(cluster)), encoding="utf-8")
    written.replace(file)


def _share(nodes: int, cpus: int) -> Room:
    """Of this machine's free memory half, divided evenly."""
    each = psutil.virtual_memory().available // 2 // nodes
    return Room(cpus, memory=each * 2 // 3, object_store=min(each // 3, 2 << 30))


def described(cluster: LocalCluster) -> str:
    """How to use it and how to stop it."""
    variables = " ".join(f"{name}={shlex.quote(value)}" for name, value in cluster.variables.items())
    return f"""\
{", ".join(node.name for node in cluster.nodes)} at {cluster.address}
  in each terminal    export {variables}
  look                mm doctor --address {cluster.address}
  submit              mm submit -- train clip-tiny --data index --name first --workers {len(cluster.nodes) - 1}
  without submitting  export RAY_ADDRESS={cluster.gcs_address}
  a node is lost      kill -9 {cluster.nodes[-1].pid}; `up` again brings one back
  logs                {cluster.folder}
  stop                make cluster-down"""


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m cluster.local", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("down", help="end it")
    starting = commands.add_parser("up", help="start it, or what is missing of it")
    starting.add_argument("--nodes", type=int, default=2, help="beside the head")
    starting.add_argument("--cpus", type=int, default=2, help="of each node, as Ray counts them")
    options = parser.parse_args(arguments)
    file = cache_folder() / "cluster.json"
    try:
        if options.command == "down":
            print("the cluster is down" if down(file) else "no cluster is up that `make cluster-up` started")
            return 0
        there = is_whole(file, options.nodes)
        cluster = up(file, options.nodes, options.cpus)
        print(("up already: " if there else "") + described(cluster))
    except MMError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
