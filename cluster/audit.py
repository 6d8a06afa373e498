"""`make audit`: whether the pinned packages have published flaws (pip-audit), and whether any is below a version known to be unsafe.

pip-audit itself calls packages that its database does not know "no known vulnerabilities": where the database is out of reach, that
is all of them. Here what was not looked up is said, and is no pass.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.version import Version

from cluster.machine import FLOORS

_CONSTRAINTS = Path(__file__).parents[1] / "constraints.txt"
_TIMEOUT_S = 600


def below_floors(pinned: Mapping[str, str]) -> Iterator[str]:
    """Of the packages with a floor, those that are below it or not pinned."""
    for name, floor in FLOORS.items():
        if name not in pinned:
            yield f"{name} is not pinned, and must be at least {floor}"
        elif Version(pinned[name]) < Version(floor):
            yield f"{name} {pinned[name]} is below {floor}, before which it has published remote code execution flaws: raise it"


def read_pinned(file: Path) -> dict[str, str]:
    """Package → version of a file of exact versions."""
    lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    found = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {each.name: next(iter(each.specifier)).version for each in found}


def flaws(report: Mapping[str, Any]) -> tuple[list[str], int, list[str]]:
    """Of pip-audit's report: a line for each flaw, how many packages were looked up, and the names of those that were not."""
    packages = report["dependencies"]
    looked_up = [each for each in packages if "skip_reason" not in each]
    found = [
        f"{each['name']} {each['version']}: {flaw['id']}" + (f", mended in {flaw['fix_versions'][-1]}" if flaw["fix_versions"] else "")
        for each in looked_up
        for flaw in each["vulns"]
    ]
    return found, len(looked_up), [each["name"] for each in packages if "skip_reason" in each]


def _ask(file: Path, more: Sequence[str]) -> dict[str, Any] | str:
    """pip-audit's report of a file of exact versions, or why there is none."""
    command = [sys.executable, "-m", "pip_audit", "--requirement", str(file), "--no-deps", "--disable-pip"]
    options = ["--format", "json", "--progress-spinner", "off", *more]
    try:
        done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=_TIMEOUT_S)
        report: dict[str, Any] = json.loads(done.stdout)
    except subprocess.TimeoutExpired:
        return f"no answer in {_TIMEOUT_S} s"
    except ValueError:
        return (done.stderr.strip().splitlines() or ["no answer"])[-1][:200]
    return report


def audit(file: Path, more: Sequence[str] = ()) -> tuple[list[str], bool]:
    """What to say, and whether all is well. `more`: of pip-audit's options."""
    said = list(below_floors(read_pinned(file)))
    well = not said
    said = said or [f"floors: {', '.join(f'{name} {floor}' for name, floor in FLOORS.items())} are kept"]
    report = _ask(file, more)
    if isinstance(report, str):
        return [
            *said,
            f"NOT AUDITED: the database of published flaws is out of reach here ({report}); run it where there is a network",
        ], False
    found, looked_up, passed_over = flaws(report)
    said += found
    if looked_up == 0:
        said.append("NOT AUDITED: the index here has no database of published flaws; run it where https://pypi.org is reached")
    else:
        said.append(f"{looked_up} of {looked_up + len(passed_over)} packages were looked up, {len(found)} flaws")
        said += [f"NOT AUDITED: {', '.join(passed_over)}: not in the index here"] if passed_over else []
    return said, well and not found and looked_up > 0 and not passed_over


def main() -> int:
    said, well = audit(_CONSTRAINTS)
    print("\n".join(said))
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
