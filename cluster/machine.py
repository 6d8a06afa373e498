"""Checks of this machine: Python, packages, processors, memory, disk, GPUs. Nothing here opens the network."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import tomllib
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from cluster.check import Check, fail, ok, warn

FLOORS = {"ray": "2.56.1", "mlflow": "3.11", "torch": "2.6"}
"""Older versions have published remote code execution flaws, whatever a project file allows."""
_PYTHON_FLOOR = (3, 11)
SHOWN = ("ray", "mlflow", "torch", "transformers")
_GB = 1e9
_MEMORY_LOW_GB = 4.0
_DISK_LOW_GB = 10.0
_DISK_EMPTY_GB = 1.0
_RAY_DISK_FULL = 0.95
"""Ray stops writing to a disk that is fuller (`local_fs_capacity_threshold`)."""
_OBJECT_STORE_SHARE = 0.3
"""Share of the memory that Ray takes for its object store, in shared memory."""


def python() -> Check:
    found = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info < _PYTHON_FLOOR:
        return fail("Python", found, "install Python 3.11 or newer and run `make setup PYTHON=python3.12`")
    return ok("Python", f"{found} at {sys.executable}")


def packages() -> list[Check]:
    """The packages that matter most, one by one, then all others that mm needs."""
    ranges = required()
    found = [_package(name, ranges.get(name, "")) for name in SHOWN]
    problems = [_package(name, wanted) for name, wanted in ranges.items() if name not in SHOWN]
    bad = [check for check in problems if check.state != "ok"]
    return [*found, *(bad or [ok("other packages", f"{len(problems)} within their ranges")])]


def cpus() -> Check:
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if count < 2:
        return warn("CPUs", str(count), "two ranks and the data pipeline share one processor: use --workers 1")
    return ok("CPUs", str(count))


def memory() -> Check:
    import psutil

    machine = psutil.virtual_memory()
    total, free = _memory_limit(machine.total) / _GB, machine.available / _GB
    evidence = f"{min(free, total):.1f} GB of {total:.1f} GB free"
    if min(free, total) < _MEMORY_LOW_GB:
        return warn("memory", evidence, f"Ray stops tasks when memory runs out; end other programs or keep {_MEMORY_LOW_GB:g} GB free")
    return ok("memory", evidence)


def shared_memory(folder: Path = Path("/dev/shm")) -> Check:
    if not folder.is_dir():
        return ok("shared memory", f"no {folder} on this system: Ray keeps objects in files")
    import psutil

    free, wanted = shutil.disk_usage(folder).free / _GB, _OBJECT_STORE_SHARE * _memory_limit(psutil.virtual_memory().total) / _GB
    evidence = f"{free:.1f} GB free in {folder}"
    if free < wanted:
        return warn("shared memory", evidence, f"Ray wants {wanted:.1f} GB, else it uses slow files; in Docker: --shm-size={wanted:.0f}g")
    return ok("shared memory", evidence)


def disk(name: str, folder: Path) -> Check:
    usage = shutil.disk_usage(folder)
    free, full = usage.free / _GB, usage.used / (usage.used + usage.free)
    evidence = f"{free:.1f} GB free at {folder}"
    if free < _DISK_EMPTY_GB or not os.access(folder, os.W_OK):
        return fail(name, evidence if free < _DISK_EMPTY_GB else f"{folder} is not writable", "free space, or work in another folder")
    if free < _DISK_LOW_GB or full > _RAY_DISK_FULL:
        return warn(name, f"{evidence}, {full:.0%} full", f"keep {_DISK_LOW_GB:g} GB free; Ray stops spilling above {_RAY_DISK_FULL:.0%}")
    return ok(name, evidence)


def disks() -> list[Check]:
    """The working folder's disk and, if it is another, the one of Ray's session files."""
    here, temporary = Path.cwd(), Path(os.environ.get("RAY_TMPDIR", tempfile.gettempdir()))
    found = [disk("disk", here)]
    if temporary.is_dir() and temporary.stat().st_dev != here.stat().st_dev:
        found.append(disk("temporary disk", temporary))
    return found


def gpus(*, of_ray: float = 0) -> Check:
    """
    Args:
        of_ray: how many a Ray node has to give here: then torch must see some.
    """
    import torch

    if torch.cuda.is_available():
        devices = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
        shown = ", ".join(f"{device.name} ({device.total_memory / _GB:.0f} GB)" for device in devices)
        return ok("GPUs", f"{shown}; CUDA {torch.version.cuda}")
    remedy = "install torch with CUDA that the driver supports: see https://pytorch.org/get-started/locally"
    if of_ray:
        return fail("GPUs", f"Ray gives {of_ray:g} away, but torch {torch.__version__} sees none", remedy)
    if Path("/proc/driver/nvidia").exists() or shutil.which("nvidia-smi"):
        return warn("GPUs", f"a driver is there, but torch {torch.__version__} sees no GPU", remedy)
    return ok("GPUs", "none: training runs on the CPU")


def required() -> dict[str, str]:
    """Package → version range that mm needs: of pyproject.toml beside the code, else of the installed mm-pretrain."""
    from packaging.requirements import Requirement

    project = Path(__file__).parents[1] / "pyproject.toml"
    if project.is_file():
        lines = tomllib.loads(project.read_text(encoding="utf-8"))["project"]["dependencies"]
    else:
        lines = requires("mm-pretrain") or []
    parsed = [Requirement(line) for line in lines]
    return {each.name: str(each.specifier) for each in parsed if each.marker is None or each.marker.evaluate({"extra": ""})}


def _package(name: str, wanted: str) -> Check:
    from packaging.specifiers import SpecifierSet

    if name in FLOORS:
        wanted = ",".join(filter(None, (f">={FLOORS[name]}", wanted)))
    try:
        found = version(name)
    except PackageNotFoundError:
        return fail(name, "is not installed", "run `make setup`")
    if not SpecifierSet(wanted).contains(found, prereleases=True):
        return fail(name, f"{found} is outside {wanted}", "run `make setup`, or install a version in that range")
    return ok(name, found)


def _memory_limit(total: int) -> int:
    """Bytes this process may use: the machine's, or the container's if that is less."""
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii").strip()
    except OSError:
        return total
    return min(total, int(limit)) if limit.isdigit() else total
