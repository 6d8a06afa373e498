"""Checks of a cluster from inside: each of its nodes looks at itself, in a task there."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from cluster import machine, services
from cluster.check import Check, State, fail, ok, warn
from cluster.machine import SHOWN
from cluster.needs import Needs

_WAIT_S = 120.0
"""For a node's answer. The first task of a job there may have to install packages or to fetch an image, which goes on meanwhile."""
_LIKE_RUNS = {"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
"""Ray hides the GPUs from a task that books none."""
_OUT = "take the node out of the cluster"


def checks(needs: Needs) -> list[Check]:
    """What the live nodes of the cluster that `RAY_ADDRESS` names say of themselves: what is amiss, with the nodes where it is, and the
    versions that are not the same on all. A node that is lost or silent meanwhile is a warning, as runs go on without one."""
    import logging

    import ray

    address = os.environ.get("RAY_ADDRESS", "")
    if address in ("", "local"):
        return [fail("the nodes", "RAY_ADDRESS names no cluster", "set it to the head's: RAY_ADDRESS=HOST:6379, or leave out --nodes")]
    if services.ray_head().state is State.FAIL:  # Ray itself tries for minutes
        return [fail("the nodes", "were not asked: the head does not answer", "see `Ray head`: RAY_ADDRESS")]
    like_runs = {name: value for name, value in _LIKE_RUNS.items() if name not in os.environ}
    try:
        ray.init(address=address, runtime_env={"env_vars": like_runs}, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:  # whose text may have what --env passed on
        remedy = "see `Ray authentication`; RAY_ADDRESS is HOST:6379 of a head that runs"
        return [fail("the nodes", f"were not asked: Ray does not let this command join ({type(error).__name__})", remedy)]
    try:
        return summary(_ask_all(needs))
    finally:
        ray.shutdown()


def summary(answers: Mapping[str, Sequence[Check]]) -> list[Check]:
    """One check for what is amiss in the same words on several nodes.

    Args:
        answers: node → what it found.
    """
    nodes_of, versions = defaultdict[Check, list[str]](list), defaultdict[str, dict[str, list[str]]](lambda: defaultdict(list))
    for node, found in answers.items():
        for check in found:
            if check.state is not State.OK:
                nodes_of[check].append(node)
            elif check.name in SHOWN:
                versions[check.name][check.evidence.partition("+")[0]].append(node)
    bad = []
    for check, nodes in nodes_of.items():
        where = f"all {len(nodes)} nodes" if len(nodes) == len(answers) > 1 else ", ".join(nodes)
        bad.append(replace(check, name=f"{check.name} of {where}"))
    for package, nodes_by in versions.items():
        if len(nodes_by) > 1:
            evidence = "; ".join(f"{version} on {', '.join(nodes)}" for version, nodes in nodes_by.items())
            bad.append(warn(f"{package} of the nodes", evidence, "install one version everywhere: ranks of one run work together"))
    return bad or [ok("the nodes", f"each of {len(answers)} has looked at itself: nothing is amiss")]


def _ask_all(needs: Needs) -> dict[str, list[Check]]:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    task = ray.remote(num_cpus=0, max_retries=0)(_of_this_node)
    asked: dict[Any, str] = {}
    for node in ray.nodes():
        if node["Alive"]:
            there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            answer = task.options(scheduling_strategy=there).remote(node["Resources"].get("GPU", 0), needs)
            asked[answer] = f"{node['NodeName']} ({node['NodeID'][:8]})"
    ray.wait(list(asked), num_returns=len(asked), timeout=_WAIT_S)
    return {name: _read(answer) for answer, name in asked.items()}


def _read(answer: Any) -> list[Check]:
    import ray

    try:
        found: list[Check] = ray.get(answer, timeout=0)
    except ray.exceptions.GetTimeoutError:
        return [warn("the answer", f"none in {_WAIT_S:g} s", f"wait, look at its logs (`ray logs cluster`), or {_OUT}")]
    except ray.exceptions.RayTaskError as error:
        return [fail("the look", f"failed: {_last_line(error)}", f"install there what mm needs, or {_OUT}")]
    except ray.exceptions.RuntimeEnvSetupError as error:
        return [fail("the job's environment", f"not made: {_last_line(error)}", f"look at its logs (`ray logs cluster`), or {_OUT}")]
    except ray.exceptions.RayError as error:
        return [warn("the node", f"lost while it was asked ({type(error).__name__})", "none, if it was a spot node; else look at its logs")]
    return found


def _last_line(error: Exception) -> str:
    return ([line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__])[-1]


def _of_this_node(gpus: float, needs: Needs) -> list[Check]:
    found = [machine.python(), *machine.packages(), machine.memory(), *machine.disks()]
    if needs.gpus:
        found.append(machine.gpus(of_ray=gpus))
    return [*found, *services.needed(needs)]
