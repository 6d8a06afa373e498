"""Checks of a cluster before anything is submitted to it, from outside: its Ray, its door, what it has."""

from __future__ import annotations

from typing import Any

from cluster.check import Check, State, fail, ok, warn
from cluster.head import PROBE_TIMEOUT_S, Head, is_this_machine
from cluster.machine import FLOORS
from mm_core.errors import ServiceError


def checks(head: Head, *, elsewhere: bool = False) -> list[Check]:
    return [version(head), door(head, elsewhere=elsewhere), *resources(head)]


def version(head: Head) -> Check:
    """The cluster's Ray beside its floor and beside ours: drivers and workers of different versions do not talk."""
    import ray
    from packaging.version import Version

    name, theirs = "the cluster's Ray", head.ray_version()
    if Version(theirs) < Version(FLOORS["ray"]):
        return fail(name, theirs, f"start the cluster with Ray {FLOORS['ray']} or newer: before it there are remote code execution flaws")
    if theirs != ray.__version__:
        return warn(name, f"{theirs}, here {ray.__version__}", "install the same version here, or name the cluster's image after yours")
    return ok(name, theirs)


def door(head: Head, *, elsewhere: bool = False) -> Check:
    """Whether somebody without a token is let in.

    Args:
        elsewhere: the head is on another machine, whatever its address says, as behind a tunnel; or others are in the cluster.
    """
    import requests

    name = "the cluster's door"
    try:
        status = requests.get(f"{head.address}/api/jobs/", timeout=PROBE_TIMEOUT_S, allow_redirects=False).status_code
    except requests.RequestException as error:
        return warn(name, f"not looked at ({type(error).__name__})", "look at `mm doctor --address` again")
    if status in (401, 403):
        return ok(name, "asks for a token")
    remedy = "start its head with RAY_AUTH_MODE=token, and give the token to who may submit"
    if is_this_machine(head.address) and not elsewhere:
        return warn(name, "open: whoever reaches it runs code there", remedy)
    return fail(name, "open: whoever reaches it runs code there, and reads what is passed on with --env", remedy)


def resources(head: Head) -> list[Check]:
    """The nodes that are there now; more may come where an autoscaler makes them."""
    nodes = [node for node in head.nodes() if node["state"] == "ALIVE"]
    total = {name: sum(_of(node, name) for node in nodes) for name in ("CPU", "GPU", "memory")}
    evidence = f"{len(nodes)} nodes, {total['CPU']:g} CPUs, {total['GPU']:g} GPUs, {total['memory'] / 1e9:.0f} GB"
    if not total["CPU"]:
        return [warn("the cluster's nodes", evidence, "no node has a CPU now: the job waits until the autoscaler or you add workers")]
    return [ok("the cluster's nodes", evidence)]


def _of(node: dict[str, Any], resource: str) -> float:
    return float((node.get("resources_total") or {}).get(resource, 0))


def refuse(found: list[Check], address: str) -> None:
    """
    Raises:
        ServiceError: a check failed; the remedy is in it.
    """
    failed = [check for check in found if check.state is State.FAIL]
    if failed:
        told = "; ".join(f"{check.name}: {check.evidence}: {check.remedy}" for check in failed)
        raise ServiceError(f"nothing was submitted to {address}: {told} (or --skip-checks, if you know better)")
