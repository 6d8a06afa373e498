"""The descriptions in cluster/: what their readers take, what a bad one is told, and how they are locked."""

from __future__ import annotations

import ast
import configparser
import json
import os
import re
import shlex
import stat
import subprocess
import sys
import time
import tomllib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import psutil
import pytest
import s3fs
import typer
import yaml

import mm
from cluster import validate
from cluster.machine import FLOORS, required
from cluster.nodes import LocalCluster, Room
from mm_core.config import resolve
from pipelines.recipes import recipe
from serve.config import ServeConfig
from serve.fleet import Wanted
from tests.object_store import ObjectStore

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "cluster"
KUBERNETES = FOLDER / "kubernetes"
COMPOSE = yaml.safe_load((FOLDER / "compose" / "compose.yaml").read_text())
SECRET = re.compile(r"KEY$|TOKEN$|PASSWORD$|SECRET$")
TLS = {"RAY_USE_TLS": "1", "RAY_TLS_SERVER_CERT": "/tls/tls.crt", "RAY_TLS_SERVER_KEY": "/tls/tls.key", "RAY_TLS_CA_CERT": "/tls/ca.crt"}


def objects(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((KUBERNETES / name).read_text()))


def ray_clusters() -> dict[str, dict[str, Any]]:
    """The cluster that each of the three files describes."""
    (cluster,), (job,), (service,) = (objects(name) for name in ("cluster.yaml", "train.yaml", "serve.yaml"))
    return {"cluster": cluster["spec"], "train": job["spec"]["rayClusterSpec"], "serve": service["spec"]["rayClusterConfig"]}


def pods() -> Iterator[tuple[str, dict[str, Any]]]:
    for name, spec in ray_clusters().items():
        yield f"{name}: head", spec["headGroupSpec"]["template"]["spec"]
        for group in spec["workerGroupSpecs"]:
            yield f"{name}: {group['groupName']}", group["template"]["spec"]


PODS = [pytest.param(pod, id=name) for name, pod in pods()]
CLUSTERS = [pytest.param(spec, id=name) for name, spec in ray_clusters().items()]


def takes(command: click.Command, words: list[str]) -> None:
    """Raises: click.UsageError: the program does not take it."""
    while isinstance(command, click.Group):
        command = command.commands[words.pop(0)]
    command.make_context(command.name, words)


@pytest.mark.parametrize("file", validate.own_files(), ids=lambda file: file.name)
def test_what_mm_ships_is_good(file: Path) -> None:
    assert validate.problems(file) == []


BAD = [
    ("kubernetes/cluster.yaml", "mode: token ", "mode: basic ", "RayCluster mm: spec.authOptions.mode: 'basic' is not one of"),
    ("kubernetes/cluster.yaml", "maxReplicas: 8", "maxReplica: 8", "spec.workerGroupSpecs.0: no field 'maxReplica'; did you mean"),
    ("kubernetes/train.yaml", "runAsNonRoot: true", "runAsNonRoot: maybe", "runAsNonRoot: 'maybe' is not of type 'boolean'"),
    ("kubernetes/train.yaml", "kind: RayJob", "kind: RayTask", "RayTask clip-vit-b32: ray.io/v1 has RayCluster, RayJob and"),
    ("kubernetes/serve.yaml", "rayClusterConfig:", "rayClusterSpec:", "no field 'rayClusterSpec'; did you mean 'rayClusterConfig'?"),
    ("kubernetes/network.yaml", "podSelector: {}", "podSelecter: {}", "NetworkPolicy deny-all: spec: no field 'podSelecter'; did you"),
    ("kubernetes/network.yaml", "kind: Namespace", "kind: Namespaces", "Kubernetes 1.34 has no v1 Namespaces"),
    ("kubernetes/network.yaml", "metadata: {name: dns,", "metadata: [name: dns,", "is no YAML: "),
    ("compose/compose.yaml", 'ports: ["127.0.0.1:5000:5000"]', "ports: 5000", "services.mlflow.ports: 5000 is not of type 'array'"),
    ("compose/compose.yaml", "depends_on:", "depend_on:", "('depend_on' was unexpected)"),
    ("images/mm.Dockerfile", "python:3.11-slim-bookworm", "python:latest", "DL3007"),
    ("images/mlflow.Dockerfile", "python:3.11-slim-bookworm", "python", "line 3: DL3006"),
    ("monitoring/alerts.yaml", "expr: ", "expr: (", "unclosed left parenthesis"),
    ("monitoring/alerts.yaml", "for: ", "for: about ", "is no duration such as 10m"),
]  # fmt: skip


