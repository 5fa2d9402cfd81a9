"""Which network interface of this machine leads to another one, and at which address."""

import socket

import psutil


def address_towards(host: str) -> str:
    """This machine's address on the way to `host` (nothing is sent).

    Raises:
        OSError: The name does not resolve, or no route leads there.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, 9))
        address: str = probe.getsockname()[0]
        return address


def interface_of(address: str) -> str | None:
    """The interface that has the address."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(entry.address == address for entry in addresses):
            return name
    return None


def address_of(interface: str) -> str | None:
    """The first IPv4 address of an interface; None where there is no such interface or address."""
    for entry in psutil.net_if_addrs().get(interface, []):
        if entry.family == socket.AF_INET:
            return str(entry.address)
    return None


def interface_towards(host: str) -> str:
    """The interface that leads to `host`.

    Raises:
        OSError: None does.
    """
    name = interface_of(address_towards(host))
    if name is None:
        raise OSError(f"no interface has the address that leads to {host}")
    return name
