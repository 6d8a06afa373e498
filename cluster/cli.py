"""`mm doctor`, `mm submit`, `mm jobs`, `mm tls`. Ray, torch and MLflow are imported inside the commands, so that `mm --help` is quick."""

from __future__ import annotations

import shlex
import sys
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mm_core.console import Console

if TYPE_CHECKING:
    from cluster.head import Head
    from cluster.submit import Place

Json = Annotated[bool, typer.Option("--json", help="End standard output with one JSON object.")]
Address = Annotated[
    str | None,
    typer.Option(metavar="URL", help="The head's job service; by default RAY_API_SERVER_ADDRESS, RAY_ADDRESS, http://127.0.0.1:8265."),
]
_STOP_WAIT_S = 120.0
JobId = Annotated[str, typer.Argument(metavar="JOB", help="A job's id, from `mm jobs list`.")]

jobs = typer.Typer(no_args_is_help=True, help="See, follow and stop what was submitted to a Ray cluster.")
tls = typer.Typer(no_args_is_help=True, help="Certificates for TLS between the nodes of a Ray cluster.")


def attach(app: typer.Typer) -> None:
    """Add this package's commands to the program."""
    app.command("submit")(submit)
    app.add_typer(jobs, name="jobs")
    app.add_typer(tls, name="tls")
    app.command("doctor")(doctor)


def doctor(
    address: Annotated[str | None, typer.Option(metavar="URL", help="Check the cluster of this head too.")] = None,
    nodes: Annotated[bool, typer.Option("--nodes", help="Let each node of the cluster that RAY_ADDRESS names look at itself too.")] = False,
    before: Annotated[
        str | None, typer.Option(metavar="COMMAND", help="Look at the stores that this mm command names, in one pair of quotes.")
    ] = None,
    failures: Annotated[bool, typer.Option("--failures", help="Show nothing but what would not work, and what nodes warn of.")] = False,
    as_json: Json = False,
) -> None:
    """Check this machine, and the services that are configured; exit code 1 if something would not work.

    Example: mm doctor; mm doctor --address http://10.0.0.5:8265 --json; mm doctor --nodes --before "train clip-tiny --data s3://bucket/index"
    """
    from cluster import each_node
    from cluster.doctor import State, checks
    from cluster.needs import configured, needs_of

    console = Console(as_json)
    needs = configured() if before is None else needs_of(before)
    if nodes:
        console.note("each node looks at itself")
    of_nodes = each_node.checks(needs) if nodes else []
    told = {(check.evidence, check.remedy) for check in of_nodes}
    here = [check for check in checks(needs, address) if (check.evidence, check.remedy) not in told]
    if failures:  # of nodes also what only may go wrong: it is seen nowhere else
        of_nodes = [check for check in of_nodes if check.state is not State.OK]
        here = [check for check in here if check.state is State.FAIL]
    found = [*of_nodes, *here]
    counts = {state: sum(check.state is state for check in found) for state in State}
    if found:
        console.table(("check", "", "found", "what to do"), [(check.name, check.state, check.evidence, check.remedy) for check in found])
        console.say(", ".join(f"{count} {state}" for state, count in counts.items()))
    console.result({"checks": [asdict(check) for check in found]} | {state.value: count for state, count in counts.items()})
    raise typer.Exit(1 if counts[State.FAIL] else 0)


