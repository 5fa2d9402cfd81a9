"""The machines of a launch: their names, from a list or a hostfile, checked before any is asked."""

import re
from pathlib import Path
from typing import NamedTuple

# A label may be a name, an IPv4 address or a bracketless IPv6 one; a user may stand before it.
NAME = re.compile(r"^(?:[a-z_][a-z0-9_-]*@)?[A-Za-z0-9](?:[A-Za-z0-9.-]*[A-Za-z0-9])?$")


class Host(NamedTuple):
    name: str
    slots: int  # ranks that it has room for


def find_hosts(hosts: list[str], hostfile: str | None, *, processes: int) -> list[Host]:
    """The hosts in order of preference; where slots are not told, as many as `processes`.

    Raises:
        ValueError: A name is no host's, stands twice, or the file can't be read.
    """
    if hostfile is None:
        source = "launch.hosts"
        found = [_parse_entry(entry, processes) for entry in hosts]
    else:
        source = f"launch.hostfile={hostfile}"
        found = _read_hostfile(Path(hostfile), processes)
    names = [host.name for host in found]
    for name in names:
        if not NAME.match(name):
            raise ValueError(
                f"{source}: {name!r} is no host name; use letters, digits, dots and dashes, "
                "perhaps with user@ before them"
            )
        if names.count(name) > 1:
            raise ValueError(f"{source}: {name} stands there twice; give each host one entry")
    return found


def check_host_keys(hosts: list[str], hostfile: str | None) -> None:
    """Refuse, with a ValueError, two lists of hosts, or none."""
    if bool(hosts) == (hostfile is not None):
        given = "both are given" if hosts else "neither is given"
        raise ValueError(
            f"launch.hosts and launch.hostfile: {given}; name the nodes in one of them, such as "
            "launch.hosts=[node1,node2]"
        )


def _parse_entry(entry: str, processes: int) -> Host:
    name, colon, slots = entry.partition(":")
    if colon and not (slots.isdigit() and int(slots) > 0):
        raise ValueError(f"launch.hosts: {entry!r} must be NAME or NAME:SLOTS, such as node1:8")
    return Host(name, int(slots) if colon else processes)


def _read_hostfile(path: Path, processes: int) -> list[Host]:
    try:
        lines = path.expanduser().read_text().splitlines()
    except OSError as error:
        raise ValueError(
            f"launch.hostfile={path} can't be read ({error.strerror}); name an existing file"
        ) from error
    found = []
    for number, line in enumerate(lines, start=1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        settings = dict(word.partition("=")[::2] for word in words[1:])
        slots = settings.pop("slots", str(processes))
        if settings or not slots.isdigit() or int(slots) < 1:
            raise ValueError(
                f"launch.hostfile={path}, line {number}: {line.strip()!r} must be NAME slots=N"
            )
        found.append(Host(words[0], int(slots)))
    if not found:
        raise ValueError(
            f"launch.hostfile={path} names no host; write a line NAME slots=N for each"
        )
    return found
