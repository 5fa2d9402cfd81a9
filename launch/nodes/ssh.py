"""Commands on other nodes over ssh, without a shell string from config values."""

import shlex
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from launch.nodes.answer import ask
from launch.nodes.node_ranks import module_environment
from launch.settings.config import HostsLaunch, SshLaunch

# A node that stops answering is noticed by ssh itself within 15 s.
OPTIONS = {
    "BatchMode": "yes",
    "ConnectTimeout": "5",
    "ServerAliveInterval": "5",
    "ServerAliveCountMax": "3",
}
MAX_AT_ONCE = 64


def remote_command(
    launch: HostsLaunch, host: str, module: str, arguments: Sequence[str] = ()
) -> list[str]:
    """`python -m MODULE ARGUMENTS` on a host. The remote shell gets every word quoted."""
    command = ["ssh"]
    if isinstance(launch, SshLaunch) and launch.ssh_config is not None:
        command += ["-F", launch.ssh_config]
    for name, value in OPTIONS.items():
        command += ["-o", f"{name}={value}"]
    variables = [f"{name}={value}" for name, value in module_environment().items()]
    python = launch.python or sys.executable
    remote = ["env", *variables, python, "-u", "-m", module, *arguments]
    return [*command, "--", host, shlex.join(remote)]


def ask_all(
    launch: HostsLaunch,
    hosts: Sequence[str],
    module: str,
    arguments: Sequence[str],
    *,
    seconds: float,
    inputs: Sequence[str] | None = None,
) -> list[dict[str, Any]]:
    """Each host's answer, its last line of JSON; {"problem": why} of one that gave none.

    `inputs` are fed to the commands' standard inputs.
    """

    def ask_host(place: int) -> dict[str, Any]:
        command = remote_command(launch, hosts[place], module, arguments)
        try:
            return ask(command, inputs[place] if inputs else "", seconds=seconds)
        except OSError as error:
            return {"problem": f"ssh can't be started here ({error}); install an ssh client"}

    with ThreadPoolExecutor(min(len(hosts), MAX_AT_ONCE)) as pool:
        return list(pool.map(ask_host, range(len(hosts))))