def submit(
    command: Annotated[list[str], typer.Argument(metavar="-- COMMAND…", help="The mm command to run there, behind two dashes.")],
    address: Address = None,
    env: Annotated[list[str] | None, typer.Option(metavar="NAME", help="Pass this variable on; again for several.")] = None,
    send_code: Annotated[
        bool | None,
        typer.Option("--send-code/--no-send-code", help="Send mm's code along; by default if the head is on another machine."),
    ] = None,
    python: Annotated[str, typer.Option(metavar="PROGRAM", help="The cluster's Python, where the code is sent along.")] = "python",
    wait_s: Annotated[float, typer.Option(min=0, help="Seconds to wait for the id of the tracking run.")] = 120.0,
    label: Annotated[list[str] | None, typer.Option(metavar="KEY=VALUE", help="Shown by `mm jobs list`; again for several.")] = None,
    driver_cpus: Annotated[float, typer.Option(min=0, help="CPUs that the command itself books.")] = 0,
    driver_memory: Annotated[float, typer.Option(metavar="GB", min=0, help="Memory that it books.")] = 0,
    image: Annotated[
        str | None, typer.Option(metavar="URI", help="Run in a container of this image, which has mm; nodes need podman.")
    ] = None,
    install: Annotated[bool, typer.Option("--install", help="Install mm's dependencies there first, in the versions here.")] = False,
    skip_checks: Annotated[bool, typer.Option("--skip-checks", help="Submit whatever the checks of the cluster say.")] = False,
    as_json: Json = False,
) -> None:
    """Run an mm command on a Ray cluster; it goes on when this terminal is closed. The same `train` command again continues its run.

    Example: mm submit --env AWS_PROFILE -- train clip-tiny --data index --name first
    """
    from cluster import target
    from cluster.head import connect
    from cluster.run_names import named, run_of
    from cluster.submit import Elsewhere, Request, passed_variables, read_labels, wait_for_run
    from cluster.submit import submit as start

    console = Console(as_json)
    variables, labels = passed_variables(env or ()), read_labels(label or ())
    head = connect(address)
    place = _place(head, send_code, python, image, checked=not skip_checks)
    if not skip_checks:
        found = target.checks(head, elsewhere=place.checked)
        target.refuse(found, head.address)
        for check in found:
            console.note(f"{check.name}: {check.evidence}" + (f"; {check.remedy}" if check.remedy else ""))
    if isinstance(place, Elsewhere):
        console.note("the code is sent along; data, storage and tracking.uri must be URLs or absolute paths that the cluster sees")
    if variables:
        console.note(
            f"{', '.join(variables)}: Ray keeps the values with the job, shows them among processes while it starts a worker, and logs"
            " them on nodes started without RAY_LOGGER_LEVEL=critical"
        )
    arguments = named(command, datetime.now())
    request = Request(place, variables, labels, driver_cpus, driver_memory, install)
    started = start(head, arguments, request)
    job_id, run = started.job_id, run_of(arguments)
    there = f" --address {head.address}" if address else ""
    console.say(f"job {job_id} at {head.address}" + ("" if started.new else f" has run {run} since earlier; nothing was started"))
    console.say(f"follow: mm jobs logs -f {job_id}{there}")
    console.say(f"stop:   mm jobs stop {job_id}{there}")
    if run is not None:
        again = [*sys.argv[1 : sys.argv.index("--")], "--", *arguments] if "--" in sys.argv else ["submit", "--", *arguments]
        console.say(f"resume: mm {shlex.join(again)}")
    job = wait_for_run(head, job_id, wait_s=wait_s)
    if job.failed:
        console.note(f"the job {job.status.lower()}; its last lines:\n{job.log_tail}")
    elif job.run_id:
        console.say(f"mlflow run {job.run_id}")
    elif job.status == "SUCCEEDED":
        console.say(f"the job has ended well and named no tracking run; its last lines:\n{job.log_tail}")
    else:
        console.say(f"the job is {job.status.lower()} and has named no tracking run in {wait_s:g} s; follow it as above")
    console.result({"job_id": job_id, "run_id": job.run_id, "status": job.status, "name": run, "new": started.new})
    raise typer.Exit(1 if job.failed else 0)


def _place(head: Head, send_code: bool | None, python: str, image: str | None, *, checked: bool) -> Place:
    """Where the command runs, by what was asked for; without a word, here on a head of this machine, and with its code elsewhere. A cluster
    of this machine alone is what `mm doctor` sees here, and is not looked at again from inside."""
    from cluster.head import is_this_machine
    from cluster.submit import Elsewhere, Here, InImage

    if image is not None:
        return InImage(image, python, checked)
    elsewhere = not is_this_machine(head.address) if send_code is None else send_code
    if elsewhere:
        return Elsewhere(python, checked)
    return Here(Path.cwd(), checked and len({node["node_ip"] for node in head.nodes() if node["state"] == "ALIVE"}) > 1)


