"""Metrics, dashboards, alerts and their guide speak of the same names."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml

from cluster import validate
from pipelines import exported
from serve.measured import Measured

ROOT = Path(__file__).parents[1]
MONITORING = ROOT / "cluster" / "monitoring"
GUIDE = (ROOT / "docs" / "observability.md").read_text(encoding="utf-8")
DASHBOARDS = {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in sorted((MONITORING / "dashboards").glob("*.json"))}
ALERTS = [rule for group in yaml.safe_load((MONITORING / "alerts.yaml").read_text())["groups"] for rule in group["rules"]]
OTHERS_LABELS = {"instance", "Location", "le", "gateway", "job"}
"""Of Ray, of the histograms, of each gateway, of Prometheus."""


def served() -> dict[str, tuple[str, tuple[str, ...], str]]:
    """Kind, labels and meaning of what a gateway exports, by name."""
    registry = Measured("1")._registry
    found = {}
    for metric in registry._collector_to_names:
        kind, name = metric._type, metric._name  # type: ignore[attr-defined]
        labels, meaning = tuple(metric._labelnames), metric._documentation  # type: ignore[attr-defined]
        found[name + ("_total" if kind == "counter" else "")] = (kind, labels, meaning)
    return found


EXPORTED = {each.name: (str(each.kind), each.labels, each.meaning) for each in (*exported.TRAIN, *exported.DATA)} | served()


def rays_own() -> set[str]:
    """What Ray's own dashboards ask for."""
    import ray.dashboard.modules.metrics.dashboards as package

    sources = [file.read_text() for file in Path(package.__path__[0]).glob("*_panels.py")]
    return {name for source in sources for name in re.findall(r"ray_(?:node|object_store)_?[a-z_]+", source)}


def selectors(expression: str) -> list[promql_parser.VectorSelector]:
    seen: list[Any] = []
    promql_parser.walk(promql_parser.parse(expression), seen.append)
    return [node for node in seen if isinstance(node, promql_parser.VectorSelector)]


def expressions() -> Iterator[tuple[str, str]]:
    """Every expression, with where it stands; Grafana's variables are given a value."""
    for name, dashboard in DASHBOARDS.items():
        for panel in dashboard["panels"]:
            for target in panel["targets"]:
                yield f"{name}: {panel['title']}", target["expr"].replace("$run", ".*")
    for rule in ALERTS:
        yield rule["alert"], rule["expr"]


EXPRESSIONS = [pytest.param(expression, id=where) for where, expression in expressions()]


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_every_metric_that_is_asked_for_is_exported(expression: str) -> None:
    found = selectors(expression)
    assert found
    for selector in found:
        name = selector.name
        base = re.sub(r"_bucket$", "", name)
        assert base in EXPORTED or name in rays_own() | {"up"}, f"nobody exports {name}"
        if base in EXPORTED:
            kind, labels, _ = EXPORTED[base]
            assert (kind == "histogram") == name.endswith("_bucket")
            assert {matcher.name for matcher in selector.matchers.matchers} <= set(labels)


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_sums_are_over_labels_that_there_are(expression: str) -> None:
    names = [re.sub(r"_bucket$", "", selector.name) for selector in selectors(expression)]
    labels = {label for name in names if name in EXPORTED for label in EXPORTED[name][1]} | OTHERS_LABELS
    for grouped in re.findall(r"\bby \(([^)]*)\)", expression):
        assert {label.strip() for label in grouped.split(",")} <= labels


def test_counters_are_read_as_rates() -> None:
    for where, expression in expressions():
        for name in re.findall(r"\b\w+_total\b", expression):
            assert re.search(rf"(rate|increase)\({name}", expression), where


def test_the_guide_lists_exactly_what_is_exported() -> None:
    rows = re.findall(r"^\| `((?:ray_)?mm_\w+)` \| (\w+) \| ([^|]*) \| ([^|]*) \|$", GUIDE, re.MULTILINE)
    listed = {name: (kind, tuple(re.findall(r"`(\w+)`", labels)), meaning.strip()) for name, kind, labels, meaning in rows}
    assert listed == EXPORTED


def test_the_guide_lists_every_alert_and_each_has_a_remedy() -> None:
    assert re.findall(r"^\| `([A-Z]\w+)` \|", GUIDE, re.MULTILINE) == [rule["alert"] for rule in ALERTS]
    assert all(rule["annotations"].keys() == {"summary", "remedy"} for rule in ALERTS)


@pytest.mark.parametrize("dashboard", DASHBOARDS.values(), ids=DASHBOARDS)
def test_a_dashboard_is_whole(dashboard: Mapping[str, Any]) -> None:
    panels = dashboard["panels"]
    variables = {variable["name"] for variable in dashboard["templating"]["list"]}
    assert len({panel["id"] for panel in panels}) == len({panel["title"] for panel in panels}) == len(panels)
    assert set(re.findall(r"\$\{?(\w+)", json.dumps([panel["targets"] for panel in panels]))) | {"datasource"} == variables
    places = [(x, y) for p in panels for x in range(p["gridPos"]["x"], p["gridPos"]["x"] + p["gridPos"]["w"]) for y in (p["gridPos"]["y"],)]
    assert len(set(places)) == len(places)
    assert max(x for x, _ in places) < 24


def test_a_runs_metrics_are_followed_by_name() -> None:
    """What the gauges follow is what the training loop logs: a name that is nobody's would stay empty for ever."""
    sources = [(ROOT / "pipelines" / "train" / f"{name}.py").read_text() for name in ("meter", "remedies", "run_checkpoints")]
    for each in exported.FOLLOWED:
        assert any(each.of in source for source in sources), each.of


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("scrape_configs: [{job_name: a}]", "a: finds nothing"),
        ("scrape_configs: [{static_configs: []}]", "without a job_name"),
        ("{scrape_configs: [], rules: []}", "no field 'rules'"),
    ],
)
def test_a_bad_configuration_of_prometheus_is_told(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "p.yaml").write_text(text)
    assert any(said in problem for problem in validate.problems(tmp_path / "p.yaml"))


def test_alerts_are_raised_when_they_should_be() -> None:
    if (promtool := shutil.which("promtool")) is None:
        pytest.skip("no promtool here: it comes with Prometheus, or by .ci/debian-packages")
    done = subprocess.run([promtool, "test", "rules", "tests/cluster/alerts.test.yaml"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
