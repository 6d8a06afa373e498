"""All checks of an environment, in the order a person would go through them: a cluster if one is named, this machine,
then what it talks to."""

from __future__ import annotations

from cluster import machine, services, target
from cluster.check import Check, State, fail
from cluster.head import connect
from cluster.needs import Needs
from mm_core.errors import ServiceError

__all__ = ["Check", "State", "checks"]


def checks(needs: Needs, address: str | None = None) -> list[Check]:
    """Every check, run now; with the address of a head's job service, of that cluster too. None changes anything; the slowest wait
    three seconds for a host that does not answer.

    Args:
        needs: of a command that is to run, or as configured.

    Raises:
        ConfigError: `address` is not that of a job service.
    """
    return [
        *(_cluster(address) if address else ()),
        machine.python(),
        *machine.packages(),
        machine.cpus(),
        machine.memory(),
        machine.shared_memory(),
        *machine.disks(),
        machine.gpus(),
        *services.ports(),
        services.ray_authentication(),
        services.ray_head(),
        *services.needed(needs),
        services.hugging_face(),
    ]


def _cluster(address: str) -> list[Check]:
    try:
        return target.checks(connect(address))
    except ServiceError as error:
        reason, _, remedy = str(error).partition(": ")  # what to do stands behind the colon
        return [fail("the cluster", reason, remedy)]
