"""`python -m launch.fitness.probe`: what a node is and has, as one line of JSON.

Standard input holds the questions as JSON: `run_dir`, `corpora`, `first` (the first node's address;
empty on the first node), `first_name` (by which ranks look for it; may be empty), `interface`,
`port`, `nonce` and `node`.
"""

import contextlib
import hashlib
import json
import os
import platform
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from data.mirror import is_remote
from launch.nodes.interface import address_of, interface_of, interface_towards

PACKAGES = ("thrifty", "torch", "deepspeed", "numpy", "safetensors", "datasets", "sentencepiece")
CODE = ("model", "data", "train", "launch")
URL_SECONDS = 20.0  # for an answer; what is left of the doctor's patience is for ssh and the rest
SHARED_MEMORY = "/dev/shm"  # noqa: S108 (looked at, not written to)


def main() -> int:
    """Answer the questions."""
    print(json.dumps(probe(json.load(sys.stdin))))
    return 0


def probe(asked: dict[str, Any]) -> dict[str, Any]:
    """Everything that can be told without importing torch: it takes a second, not five."""
    run_dir = Path(asked["run_dir"])
    written = _leave_mark(run_dir, asked["nonce"], asked["node"])
    gpus = list_gpus()
    return {
        "hostname": socket.gethostname(),
        "time": time.time(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
        "code": hash_code(),
        "gpus": [name for name, _ in gpus],
        "driver": gpus[0][1] if gpus else "none",
        "memory": psutil.virtual_memory().available,
        "disk": psutil.disk_usage(str(_existing(run_dir))).free,
        "shared_memory": _free(SHARED_MEMORY),
        "interface": _interface(asked),
        "resolved": resolve(asked["first_name"]) if asked["first_name"] else None,
        "port": _try_port(asked["port"]),
        "corpora": look_at_corpora(asked["corpora"])._asdict(),
        "written": written,
    }


def hash_code() -> str:
    """A digest of our own packages' source, so that nodes can tell whether they have the same."""
    digest = hashlib.sha256()
    root = Path(__file__).parents[2]
    for package in CODE:
        for path in sorted((root / package).rglob("*.py")):
            digest.update(path.relative_to(root).as_posix().encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def mark_path(run_dir: Path, nonce: str, node: int) -> Path:
    """The file by which the other nodes see that they share the folder."""
    return run_dir / f".doctor-{nonce}-{node:05}"


def _leave_mark(run_dir: Path, nonce: str, node: int) -> str:
    """Empty where the folder can be written; else why not."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        with mark_path(run_dir, nonce, node).open("wb") as file:
            file.write(bytes(1 << 16))  # an empty file fits on a full disk
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return f"{error.strerror}: {run_dir}"
    return ""


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "missing"


def list_gpus() -> list[tuple[str, str]]:
    """Name and driver of each GPU, as nvidia-smi lists them."""
    command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        listed = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)  # noqa: S603
        if listed.returncode == 0:
            lines = [line.rpartition(",") for line in listed.stdout.splitlines()]
            return [(name.strip(), driver.strip()) for name, _, driver in lines]
    return []


def resolve(name: str) -> dict[str, str]:
    """The address that a name has here, or why other nodes can't meet there."""
    try:
        address = str(socket.getaddrinfo(name, None, socket.AF_INET)[0][4][0])
    except OSError as error:
        return {"name": name, "address": "", "problem": f"{name}: {error.strerror or error}"}
    # Debian gives a host's own name 127.0.1.1: the first node would wait there alone.
    problem = f"{name} is {address} here, the loopback" if address.startswith("127.") else ""
    return {"name": name, "address": address, "problem": problem}


def _interface(asked: dict[str, Any]) -> dict[str, str | None]:
    """The interface that ranks will use and its address, or what is wrong with it."""
    name = asked["interface"]
    if name:
        address = address_of(name)
        problem = "" if address else f"there is no interface {name} with an address"
        return {"name": name, "address": address, "problem": problem}
    try:
        if asked["first"]:
            name = interface_towards(asked["first"])
            return {"name": name, "address": address_of(name), "problem": ""}
    except OSError as error:
        return {"name": None, "address": None, "problem": f"no way to {asked['first']}: {error}"}
    address = next(iter(os.environ.get("SSH_CONNECTION", "").split(" ")[2:3]), None)
    name = interface_of(address) if address else "lo"
    return {"name": name, "address": address, "problem": ""}


def _try_port(port: int | None) -> str:
    """Empty where nothing listens at the port; else who does, as far as the system tells."""
    if port is None:
        return ""
    try:
        with socket.socket() as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(("", port))
    except OSError as error:
        return f"port {port}: {error.strerror}"
    return ""


class Corpora(NamedTuple):
    """What a node can read of the run's corpora."""

    digest: str  # of all manifests, or `missing`
    unread: dict[str, str]  # folder or URL, and why it can't be read


def look_at_corpora(folders: list[str]) -> Corpora:
    """All are looked at together, so several URLs that don't answer cost no more than one."""
    if not folders:
        return Corpora("", {})
    with ThreadPoolExecutor(len(folders)) as threads:
        read = dict(zip(folders, threads.map(_read_manifest, folders), strict=True))
    unread = {folder: content for folder, content in read.items() if isinstance(content, str)}
    if unread:
        return Corpora("missing", unread)
    contents = [content for content in read.values() if isinstance(content, bytes)]
    return Corpora(hashlib.sha256(b"".join(contents)).hexdigest()[:12], {})


def _read_manifest(folder: str) -> bytes | str:
    """The content, or why it can't be read."""
    manifest = f"{folder}/manifest.json"
    try:
        if is_remote(folder):
            from data.remote_file import open_url  # brings numpy: only a URL waits for it

            return open_url(manifest, timeout=URL_SECONDS).read()
        return Path(manifest).read_bytes()
    except (OSError, ValueError) as error:
        return str(error)


def _existing(path: Path) -> Path:
    return next(parent for parent in (path, *path.absolute().parents) if parent.exists())


def _free(path: str) -> int | None:
    with contextlib.suppress(OSError):
        return psutil.disk_usage(path).free
    return None


if __name__ == "__main__":
    sys.exit(main())