@pytest.mark.parametrize(("file", "good", "bad", "said"), BAD, ids=[f"{bad[0]}: {bad[2]}" for bad in BAD])
def test_a_bad_file_is_told_where_and_what(tmp_path: Path, file: str, good: str, bad: str, said: str) -> None:
    text = (FOLDER / file).read_text()
    assert good in text
    copy = tmp_path / Path(file).name
    copy.write_text(text.replace(good, bad))
    assert any(said in problem for problem in validate.problems(copy)), validate.problems(copy)


def test_what_is_no_description_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.yaml").write_text("steps: 5")
    assert validate.main([str(tmp_path / "x.yaml"), str(tmp_path / "absent.yaml")]) == 1
    shown = capsys.readouterr().out
    assert "x.yaml: is neither a Kubernetes object" in shown
    assert "absent.yaml: cannot be read: No such file" in shown


@pytest.mark.parametrize("pod", PODS)
def test_pods_have_no_rights_and_bounds(pod: dict[str, Any]) -> None:
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    for container in (*pod["initContainers"], *pod["containers"]):
        assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
        assert container["resources"]["limits"].keys() >= {"cpu", "memory"}
        assert re.search(r":\d[\w.-]*$", container["image"])
        assert not [entry for entry in container.get("env", ()) if SECRET.search(entry["name"]) and entry["name"] not in TLS]


@pytest.mark.parametrize("pod", PODS)
def test_every_node_speaks_tls_and_only_what_starts_it_sees_the_authority(pod: dict[str, Any]) -> None:
    (ray,) = pod["containers"]
    assert TLS.items() <= {entry["name"]: entry.get("value") for entry in ray["env"]}.items()
    assert "authority" not in [mount["name"] for mount in ray["volumeMounts"]]
    (certificate,) = pod["initContainers"]
    takes(typer.main.get_command(mm.app), [word.replace("$(POD_IP)", "10.0.0.7") for word in certificate["command"][1:]])


@pytest.mark.parametrize("spec", CLUSTERS)
def test_every_cluster_asks_for_a_token(spec: dict[str, Any]) -> None:
    assert spec["authOptions"] == {"mode": "token"}
    assert tuple(map(int, spec["rayVersion"].split("."))) >= tuple(map(int, FLOORS["ray"].split(".")))
    assert f"ray=={spec['rayVersion']}" in (ROOT / "constraints.txt").read_text().splitlines()
    if spec.get("enableInTreeAutoscaling"):
        assert TLS.items() <= {entry["name"]: entry["value"] for entry in spec["autoscalerOptions"]["env"]}.items()


