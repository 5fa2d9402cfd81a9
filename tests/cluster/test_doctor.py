"""`thrifty doctor` on real hosts: what is wrong is red, named, and refused before a launch."""

import os
import re
import signal
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.cluster.hosts import Hosts
from tests.cluster.launches import finish, start

pytestmark = pytest.mark.cluster

ALL = "launch.hosts=[th1,th2,th3]"


def doctor(hosts: Hosts, settings: list[str], run_dir: Path, *more: str) -> tuple[int, str]:
    given = [*settings, "launch=ssh", "launch.nodes=2", "parallel.expert=2", f"run_dir={run_dir}"]
    return finish(start(hosts, "doctor", *given, *more))


def test_healthy_nodes_are_green_and_the_slowest_link_is_named(
    hosts: Hosts, settings: list[str], tmp_path: Path
) -> None:
    code, output = doctor(hosts, settings, tmp_path / "run", ALL, "launch.doctor.bandwidth=true")
    assert code == 0, output
    assert "slowest link th" in output
    assert "all-to-all" in output
    assert list((tmp_path / "run").glob(".doctor-*")) == []


def test_every_pair_is_measured_and_a_slow_link_is_named_and_refused(
    hosts: Hosts, settings: list[str], tmp_path: Path
) -> None:
    rules = ["bandwidth=true", "bandwidth_megabytes=4", "min_bandwidth_gbps=0.03"]
    given = [ALL, *(f"launch.doctor.{rule}" for rule in rules)]
    hosts.slow("th3", "80mbit")  # 0.01 GB/s; the other links are some hundred times as fast
    try:
        code, output = doctor(hosts, settings, tmp_path / "run", *given)
    finally:
        hosts.hasten("th3")
    assert code == 1, output
    rate = r"all-reduce (\d+\.\d\d) GB/s, all-to-all (\d+\.\d\d) GB/s"
    slowest = re.search(r"slowest link (th\d - th\d)", output)
    assert slowest is not None, output
    assert slowest[1] in ("th1 - th3", "th2 - th3")
    pairs = re.findall(rf"^  (th\d - th\d): {rate}$", output, re.MULTILINE)
    assert {pair[0] for pair in pairs} == {"th1 - th2", "th1 - th3", "th2 - th3"}
    assert re.search(f"all nodes: {rate}", output)
    assert re.search(r"th3: network: 0\.0\d GB/s to th[12], 0\.03 needed", output)


def test_a_clock_that_is_off_is_red(hosts: Hosts, settings: list[str], tmp_path: Path) -> None:
    """th2's Pythons read a clock that is an hour ahead (or two, where that is read twice)."""
    path = next(Path(sysconfig.get_path("purelib")).glob("*.pth"))
    ahead = tmp_path / "ahead.pth"
    shift = "import time; time.time = lambda now=time.time: now() + 3600"
    ahead.write_text(f"{path.read_text()}\n{shift}\n")
    hosts.run("th2", "mount", "--bind", str(ahead), str(path))
    try:
        code, output = doctor(hosts, settings, tmp_path / "run", ALL)
    finally:
        hosts.run("th2", "umount", str(path))
    assert code == 1, output
    assert re.search(r"th2: clock: off by \d{4}\.\d s; set its clock", output), output
    assert "th3: clock" not in output


def test_a_name_that_leads_to_the_loopback_is_red_where_ranks_need_names(
    hosts: Hosts, settings: list[str], tmp_path: Path
) -> None:
    """Debian gives a host's own name 127.0.1.1: the first node would wait there alone."""
    changed = tmp_path / "hosts"
    changed.write_text(f"127.0.1.1 th1\n{(hosts.folder / 'hosts').read_text()}")
    hosts.run("th1", "mount", "--bind", str(changed), "/etc/hosts")
    try:
        code, output = doctor(hosts, settings, tmp_path / "run", ALL, "launch=pdsh")
    finally:
        hosts.run("th1", "umount", "/etc/hosts")
    assert code == 1, output
    assert "th1: name resolution: th1 is 127.0.1.1 here, the loopback" in output
    assert "th2: name resolution" not in output


