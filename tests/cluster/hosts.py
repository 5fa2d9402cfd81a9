"""Real hosts on one Linux machine: each has its own network, processes, mounts, name and sshd.

The hosts hang on a bridge that lies in a namespace of its own, so that nothing shows in the
machine's own network and no packet leaves it. All see the same file system, as a cluster with a
shared one does; /run, /dev/shm and whatever `private` names are each host's own. Needs root,
iproute2 and openssh-server.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Self

import psutil

TOOLS = ("ip", "tc", "bridge", "unshare", "nsenter", "ssh", "ssh-keygen", "/usr/sbin/sshd")
PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
TRIAL = "thrifty-trial"
SECONDS = 60.0  # a safety net: a host is up in one

INIT = """\
set -eu
hostname "$NAME"
mount -t proc proc /proc
mount -t tmpfs -o mode=755 run /run
mkdir -p /run/sshd
mount --bind "$FOLDER/hosts" /etc/hosts
mount --bind "$FOLDER/ssh_config" /etc/ssh/ssh_config
mount -t tmpfs -o mode=1777 shm /dev/shm
for folder in $PRIVATE; do mkdir -p "$folder"; mount -t tmpfs private "$folder"; done
/usr/sbin/sshd -D -e -f "$FOLDER/$NAME/sshd_config" &
touch "$FOLDER/$NAME/ready"
trap 'exit 0' TERM
while :; do sleep 3600 & wait $! || true; done
"""

SSH_CONFIG = """\
Host *
  IdentityFile {folder}/id
  IdentitiesOnly yes
  UserKnownHostsFile {folder}/known_hosts
  GlobalKnownHostsFile /dev/null
  StrictHostKeyChecking yes
  LogLevel ERROR