def test_gpu_workers_come_and_go_and_wait_in_a_queue() -> None:
    (cluster,) = objects("cluster.yaml")
    assert cluster["spec"]["enableInTreeAutoscaling"] is True
    for group in cluster["spec"]["workerGroupSpecs"]:
        assert (group["minReplicas"], group["maxReplicas"] > 0) == (0, True)
        assert group["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "8"
    for each in (cluster, *objects("train.yaml"), *objects("serve.yaml")):
        assert each["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "mm"


@pytest.mark.parametrize("name", ["cluster", "train"])
def test_a_run_asks_for_gpus_that_are_not_there_yet(name: str) -> None:
    (ray,) = ray_clusters()[name]["headGroupSpec"]["template"]["spec"]["containers"]
    environment = {entry["name"]: entry["value"] for entry in ray["env"] if entry["name"].startswith("MM_SET__")}
    run, _ = resolve(recipe("clip-vit-b32"), environment=environment)
    assert run.resources.gpus_per_worker == 1


def spot_notice() -> tuple[dict[str, Any], list[str], list[str]]:
    """The pod of a spot worker; what it does when it is told to go, in two parts: `ray drain-node …`, and a while of sleep."""
    spot = next(group for group in ray_clusters()["cluster"]["workerGroupSpecs"] if group["groupName"] == "spot")["template"]["spec"]
    *_, script = spot["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
    drain, sleep = (shlex.split(part) for part in script.split("&&"))
    return spot, drain, sleep


def test_spot_workers_give_notice_before_they_go() -> None:
    from ray.scripts.scripts import cli

    spot, drain, sleep = spot_notice()
    takes(cli, drain[1:])
    assert "DRAIN_NODE_REASON_PREEMPTION" in drain
    assert int(sleep[1]) < int(drain[-1]) < spot["terminationGracePeriodSeconds"]


@pytest.mark.long
def test_the_notice_of_a_spot_worker_drains_the_node_that_it_is_given_on() -> None:
    """It names no node and no address: Ray knows both by RAY_ADDRESS, as KubeRay sets it. A node that is drained and idle ends."""
    _, drain, _ = spot_notice()
    cluster = LocalCluster.new().add(Room(cpus=1, memory=1 << 30, object_store=80 << 20))
    try:
        cluster.wait()
        environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | cluster.variables
        program = [sys.executable, "-m", "ray.scripts.scripts", *drain[1:]]
        assert "raylet" in running(cluster)
        subprocess.run(program, env=environment | {"RAY_ADDRESS": cluster.gcs_address}, check=True, capture_output=True, timeout=60)
        until = time.monotonic() + 60
        while "raylet" in running(cluster):
            assert time.monotonic() < until
            time.sleep(0.2)
        assert "gcs_server" in running(cluster)
    finally:
        cluster.stop()


def running(cluster: LocalCluster) -> set[str]:
    return {process.name() for process in cluster.nodes[0].processes() if process.status() != psutil.STATUS_ZOMBIE}


def _labels(selector: dict[str, Any]) -> str:
    assert selector.keys() <= {"matchLabels"}
    return ",".join(f"{key}={value}" for key, value in selector.get("matchLabels", {}).items()) or "all"


def _allowed(policy: dict[str, Any]) -> Iterator[tuple[str, str, str, str]]:
    """(policy, in or out, who on the other side, ports) of each thing that a policy lets through."""
    name, spec = policy["metadata"]["name"], policy["spec"]
    assert spec.keys() <= {"podSelector", "policyTypes", "ingress", "egress"}
    for way, peers in ("ingress", "from"), ("egress", "to"):
        assert (way in spec) <= (way.capitalize() in spec["policyTypes"])
        for rule in spec.get(way, ()):
            assert rule.keys() <= {peers, "ports"}
            assert rule
            ports = ",".join(f"{port['port']}/{port['protocol']}" for port in rule["ports"]) if "ports" in rule else "all"
            for peer in rule.get(peers) or [{}]:
                if "ipBlock" in peer:
                    yield name, way, peer["ipBlock"]["cidr"], ports
                    continue
                assert peer.keys() <= {"namespaceSelector", "podSelector"}
                where = f"{_labels(peer['namespaceSelector'])}: " if "namespaceSelector" in peer else ""
                yield name, way, where + (_labels(peer["podSelector"]) if "podSelector" in peer else "all") if peer else "anywhere", ports


def test_the_network_denies_what_it_does_not_name() -> None:
    """All that is let through, word by word: a rule that is added or widened must be added here."""
    policies = [each for each in objects("network.yaml") if each["kind"] == "NetworkPolicy"]
    (deny,) = [each["spec"] for each in policies if each["metadata"]["name"] == "deny-all"]
    assert deny == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    node, mlflow = "ray.io/is-ray-node=yes", "app.kubernetes.io/name=mlflow"
    assert {each for policy in policies for each in _allowed(policy)} == {
        ("dns", "egress", "kubernetes.io/metadata.name=kube-system: k8s-app=kube-dns", "53/UDP,53/TCP"),
        ("dns", "egress", "kubernetes.io/metadata.name=kube-system: k8s-app=node-local-dns", "53/UDP,53/TCP"),
        ("dns", "egress", "169.254.20.10/32", "53/UDP,53/TCP"),
        ("ray-nodes", "ingress", node, "all"),
        ("ray-nodes", "egress", node, "all"),
        ("ray-nodes", "egress", mlflow, "5000/TCP"),
        ("ray-nodes", "egress", "anywhere", "443/TCP,6443/TCP"),
        ("mlflow", "ingress", node, "5000/TCP"),
        ("mlflow", "egress", "anywhere", "443/TCP,5432/TCP"),
        ("ray-operator", "ingress", "all: app.kubernetes.io/name=kuberay-operator", "8265/TCP"),
        ("endpoint", "ingress", "mm/asks=yes: all", "8000/TCP"),
        ("prometheus", "ingress", "kubernetes.io/metadata.name=monitoring: app.kubernetes.io/name=prometheus", "8080/TCP,8000/TCP"),
    }


def covers(wide: dict[str, Any], narrow: dict[str, Any]) -> bool:
    """Whether every pod that the second selector of labels takes is one of the first's."""
    return wide.get("matchLabels", {}).items() <= narrow.get("matchLabels", {}).items()


def lets_in(spec: dict[str, Any], asks: dict[str, Any], asked: dict[str, Any], ports: list[Any] | None) -> bool:
    """Whether a policy lets pods of one selector ask those of another at these ports; None is all of them."""
    return covers(spec["podSelector"], asked) and any(
        any("namespaceSelector" not in peer and covers(peer.get("podSelector", {}), asks) for peer in rule["from"])
        and ("ports" not in rule or (ports is not None and all(port in rule["ports"] for port in ports)))
        for rule in spec.get("ingress", ())
    )


def test_who_may_ask_a_pod_of_the_namespace_is_let_in_there() -> None:
    policies = [each["spec"] for each in objects("network.yaml") if each["kind"] == "NetworkPolicy"]
    within = [
        (spec["podSelector"], peer["podSelector"], rule.get("ports"))
        for spec in policies
        for rule in spec.get("egress", ())
        for peer in rule.get("to", ())
        if not {"namespaceSelector", "ipBlock"} & set(peer)
    ]
    assert {"matchLabels": {"app.kubernetes.io/name": "mlflow"}} in [asked for _, asked, _ in within]
    for asks, asked, ports in within:
        assert any(lets_in(spec, asks, asked, ports) for spec in policies), f"{asks} may ask {asked}, which does not let it in"


def test_mlflow_reaches_its_stores() -> None:
    (mlflow,) = [each["spec"] for each in objects("network.yaml") if each["metadata"]["name"] == "mlflow"]
    assert {port["port"] for rule in mlflow["egress"] for port in rule["ports"]} == {443, 5432}


def test_mlflow_is_where_jobs_look_for_it_and_is_what_the_network_lets_through() -> None:
    with warnings.catch_warnings(action="ignore"):
        from mlflow.cli import cli

    deployment, service = objects("mlflow.yaml")
    pod = deployment["spec"]["template"]
    (server,) = pod["spec"]["containers"]
    (policy,) = [each["spec"] for each in objects("network.yaml") if each["metadata"]["name"] == "mlflow"]
    assert pod["metadata"]["labels"] == deployment["spec"]["selector"]["matchLabels"] == service["spec"]["selector"]
    assert pod["metadata"]["labels"] == policy["podSelector"]["matchLabels"]
    address = f"{service['metadata']['name']}.{service['metadata']['namespace']}.svc.cluster.local:{service['spec']['ports'][0]['port']}"
    assert f"http://{address}" in (KUBERNETES / "train.yaml").read_text()
    assert server["command"][0] == "mlflow"
    assert any(word.startswith("--allowed-hosts=") and address in word for word in server["command"])
    takes(cli, server["command"][1:])
    assert [each for each in server["env"] if SECRET.search(each["name"]) and "value" in each] == []


def test_the_job_runs_a_command_that_can_be_started_again() -> None:
    (job,) = objects("train.yaml")
    *starts, program = (words := shlex.split(job["spec"]["entrypoint"]))[:4]
    assert starts == ["python", "-m", "cluster.again"]  # where the driver alone is killed
    assert program == "mm"
    assert {"--or-resume", "--name"} <= set(words)
    takes(typer.main.get_command(mm.app), words[4:])


def test_the_service_has_a_configuration_that_serve_takes() -> None:
    from ray.serve.schema import ServeDeploySchema

    (service,) = objects("serve.yaml")
    (application,) = ServeDeploySchema.model_validate(yaml.safe_load(service["spec"]["serveConfigV2"])).applications
    assert callable(getattr(mm, application.import_path.removeprefix("mm:")))
    config = ServeConfig.model_validate(application.args["config"])
    assert config.needs_key
    assert config.keys
    assert [Wanted(**one).reference for one in application.args["models"]] == ["models:/clip-demo@champion"]


def test_the_head_names_the_port_of_which_kuberay_makes_the_endpoints_service() -> None:
    """Older ones look at the head's container alone: https://github.com/ray-project/kuberay, controllers/ray/common/service.go."""
    (service,) = objects("serve.yaml")
    (head,) = service["spec"]["rayClusterConfig"]["headGroupSpec"]["template"]["spec"]["containers"]
    assert {"name": "serve", "containerPort": 8000} in head["ports"]


def test_the_service_has_room_for_a_new_version_beside_the_old_one() -> None:
    (service,) = objects("serve.yaml")
    (application,) = yaml.safe_load(service["spec"]["serveConfigV2"])["applications"]
    compute = ServeConfig.model_validate(application["args"]["config"]).compute
    gpus = 0.0
    for group in service["spec"]["rayClusterConfig"]["workerGroupSpecs"]:
        (worker,) = group["template"]["spec"]["containers"]
        gpus += group["minReplicas"] * float(worker["resources"]["limits"]["nvidia.com/gpu"])
    assert gpus >= 2 * len(application["args"]["models"]) * compute.replicas * compute.gpus_per_replica


def test_compose_is_reached_from_this_machine_alone_and_its_secrets_are_files() -> None:
    for name, service in COMPOSE["services"].items():
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", ())), name
        assert not [key for key in service.get("environment", {}) if SECRET.search(key)], name
        assert service["image"] in ("mm:cpu", "mm-mlflow") or re.search(r":\d[\w.-]*$", service["image"]), name
    assert all(set(secret) == {"file"} for secret in COMPOSE["secrets"].values())
    assert COMPOSE["services"]["worker"]["environment"]["RAY_AUTH_MODE"] == "token"
    assert "/cluster/compose/secrets/" in (ROOT / ".gitignore").read_text().splitlines()


def test_compose_starts_programs_by_options_they_have() -> None:
    from ray.scripts.scripts import cli as ray

    with warnings.catch_warnings(action="ignore"):
        from mlflow.cli import cli as mlflow

    services = COMPOSE["services"]
    for name in ("head", "worker"):
        takes(ray, [re.sub(r"\$\{\w+:-(.*)\}", r"\1", word) for word in services[name]["command"][1:]])  # as compose fills it in
    takes(ray, services["head"]["healthcheck"]["test"][2:])
    server = shlex.split(services["mlflow"]["command"][-1].replace("$$(cat /run/secrets/postgres)", "x"))
    assert "--allowed-hosts" in server
    takes(mlflow, server[server.index("mlflow") + 1 :])


def test_compose_makes_its_bucket_with_what_the_image_has(object_store: ObjectStore) -> None:
    """Twice: the second time it is there."""
    program = COMPOSE["services"]["bucket"]["command"][-1]
    imported = {name.name for node in ast.walk(ast.parse(program)) if isinstance(node, ast.Import) for name in node.names}
    assert imported <= {name.replace("-", "_") for name in required()}
    for _ in range(2):
        subprocess.run([sys.executable, "-c", program], check=True)
    assert s3fs.S3FileSystem().exists("mm-data")


def test_the_guide_brings_shards_into_the_store(object_store: ObjectStore, corpus: Path, tmp_path: Path) -> None:
    """Twice, too."""
    (program,) = re.findall(r'python -c "(import s3fs[^"]*)"', (ROOT / "docs" / "cluster.md").read_text(encoding="utf-8"))
    (tmp_path / "corpus").symlink_to(corpus)
    store = s3fs.S3FileSystem()
    if not store.exists("mm-data"):
        store.mkdir("mm-data")
    for _ in range(2):
        subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True)
    shards = {file.name for file in (corpus / "train").iterdir()}
    assert {path.rpartition("/")[2] for path in s3fs.S3FileSystem().ls("mm-data/shards")} == shards


def test_secrets_are_drawn_once_and_are_their_owners_alone(tmp_path: Path) -> None:
    command = ["sh", str(FOLDER / "compose" / "make-secrets.sh"), "secrets"]
    shown = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert f"export RAY_AUTH_TOKEN_PATH={tmp_path.resolve()}/secrets/ray_token\n" in shown
    drawn = {file.name: file.read_text() for file in (tmp_path / "secrets").iterdir()}
    assert drawn.keys() == COMPOSE["secrets"].keys()
    assert {stat.S_IMODE(file.stat().st_mode) for file in (tmp_path / "secrets").iterdir()} == {0o600}
    profile = configparser.ConfigParser()
    profile.read_string(drawn["aws"])
    (credentials,) = json.loads(drawn["s3.json"])["identities"][0]["credentials"]
    assert credentials == {"accessKey": profile["default"]["aws_access_key_id"], "secretKey": profile["default"]["aws_secret_access_key"]}
    secrets = {drawn["ray_token"], drawn["postgres"], credentials["secretKey"]}
    assert [len(secret) for secret in secrets] == [64, 64, 64]
    assert not [secret for secret in secrets if secret in shown]
    subprocess.run(command, cwd=tmp_path, capture_output=True, check=True)
    assert {file.name: file.read_text() for file in (tmp_path / "secrets").iterdir()} == drawn


def test_the_image_holds_every_package_and_leaves_the_rest_out() -> None:
    packages = [
        name.rstrip("*")
        for name in tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]["find"]["include"]
    ]
    lines = (FOLDER / "images" / "mm.Dockerfile").read_text().splitlines()
    assert {f"COPY {name} {name}" for name in packages} <= set(lines)
    assert "USER 1000" in lines
    assert {"RAY_AUTH_MODE=token", "RAY_LOGGER_LEVEL=critical"} <= {word for line in lines for word in line.split()}
    ignored = (FOLDER / "images" / "mm.Dockerfile.dockerignore").read_text().splitlines()
    assert "*" in ignored
    copied = {word for line in lines if line.startswith("COPY ") for word in line.split()[1:-1]}
    assert {f"!{name}" for name in copied} == {line for line in ignored if line.startswith("!")}


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def ray_commands() -> list[str]:
    """Of the guides' blocks, what begins with `ray` at the start of a line or behind `&&`."""
    command = re.compile(r"(?:^(?:    )?|&& )(?:\.venv/bin/)?(ray \w[^\n#&>]*)", re.MULTILINE)
    return sorted({found.strip() for page in PAGES for found in command.findall(page.read_text(encoding="utf-8"))})


@pytest.mark.parametrize("command", ray_commands())
def test_ray_takes_the_guides_commands(command: str) -> None:
    from ray.scripts.scripts import cli

    takes(cli, shlex.split(command)[1:])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_that_starts_a_head_draws_a_token_before(page: Path) -> None:
    before, starts, _ = page.read_text(encoding="utf-8").partition("ray start --head")
    for wanted in ("ray get-auth-token --generate", "chmod 600 ~/.ray/auth_token", "RAY_AUTH_MODE=token") if starts else ():
        assert wanted in before


def test_buckets_have_names_that_s3_takes() -> None:
    """Of 3 to 63 characters: https://docs.aws.amazon.com/AmazonS3/latest/userguide/bucketnamingrules.html. moto refuses others, too."""
    pages = [file.read_text() for file in (*FOLDER.rglob("*.yaml"), *(ROOT / "docs").glob("*.md"), ROOT / "README.md")]
    buckets = {
        bucket
        for page in pages
        for bucket in re.findall(r"s3://([\w.-]+)|create_bucket\(Bucket=\"([^\"]+)", page)
        for bucket in bucket
        if bucket
    }
    assert "mm-data" in buckets
    assert [bucket for bucket in buckets if not re.fullmatch(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]", bucket)] == []
