"""All checks of an environment, in the order a person would go through them: the machine first, then what it talks to."""

from __future__ import annotations

from cluster import machine, services
from cluster.check import Check, State

__all__ = ["Check", "State", "checks"]


def checks() -> list[Check]:
    """Every check, run now. None changes anything; the slowest wait three seconds for a host that does not answer."""
    return [
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
