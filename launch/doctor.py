"""`thrifty doctor`: are the nodes fit for this run? Also asked before every launch.

Each node answers twice: what it is (`launch.fitness.probe`), and, once all have left a mark in the
run's folder, whose marks it sees and how fast it reaches the others (`launch.fitness.network`).
"""

import json
import logging
import os
import sys
import uuid
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data.config import DataConfig, MixtureData
from data.mirror import is_remote
from launch.begin import settle
from launch.fitness.findings import Findings, report
from launch.fitness.probe import mark_path
from launch.fitness.rates import describe_rates, list_rates
from launch.nodes.answer import ask_here
from launch.nodes.ssh import ask_all
from launch.settings.compose import Job, run_jobs, worst
from launch.settings.config import HostsLaunch, LaunchConfig, LaunchedRun, LocalLaunch, SshLaunch
from train.outcome import ExitCode

log = logging.getLogger(__name__)

PROBE_SECONDS = 60.0
NETWORK_SECONDS = 240.0
GB = 1e9

Facts = dict[str, Any]


def main() -> ExitCode:
    """Examine the nodes of the launch that the command line describes."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    return worst(run_jobs(doctor_job, schema=LaunchedRun))


def doctor_job(job: Job) -> ExitCode:
    """Print the table; failed if anything is red."""
    findings = examine(settle(job))
    report(findings)
    return ExitCode.FINISHED if findings.is_healthy else ExitCode.FAILED


def examine(config: LaunchedRun) -> Findings:
    """All checks of all nodes, spares included."""
    launch = config.launch
    ask = _asker(config)
    hosts = _hosts(config)
    findings = Findings(hosts)
    nonce = uuid.uuid4().hex[:12]
    run_dir = Path(config.run_dir).absolute()
    common = {
        "run_dir": str(run_dir),
        "corpora": find_corpora(config.data),
        "interface": getattr(launch, "interface", None),
        "first_name": _first_name(launch),
        "nonce": nonce,
    }
    port = getattr(launch, "port", None)
    # The first node's address is what ssh reached it by; the others look for their way to that.
    asked_first = {**common, "first": "", "port": port, "node": 0}
    first = ask("launch.fitness.probe", [asked_first], hosts[:1])
    address = str((first[0].get("interface") or {}).get("address") or "")
    asked = [
        {**common, "first": address, "port": None, "node": node} for node in range(1, len(hosts))
    ]
    facts = [*first, *(ask("launch.fitness.probe", asked, hosts[1:]) if asked else [])]
    try:
        good = _judge_reach(findings, hosts, facts)
        for check in CHECKS:
            check(findings, config, good)
        if len(good) == len(hosts):
            _judge_network(findings, config, ask, common, address, good)
    finally:
        for node in range(len(hosts)):
            mark_path(run_dir, nonce, node).unlink(missing_ok=True)
    return findings


def find_corpora(data: DataConfig) -> list[str]:
    """The folders that every node reads."""
    if isinstance(data, MixtureData):
        return [source.folder for source in data.sources]
    return [data.folder]


def _hosts(config: LaunchedRun) -> list[str]:
    launch = config.launch
    match launch:
        case HostsLaunch():
            return [host.name for host in launch.list_hosts()]
        case LocalLaunch():
            return ["localhost"]
        case _:
            raise ValueError(
                f"launch={launch.kind}: the nodes are not known before Slurm or the cluster gives "
                "them; doctor looks at those of launch=ssh and launch=local"
            )


def _first_name(launch: LaunchConfig) -> str:
    """The name by which ranks look for the first node; empty where they are told its address."""
    if isinstance(launch, SshLaunch) or not isinstance(launch, HostsLaunch):
        return ""
    return launch.list_hosts()[0].name.rpartition("@")[2]


def _asker(config: LaunchedRun) -> Callable[[str, list[dict[str, Any]], list[str]], list[Facts]]:
    """Asks each host a module's questions: over ssh, or this machine directly."""
    launch = config.launch

    def ask(module: str, questions: list[dict[str, Any]], hosts: list[str]) -> list[Facts]:
        seconds = NETWORK_SECONDS if module == "launch.fitness.network" else PROBE_SECONDS
        inputs = [json.dumps(question) for question in questions]
        if isinstance(launch, HostsLaunch):
            return ask_all(launch, hosts, module, [], seconds=seconds, inputs=inputs)
        return [ask_here(module, text, seconds=seconds) for text in inputs]

    return ask


