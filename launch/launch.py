"""`thrifty launch`: a run on one node or many, checked before and kept alive unattended."""

import json
import logging
import shlex
import sys
from pathlib import Path

from launch.begin import begin, settle
from launch.doctor import examine
from launch.fitness.findings import report
from launch.nodes.node_ranks import LOOPBACK
from launch.nodes.order import without_secrets
from launch.nodes.ssh import remote_command
from launch.settings.compose import Job, run_jobs, worst
from launch.settings.config import (
    HostsLaunch,
    LaunchedRun,
    PdshLaunch,
    SlurmLaunch,
    SshLaunch,
    TorchrunLaunch,
)
from launch.settings.help import describe_launch
from launch.start.job_commands import pdsh_files
from launch.start.slurm import submit, write_script
from launch.start.starters import (
    Attempt,
    LocalStarter,
    Ready,
    SshStarter,
    build_order,
    build_starter,
    job_environment,
)
from launch.survive.supervise import Supervisor
from launch.sweep import report_sweep
from train.outcome import ExitCode, Status

log = logging.getLogger(__name__)

DRY_RUN = "--dry-run"


def main() -> ExitCode:
    """Launch what the command line asks for."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    if {"--help", "-h"} & set(sys.argv[1:]):
        print(describe_launch())
        return ExitCode.FINISHED
    is_dry = DRY_RUN in sys.argv
    sys.argv = [argument for argument in sys.argv if argument != DRY_RUN]
    results = run_jobs(show_job if is_dry else launch_job, schema=LaunchedRun)
    if not is_dry:
        report_sweep(results)
    return worst(results)


def launch_job(job: Job) -> ExitCode:
    """Check the nodes, start the run on them, and keep it alive.

    Raises:
        ValueError: The config can't be run, the folder holds another run, or a node is not fit.
    """
    config = settle(job)
    with begin(config) as run_dir:
        if isinstance(config.launch, SlurmLaunch):
            return submit(config)
        if isinstance(config.launch, TorchrunLaunch):
            print(describe_torchrun(config))
            return ExitCode.FINISHED
        if config.launch.doctor.enabled:
            findings = examine(config)
            report(findings)
            if not findings.is_healthy:
                raise ValueError(
                    "the nodes are not fit for this run (see above); mend them, take them out, or "
                    "launch all the same with launch.doctor.enabled=false"
                )
        outcome = Supervisor(config, build_starter(config.launch)).run()
    if outcome.status is not Status.finished:
        log.error("%s: %s", outcome.status, outcome.reason)
    if outcome.status is Status.interrupted:
        log.info("the same command with run_dir=%s continues", run_dir)
    return outcome.exit_code


def show_job(job: Job) -> ExitCode:
    """Print every command and file that a launch would use; nothing is started or written."""
    config = settle(job)
    launch, run_dir = config.launch, Path(config.run_dir)
    print(f"# {run_dir / 'config.yaml'}: the resolved config (see it with --cfg job)")
    if isinstance(launch, SlurmLaunch):
        print(f"# {run_dir / 'slurm' / 'job.sh'}, submitted with sbatch:")
        print(write_script(config))
        return ExitCode.FINISHED
    if isinstance(launch, TorchrunLaunch):
        print(describe_torchrun(config))
        return ExitCode.FINISHED
    nodes = [Ready("localhost", LOOPBACK, 0)]
    if isinstance(launch, HostsLaunch):
        hosts = launch.list_hosts()
        print(f"# spares: {', '.join(host.name for host in hosts[launch.nodes :]) or 'none'}")
        nodes = [Ready(host.name, host.name, launch.port or 0) for host in hosts[: launch.nodes]]
        show_questions(launch, [host.name for host in hosts])
    show_start(Attempt(run_dir, "RUN_ID", 1, nodes, launch))
    return ExitCode.FINISHED


def show_questions(launch: HostsLaunch, hosts: list[str]) -> None:
    """The commands by which nodes are asked what they are, before a start."""
    modules = ["launch.fitness.probe", "launch.fitness.network"] if launch.doctor.enabled else []
    if isinstance(launch, SshLaunch):
        modules.append("launch.nodes.hello")
    for module in modules:
        print(f"# before the start, likewise on {', '.join(hosts)}:")
        print(shlex.join(remote_command(launch, hosts[0], module)))


def show_start(attempt: Attempt) -> None:
    """The commands of a start, with the files and the words that they read."""
    launch = attempt.launch
    starter = build_starter(launch)
    if isinstance(launch, PdshLaunch):
        hosts = [node.host for node in attempt.nodes]
        files = pdsh_files(launch, attempt.run_dir, hosts, job_environment(attempt))
        for path, text in files.items():
            print(f"# {path}:\n{text.rstrip()}")
    for node, command in enumerate(starter.commands(attempt)):
        print(shlex.join(command))
        if isinstance(starter, SshStarter | LocalStarter):
            order = without_secrets(build_order(attempt, node))
            print(
                f"# its standard input (address and port are those found at the start): "
                f"{json.dumps(order)}"
            )


def describe_torchrun(config: LaunchedRun) -> str:
    """The command for each node of a cluster that starts the ranks itself."""
    launch = config.launch
    assert isinstance(launch, TorchrunLaunch)
    rank = ["-m", "launch.nodes.rank", str(Path(config.run_dir).absolute())]
    command = [
        *("torchrun", f"--nnodes={launch.nodes}", f"--nproc-per-node={launch.processes}"),
        *("--rdzv-backend=c10d", f"--rdzv-endpoint={launch.rendezvous}"),
        *("--rdzv-id=thrifty", f"--max-restarts={launch.supervision.max_restarts}"),
        *rank,
    ]
    return "\n".join(
        [
            "# On each node (torch 2.13 with gloo needs the variable for restarts to work):",
            f"TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 {shlex.join(command)}",
            "# Or start each rank with RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT set:",
            shlex.join([sys.executable, *rank]),
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