@jobs.command("list")
def jobs_list(address: Address = None, as_json: Json = False) -> None:
    """The jobs of a cluster, the newest first.

    Example: mm jobs list --address http://10.0.0.5:8265
    """
    from cluster.head import connect
    from cluster.jobs import list_jobs
    from cluster.run_names import LABEL

    console = Console(as_json)
    found = list_jobs(connect(address))
    for job in found:  # lines, as a table would cut the ids on a narrow terminal
        labels = "  ".join(f"{key}={value}" for key, value in job.labels.items() if key != LABEL)
        console.say(f"{job.job_id}  {job.status:<9}  {job.started or '-':<25}  {job.command}{'  ' if labels else ''}{labels}")
    if not found:
        console.note("no jobs yet; start one with mm submit")
    console.result({"jobs": [asdict(job) for job in found]})


@jobs.command("logs")
def jobs_logs(
    job: JobId,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Go on until the job has ended.")] = False,
    address: Address = None,
) -> None:
    """What a job has written. With -f the exit code is 1 if the job fails; Ctrl-C ends only the following.

    Example: mm jobs logs -f raysubmit_4LamXRuQpYdSMg7J
    """
    from cluster.head import connect
    from cluster.jobs import follow_log, job_status, read_log

    head = connect(address)
    if not follow:
        typer.echo(read_log(head, job), nl=False)
        return
    for piece in follow_log(head, job):
        typer.echo(piece, nl=False)
    status = job_status(head, job)
    Console().note(f"job {job} {status.lower()}")
    raise typer.Exit(0 if status == "SUCCEEDED" else 1)


@jobs.command("stop")
def jobs_stop(job: JobId, address: Address = None, as_json: Json = False) -> None:
    """Stop a job, and wait for its end, at most two minutes; after those the exit code is 1.

    A stopped training run continues with the command that `mm submit` printed.

    Example: mm jobs stop raysubmit_4LamXRuQpYdSMg7J
    """
    from cluster.head import connect
    from cluster.jobs import job_status, stop, wait_for_end

    console = Console(as_json)
    head = connect(address)
    stopped = stop(head, job)
    ended = not stopped or wait_for_end(head, job, wait_s=_STOP_WAIT_S)
    if not stopped:
        console.say(f"job {job} had ended: {job_status(head, job).lower()}")
    elif ended:
        console.say(f"job {job} has ended")
    else:
        console.note(f"job {job} is asked to end and has not in {_STOP_WAIT_S:g} s; one that is PENDING ends once there is room for it")
    console.result({"job_id": job, "stopped": stopped, "ended": ended})
    raise typer.Exit(0 if ended else 1)


@tls.command("authority")
def tls_authority(folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Gets ca.crt and ca.key.")]) -> None:
    """Make the authority that signs a cluster's certificates. Once a cluster.

    Example: mm tls authority ca
    """
    from cluster.certificates import make_authority

    make_authority(folder)
    Console().say(f"{folder} signs nodes: mm tls node --authority {folder} --out FOLDER. Whoever has its ca.key can join")


@tls.command("node")
def tls_node(
    authority: Annotated[Path, typer.Option(metavar="FOLDER", help="Where ca.crt and ca.key are.")],
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Gets tls.crt, tls.key and ca.crt.")],
    name: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Another DNS name or address of this node; again for several.")
    ] = None,
    days: Annotated[int, typer.Option(min=1, help="For how long the certificate holds.")] = 365,
) -> None:
    """Make this machine's certificate, and print the variables by which `ray start` and whoever joins use it.

    Example: mm tls node --authority ca --out tls
    """
    from cluster.certificates import make_node

    files = make_node(authority, out, name or (), days=days)
    for variable, value in files.environment.items():
        typer.echo(f"export {variable}={shlex.quote(value)}")
