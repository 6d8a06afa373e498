"""All checks of an environment, in the order a person would go through them: a cluster if one is named, this machine,
then what it talks to."""

from __future__ import annotations

from cluster import machine, services, target
from cluster.check import Check, State
from cluster.head import connect

__all__ = ["Check", "State", "checks"]


def checks(address: str | None = None) -> list[Check]:
    """Every check, run now; with the address of a head's job service, of that cluster too. None changes anything; the slowest wait
    three seconds for a host that does not answer.

    Raises:
        ServiceError, ConfigError: the head at `address` does not answer, or refuses.
    """
    return [
        *(target.checks(connect(address)) if address else ()),
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
        services.tracking(),
        *services.object_storage(),
        services.hugging_face(),
    ]