def _judge_reach(findings: Findings, hosts: list[str], facts: list[Facts]) -> dict[str, Facts]:
    """The nodes that answered."""
    good = {}
    for host, known in zip(hosts, facts, strict=True):
        problem = str(known.get("problem", ""))
        findings.add(
            "reachable",
            host,
            problem,
            str(known.get("hostname", "")),
            f"try `ssh {host}` by hand: name, key, Python and packages must be there",
        )
        if not problem:
            good[host] = known
    return good


def _judge_versions(findings: Findings, _: LaunchedRun, good: dict[str, Facts]) -> None:
    """Same Python, same packages, same code as most."""
    packages = [known["versions"] for known in good.values()]
    for host, known in good.items():
        odd = [
            f"{name} {version} (others {common})"
            for name, version in known["versions"].items()
            if version != (common := Counter(each[name] for each in packages).most_common(1)[0][0])
            or version == "missing"
        ]
        text = f"torch {known['versions']['torch']}"
        way_out = "install the same versions on every node"
        findings.add("packages", host, ", ".join(odd), text, way_out)
    pythons = {host: known["python"] for host, known in good.items()}
    _judge_same(findings, "Python", pythons, "use the same Python on every node (launch.python)")
    code = {host: known["code"] for host, known in good.items()}
    _judge_same(findings, "our code", code, "install the same commit of thrifty on every node")


def judge_corpora(findings: Findings, config: LaunchedRun, good: dict[str, Facts]) -> None:
    """Every node reads the same corpora."""
    digests = {}
    for host, known in good.items():
        for folder, why in known["corpora"]["unread"].items():
            findings.add("corpus", host, why, "", _way_to_corpus(folder))
        if not known["corpora"]["unread"]:
            digests[host] = known["corpora"]["digest"]
    folders = ", ".join(find_corpora(config.data))
    way_out = f"{folders} must hold the same there as on the other nodes: copy it there again"
    if any(map(is_remote, find_corpora(config.data))):
        way_out += "; behind a URL, look for a proxy or a copy that is not finished"
    _judge_same(findings, "corpus", digests, way_out)


def _way_to_corpus(folder: str) -> str:
    if is_remote(folder):
        return (
            f"let the node reach {folder}: network, proxy, credentials, and the package that reads "
            "such URLs (aiohttp, s3fs, gcsfs) must be there; no corpus needs to be put there"
        )
    return f"put the prepared corpus into {folder} there"


def _judge_same(findings: Findings, check: str, values: dict[str, str], way_out: str) -> None:
    """Red where a node differs from what most say; `missing` is red in any case."""
    most = Counter(values.values()).most_common(1)
    for host, value in values.items():
        common = most[0][0]
        problem = "" if value == common else f"{value}, others have {common}"
        findings.add(check, host, "missing" if value == "missing" else problem, value, way_out)


def judge_devices(findings: Findings, config: LaunchedRun, good: dict[str, Facts]) -> None:
    """GPUs: none anywhere, or enough of the same, under the same driver, everywhere."""
    needed = config.launch.processes
    has_any = any(known["gpus"] for known in good.values())
    for host, known in good.items():
        count = len(known["gpus"])
        problem = f"{count} GPUs, {needed} needed" if has_any and count < needed else ""
        text = f"{count} x {known['gpus'][0]}" if count else "none (CPU)"
        findings.add("GPUs", host, problem, text, "choose fewer launch.processes or another node")
    if has_any:
        kinds = {host: ", ".join(sorted(set(known["gpus"]))) for host, known in good.items()}
        _judge_same(findings, "kind of GPU", kinds, "take nodes with the same GPUs")
        drivers = {host: known["driver"] for host, known in good.items()}
        _judge_same(findings, "driver", drivers, "install the same NVIDIA driver on every node")