def test_a_wrong_package_version_on_one_node_refuses_the_launch(
    hosts: Hosts, settings: list[str], tmp_path: Path
) -> None:
    (metadata,) = Path(sysconfig.get_path("purelib")).glob("safetensors-*.dist-info/METADATA")
    changed = tmp_path / "METADATA"
    lines = metadata.read_text().splitlines(keepends=True)
    changed.write_text(
        "".join("Version: 0.0.1\n" if line.startswith("Version:") else line for line in lines)
    )
    hosts.run("th2", "mount", "--bind", str(changed), str(metadata))
    try:
        given = [*settings, "launch=ssh", "launch.nodes=2", "parallel.expert=2", ALL]
        code, output = finish(start(hosts, "launch", *given, f"run_dir={tmp_path / 'run'}"))
    finally:
        hosts.run("th2", "umount", str(metadata))
    assert code == 2, output
    assert "th2: packages: safetensors 0.0.1" in output
    assert "step 1/" not in output


def test_a_run_folder_that_is_not_shared_is_red(
    hosts: Hosts, settings: list[str], private: Path
) -> None:
    code, output = doctor(hosts, settings, private / "run", ALL)
    assert code == 1, output
    assert "th2: run_dir shared: does not hold what th1" in output


def test_an_unknown_host_is_red_and_named(
    hosts: Hosts, settings: list[str], tmp_path: Path
) -> None:
    code, output = doctor(hosts, settings, tmp_path / "run", "launch.hosts=[th1,nowhere]")
    assert code == 1, output
    assert "nowhere: reachable: " in output
    assert "resolve" in output


def test_an_interface_that_does_not_exist_is_red(
    hosts: Hosts, settings: list[str], tmp_path: Path
) -> None:
    code, output = doctor(hosts, settings, tmp_path / "run", ALL, "launch.interface=ib9")
    assert code == 1, output
    assert "there is no interface ib9" in output
    assert "launch.interface=NAME" in output


def test_a_port_in_use_is_red(hosts: Hosts, settings: list[str], tmp_path: Path) -> None:
    listen = (
        "import socket, time; s = socket.socket(); s.bind(('', 29777)); s.listen(); "
        "print('ready', flush=True); time.sleep(600)"
    )
    listener = subprocess.Popen(
        hosts.command("th1", sys.executable, "-c", listen), stdout=subprocess.PIPE, text=True
    )
    try:
        assert listener.stdout is not None
        assert listener.stdout.readline() == "ready\n"
        code, output = doctor(hosts, settings, tmp_path / "run", ALL, "launch.port=29777")
    finally:
        for pid in hosts.pids("th1", listen):  # the process inside; killing the entrance spares it
            os.kill(pid, signal.SIGKILL)
        listener.wait()
    assert code == 1, output
    assert "th1: port: port 29777: Address already in use" in output


@pytest.mark.parametrize(
    ("hostfile", "setting", "message"),
    [
        ("th1 slots=1\nth1 slots=1\n", "", "th1 stands there twice"),
        ("th1 slots=1\nth2 slots=0\n", "", "must be NAME slots=N"),
        ("th1 slots=2\nth2 slots=1\n", "", "host th2 has slots=1, fewer than launch.processes=2"),
        (
            "th1 slots=2\nth2 slots=2\n",
            "parallel.expert=3",
            "parallel.expert=3 does not divide the 4 ranks",
        ),
    ],
)
def test_a_hostfile_that_does_not_fit_is_refused_before_any_host_is_asked(
    hosts: Hosts, settings: list[str], tmp_path: Path, hostfile: str, setting: str, message: str
) -> None:
    path = tmp_path / "hostfile"
    path.write_text(hostfile)
    given = ["launch.processes=2", f"launch.hostfile={path}", "schedule.batch_size=16"]
    code, output = doctor(hosts, settings, tmp_path / "run", *given, *filter(None, [setting]))
    assert code == 2, output
    assert message in output
