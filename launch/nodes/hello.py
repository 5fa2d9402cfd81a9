"""`python -m launch.nodes.hello`: what a node says of itself before a start, in a line of JSON."""

import json
import os
import socket
import sys
from contextlib import suppress

from launch.nodes.interface import address_of
from launch.nodes.node_ranks import free_port


def main() -> int:
    """Answer; the argument names the interface that ranks are to talk over, if one was chosen."""
    interface = sys.argv[1] if len(sys.argv) > 1 else ""
    # The address at which ssh found this node is one that others reach.
    address = os.environ.get("SSH_CONNECTION", "").split(" ")[2:3]
    found = address_of(interface) if interface else next(iter(address), None)
    port = None
    with suppress(OSError):
        port = free_port(found or "")
    print(json.dumps({"address": found, "port": port, "hostname": socket.gethostname()}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