def _judge_room(findings: Findings, config: LaunchedRun, good: dict[str, Facts]) -> None:
    """Free memory and disk, and that the run's folder can be written."""
    doctor = config.launch.doctor
    for host, known in good.items():
        for check, key, least, setting in (
            ("free memory", "memory", doctor.min_memory_gb, "min_memory_gb"),
            ("free disk", "disk", doctor.min_disk_gb, "min_disk_gb"),
        ):
            free = known[key] / GB
            problem = f"{free:.1f} GB, {least:g} needed" if free < least else ""
            way_out = f"make room, or lower launch.doctor.{setting}"
            findings.add(check, host, problem, f"{free:.1f} GB", way_out)
        way_out = "mend the mount or the permissions, or choose another run_dir"
        findings.add("run_dir writable", host, known["written"], "yes", way_out)


def _judge_addresses(findings: Findings, config: LaunchedRun, good: dict[str, Facts]) -> None:
    """The interface that the ranks will use, and the port on the first node."""
    for place, (host, known) in enumerate(good.items()):
        interface = known["interface"]
        problem = interface["problem"]
        is_loopback = interface["name"] == "lo" and len(good) > 1
        if is_loopback and not problem:
            problem = "the way to the first node is the loopback interface"
        text = f"{interface['name']} {interface['address'] or ''}"
        way_out = "name an interface that all nodes have: launch.interface=NAME (see `ip address`)"
        findings.add("interface", host, problem, text, way_out)
        if known["resolved"]:
            resolved = known["resolved"]
            text = f"{resolved['name']} is {resolved['address']}"
            way_out = "mend the node's /etc/hosts or DNS, or use launch=ssh, which needs no names"
            findings.add("name resolution", host, resolved["problem"], text, way_out)
        if place == 0 and getattr(config.launch, "port", None) is not None:
            way_out = "choose another launch.port, or leave it out: a free one is taken"
            findings.add(
                "port", host, known["port"], str(getattr(config.launch, "port", "")), way_out
            )


def _judge_clocks(findings: Findings, config: LaunchedRun, good: dict[str, Facts]) -> None:
    """A node's clock must lie between this one's before and after the node was asked."""
    allowed = config.launch.doctor.max_clock_skew_seconds
    for host, known in good.items():
        skew = max(known["asked"] - known["time"], known["time"] - known["answered"], 0.0)
        problem = f"off by {skew:.1f} s" if skew > allowed else ""
        way_out = "set its clock (chrony, ntp), or raise launch.doctor.max_clock_skew_seconds"
        findings.add("clock", host, problem, "agrees", way_out)


def _judge_network(
    findings: Findings,
    config: LaunchedRun,
    ask: Callable[[str, list[dict[str, Any]], list[str]], list[Facts]],
    common: dict[str, Any],
    address: str,
    good: dict[str, Facts],
) -> None:
    """The run's folder is the same everywhere; rates between nodes, the slowest link named."""
    hosts = list(good)
    doctor = config.launch.doctor
    port = getattr(config.launch, "port", None) or 20000 + os.getpid() % 20000
    questions = [
        {
            **common,
            "node": node,
            "nodes": len(hosts),
            "first": address,
            "port": port,
            "interface": good[host]["interface"]["name"],
            "bandwidth": doctor.bandwidth,
            "megabytes": doctor.bandwidth_megabytes,
        }
        for node, host in enumerate(hosts)
    ]
    answers = ask("launch.fitness.network", questions, hosts)
    for host, answer in zip(hosts, answers, strict=True):
        unseen = [name for node, name in enumerate(hosts) if node not in answer.get("seen", [])]
        problem = f"does not hold what {', '.join(unseen)} wrote" if unseen else ""
        if "problem" in answer:
            problem = ""
        way_out = "mount the same file system at run_dir on all nodes: checkpoints live there"
        findings.add("run_dir shared", host, problem, "yes", way_out)
        if "problem" in answer:
            way_out = "look for a firewall between the nodes, or name launch.interface"
            findings.add("network", host, str(answer["problem"]), "", way_out)
    rates = next((answer for answer in answers if "all_reduce" in answer), None)
    if rates is not None:
        for host, text, problem in describe_rates(rates, hosts, doctor.min_bandwidth_gbps):
            way_out = "look at its cable, switch port and interface, or take it out"
            findings.add("network", host, problem, text, way_out)
        findings.notes += list_rates(rates, hosts)


CHECKS = (
    _judge_versions,
    judge_corpora,
    judge_devices,
    _judge_room,
    _judge_addresses,
    _judge_clocks,
)


if __name__ == "__main__":
    sys.exit(main())
