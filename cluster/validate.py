"""Whether cluster descriptions are what their readers take: `python -m cluster.validate [FILE…]`, by default those of this folder.

Kubernetes' objects are held against Kubernetes' own schemas (package kubernetes-validate), KubeRay's against schemas/ray.io-v1.json,
compose files against compose-spec's (package check-jsonschema), Dockerfiles against hadolint, and Prometheus' rules against its
parser of expressions. Nothing here opens the network. The packages come with `pip install mm-pretrain[dev]`.
"""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from jsonschema import Draft202012Validator, ValidationError
from referencing import Registry, Resource

from mm_core.config import nearest

KUBERNETES = "1.34"
_FOLDER = Path(__file__).parent
_KUBERNETES_DEFINITIONS = "https://kubernetes.io/api/_definitions.json"
_PATTERNS = ("kubernetes/*.yaml", "compose/*.yaml", "monitoring/*.yaml", "images/*.Dockerfile")


def own_files() -> list[Path]:
    """The descriptions that mm ships."""
    return sorted(path for pattern in _PATTERNS for path in _FOLDER.glob(pattern))


def problems(file: Path) -> list[str]:
    """What is wrong with a description, a line each that names the place in it; nothing if it is good."""
    if file.suffix == ".Dockerfile" or file.name == "Dockerfile":
        return list(_dockerfile(file))
    try:
        documents = [document for document in yaml.safe_load_all(file.read_text(encoding="utf-8")) if document is not None]
    except OSError as error:
        return [f"cannot be read: {error.strerror}"]
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        return [f"is no YAML: {' '.join(str(error).split())}"]
    if not documents:
        return ["is empty"]
    return [problem for document in documents for problem in _document(document)]


def _document(document: Any) -> Iterator[str]:
    match document:
        case {"apiVersion": str(version), "kind": str(kind)}:
            name = document.get("metadata", {}).get("name", "without a name") if isinstance(document.get("metadata"), Mapping) else "?"
            for problem in _kubernetes(version, kind, document):
                yield f"{kind} {name}: {problem}"
        case {"services": _}:
            yield from _against(_compose_schema(), document, Registry())
        case {"groups": _}:
            yield from _prometheus_rules(document)
        case {"scrape_configs": _}:
            yield from _prometheus(document)
        case _:
            yield (
                "is neither a Kubernetes object (apiVersion, kind), nor a compose file (services),"
                " nor Prometheus' rules (groups) or configuration (scrape_configs)"
            )


def _kubernetes(version: str, kind: str, document: Mapping[str, Any]) -> Iterator[str]:
    registry = _kubernetes_registry()
    if version.startswith("ray.io/"):
        schema = json.loads((_FOLDER / "schemas" / "ray.io-v1.json").read_text(encoding="utf-8"))
        if version != "ray.io/v1" or kind not in schema["$defs"]:
            yield f"ray.io/v1 has RayCluster, RayJob and RayService, no {version} {kind}"
            return
        yield from _against(schema | {"$ref": f"#/$defs/{kind}"}, document, registry)
        return
    group = version.split("/")[0].split(".")[0] + "-" + version.split("/")[1] if "/" in version else version
    file = _kubernetes_folder() / f"{kind.lower()}-{group}.json"
    if not file.is_file():
        yield f"Kubernetes {KUBERNETES} has no {version} {kind}"
        return
    yield from _against(json.loads(file.read_text(encoding="utf-8")), document, registry)


def _against(schema: Mapping[str, Any], document: Any, registry: Registry[Any]) -> Iterator[str]:
    errors = [_deepest(error) for error in Draft202012Validator(schema, registry=registry).iter_errors(document)]
    places = [tuple(error.absolute_path) for error in errors]
    for error in sorted(errors, key=lambda error: list(map(str, error.absolute_path))):
        here = tuple(error.absolute_path)
        # A field that is wrong inside makes all of its neighbours count as unknown.
        if error.validator == "unevaluatedProperties" and any(len(place) > len(here) and place[: len(here)] == here for place in places):
            continue
        yield _line(error)


def _deepest(error: ValidationError) -> ValidationError:
    """Of alternatives that all fail, the one that went furthest says what was meant."""
    while error.context:
        error = max(error.context, key=lambda each: len(each.absolute_path))
    return error


def _line(error: ValidationError) -> str:
    where = ".".join(map(str, error.absolute_path)) or "top level"
    known = error.schema.get("properties") if isinstance(error.schema, Mapping) else None
    if error.validator == "additionalProperties" and known and isinstance(error.instance, Mapping):
        strange = [key for key in error.instance if key not in known]
        return f"{where}: " + "; ".join(f"no field {key!r}{nearest(key, list(known))}" for key in strange)
    shown = error.message if len(error.message) < 200 else f"{error.message[:150]} … {error.message[-40:]}"
    return f"{where}: {shown}"


def _dockerfile(file: Path) -> Iterator[str]:
    hadolint = Path(sysconfig.get_path("scripts")) / "hadolint"
    done = subprocess.run([str(hadolint), "--format", "json", "--no-color", str(file)], capture_output=True, text=True)
    if not done.stdout.startswith("["):
        yield (done.stderr or done.stdout).strip()
        return
    for found in json.loads(done.stdout):
        yield f"line {found['line']}: {found['code']} {found['message']}"


def _prometheus_rules(document: Mapping[str, Any]) -> Iterator[str]:
    import promql_parser

    for group in document["groups"]:
        for rule in group.get("rules", ()):
            name = rule.get("alert") or rule.get("record") or "a rule without a name"
            if unknown := rule.keys() - {"alert", "record", "expr", "for", "keep_firing_for", "labels", "annotations"}:
                yield f"{name}: no field {', '.join(sorted(unknown))}"
            try:
                promql_parser.parse(str(rule.get("expr", "")))
            except ValueError as error:
                yield f"{name}: expr: {error}"
            for field in ("for", "keep_firing_for"):
                try:
                    promql_parser.parse_duration(rule.get(field, "1s"))
                except (ValueError, TypeError):
                    yield f"{name}: {field}: {rule[field]!r} is no duration such as 10m"


def _prometheus(document: Mapping[str, Any]) -> Iterator[str]:
    known = ("global", "rule_files", "scrape_configs", "alerting", "remote_write", "remote_read", "storage", "tracing")
    for key in document.keys() - set(known):
        yield f"no field {key!r}{nearest(key, known)}"
    for job in document["scrape_configs"]:
        if "job_name" not in job:
            yield "a scrape_config without a job_name"
        if not any(key.endswith("_sd_configs") or key == "static_configs" for key in job):
            yield f"{job.get('job_name', '?')}: finds nothing: give static_configs, or one of the …_sd_configs"


@cache
def _compose_schema() -> dict[str, Any]:
    file = resources.files("check_jsonschema") / "builtin_schemas" / "vendor" / "compose-spec.json"
    schema: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return schema


def _kubernetes_folder() -> Path:
    with resources.as_file(resources.files("kubernetes_validate")) as package:
        return package / "kubernetes-json-schema" / f"v{KUBERNETES}.0-local-strict"


@cache
def _kubernetes_registry() -> Registry[Any]:
    definitions = json.loads((_kubernetes_folder() / "_definitions.json").read_text(encoding="utf-8"))
    return Registry().with_resource(_KUBERNETES_DEFINITIONS, Resource.from_contents(definitions))


def main(arguments: Sequence[str]) -> int:
    files = [Path(argument) for argument in arguments] or own_files()
    found = [f"{file}: {problem}" for file in files for problem in problems(file)]
    print("\n".join(found) if found else f"{len(files)} descriptions are good")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