"""

SSHD_CONFIG = """\
Port 22
HostKey {folder}/{name}/host_key
AuthorizedKeysFile {folder}/authorized_keys
# The key may lie below a folder that others can write, such as /tmp.
StrictModes no
UsePAM no
PasswordAuthentication no
PermitRootLogin prohibit-password
PidFile none
UseDNS no
MaxStartups 100
ClientAliveInterval 5
ClientAliveCountMax 3
"""


def missing_tools() -> list[str]:
    """What this machine lacks (`make cluster-tools`) for hosts to be made."""
    missing = [tool for tool in TOOLS if shutil.which(tool, path=PATH) is None]
    if os.geteuid() != 0:
        return ["root", *missing]
    if not missing:  # in a container even root may lack the right
        trial = f"ip netns add {TRIAL} && ip netns del {TRIAL} && exec unshare --mount --uts --ipc "
        trial += "--net --pid --fork sh -c 'mount -t proc proc /proc && mount -t tmpfs trial /run'"
        done = subprocess.run(["sh", "-c", trial], capture_output=True, check=False)
        missing += ["the right to make namespaces"] * (done.returncode != 0)
    return missing


class Hosts:
    """While entered, `count` hosts named PREFIX1, PREFIX2, ... that reach each other by ssh."""

    def __init__(
        self, folder: Path, *, count: int, prefix: str = "th", private: Sequence[Path] = ()
    ) -> None:
        self.folder = folder
        self.names = [f"{prefix}{number}" for number in range(1, count + 1)]
        self.private = " ".join(map(str, private))
        self._switch = f"{prefix}-switch"
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._pids: dict[str, int] = {}

    def address(self, name: str) -> str:
        return f"10.77.0.{self.names.index(name) + 1}"

    def __enter__(self) -> Self:
        self._remove_namespaces()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._write_files()
        _run("ip", "netns", "add", self._switch)
        _run(
            "ip",
            "-n",
            self._switch,
            *["link", "add", "br0", "type", "bridge", "forward_delay", "0"],
        )
        _run("ip", "-n", self._switch, *["link", "set", "br0", "up"])
        for name in self.names:
            port = self._port(name)
            _run("ip", "netns", "add", name)
            peer = f"link add {port} type veth peer name eth0 netns {name}"
            _run("ip", "-n", self._switch, *peer.split())
            _run("ip", "-n", self._switch, *f"link set {port} master br0 up".split())
            _run("ip", "-n", name, *["link", "set", "lo", "up"])
            _run("ip", "-n", name, *f"addr add {self.address(name)}/24 dev eth0".split())
            _run("ip", "-n", name, *["link", "set", "eth0", "up"])
        for name in self.names:
            self.boot(name)
        return self

    def __exit__(self, *_: object) -> None:
        self._remove_namespaces()
        for process in self._processes.values():
            process.kill()
            process.wait()

    def boot(self, name: str) -> None:
        """Start a host's processes; its sshd answers afterwards."""
        ready = self.folder / name / "ready"
        ready.unlink(missing_ok=True)
        process = subprocess.Popen(
            [
                *("nsenter", f"--net=/run/netns/{name}", "--"),
                *("unshare", "--mount", "--uts", "--ipc", "--pid", "--fork", "--kill-child"),
                *("--propagation", "private", "bash", "-c", INIT),
            ],
            env={
                "PATH": PATH,
                "NAME": name,
                "FOLDER": str(self.folder),
                "PRIVATE": self.private,
            },
            stdin=subprocess.DEVNULL,
            stdout=(self.folder / name / "log").open("ab"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self._processes[name] = process
        _wait(ready.exists, f"{name} does not come up")
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        self._pids[name] = int(children[0])
        _wait(lambda: self._answers(name), f"the sshd of {name} does not answer")

    def command(self, name: str, *command: str) -> list[str]:
        """A command that runs inside a host, in the current folder and environment."""
        pid = str(self._pids[name])
        return [
            *("nsenter", "-t", pid, "-m", "-u", "-i", "-n", "-p", "--"),
            *("sh", "-c", 'cd "$0" && exec "$@"', os.getcwd(), *command),
        ]

    def run(self, name: str, *command: str) -> str:
        """What a command inside a host prints."""
        done = subprocess.run(
            self.command(name, *command), capture_output=True, text=True, check=True, timeout=60
        )
        return done.stdout

    def crash(self, name: str) -> None:
        """Kill every process of a host at once, as when its system dies."""
        os.kill(self._pids[name], signal.SIGKILL)
        self._processes[name].wait()

    def kill_all(self, name: str) -> None:
        """Kill every process of a host but its first one and its sshd: it goes on answering."""
        first = self._pids[name]
        for pid in set(self.pids(name)) - {self._processes[name].pid, first}:
            with suppress(psutil.Error):
                process = psutil.Process(pid)
                if (process.name(), process.ppid()) != ("sshd", first):
                    process.kill()

    def slow(self, name: str, rate: str) -> None:
        """Limit a host's link to a rate, both ways, until `hasten`."""
        for where, device in ((name, "eth0"), (self._switch, self._port(name))):
            limit = f"qdisc add dev {device} root tbf rate {rate} burst 64kb latency 100ms"
            _run("tc", "-n", where, *limit.split())

    def hasten(self, name: str) -> None:
        """End of `slow`."""
        for where, device in ((name, "eth0"), (self._switch, self._port(name))):
            _run("tc", "-n", where, *f"qdisc del dev {device} root".split())

    def cut(self, name: str) -> None:
        """The switch drops a host's packets from now on; its own link stays up."""
        _run("bridge", "-n", self._switch, *f"link set dev {self._port(name)} state 0".split())

    def heal(self, name: str) -> None:
        """End of `cut`."""
        _run("bridge", "-n", self._switch, *f"link set dev {self._port(name)} state 3".split())

    def pids(self, name: str, *words: str) -> list[int]:
        """Processes of a host, by their outer numbers, whose command line has all the words."""
        found = []
        for pid in _run("ip", "netns", "pids", name).split():
            with suppress(OSError):
                line = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
                is_entrance = line[0] == b"nsenter"  # the half outside of what `command` starts
                if not is_entrance and all(word.encode() in line for word in words):
                    found.append(int(pid))
        return found

    def _answers(self, name: str) -> bool:
        connect = f"exec 3<>/dev/tcp/{self.address(name)}/22"
        command = ["nsenter", f"--net=/run/netns/{name}", "bash", "-c", connect]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0

    def _port(self, name: str) -> str:
        return f"p-{name}"

    def _write_files(self) -> None:
        """One client key for all hosts, a host key for each, and strict checking between them."""
        _make_key(self.folder / "id")
        shutil.copy(self.folder / "id.pub", self.folder / "authorized_keys")
        known, hosts = [], ["127.0.0.1 localhost"]
        for name in self.names:
            (self.folder / name).mkdir(exist_ok=True)
            _make_key(self.folder / name / "host_key")
            key = (self.folder / name / "host_key.pub").read_text().split()[:2]
            known.append(f"{name},{self.address(name)} {' '.join(key)}")
            hosts.append(f"{self.address(name)} {name}")
            text = SSHD_CONFIG.format(folder=self.folder, name=name)
            (self.folder / name / "sshd_config").write_text(text)
        (self.folder / "known_hosts").write_text("\n".join([*known, ""]))
        (self.folder / "hosts").write_text("\n".join([*hosts, ""]))
        (self.folder / "ssh_config").write_text(SSH_CONFIG.format(folder=self.folder))

    def _remove_namespaces(self) -> None:
        """Also those that an earlier run was killed in."""
        names = {line.split()[0] for line in _run("ip", "netns", "list").splitlines() if line}
        for name in names & {self._switch, *self.names}:
            for pid in _run("ip", "netns", "pids", name).split():
                with suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            _run("ip", "netns", "del", name)


def _make_key(path: Path) -> None:
    path.unlink(missing_ok=True)
    _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(path))


def _run(*command: str) -> str:
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "PATH": PATH}, check=False
    )
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
    return done.stdout


def _wait(claim: Callable[[], bool], complaint: str) -> None:
    deadline = time.monotonic() + SECONDS
    while not claim():
        assert time.monotonic() < deadline, complaint
        time.sleep(0.02)


if __name__ == "__main__":
    if missing_tools():
        sys.exit(f"needs {', '.join(missing_tools())}")
