"""`... launch.nodes.bound MODULE ARGS`: becomes `python -m MODULE ARGS`, ends with its parent.

Whoever is started through this module gets SIGTERM from the kernel when its parent is gone, by
kill -9 too, so that a run never trains on unattended.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


def become(module: str, arguments: list[str]) -> None:
    """Replace this process by `python -m MODULE`, bound to the parent; never returns."""
    # The wish outlives exec. Where there is no prctl (not Linux) only the binding is missing.
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    os.execv(sys.executable, [sys.executable, "-u", "-m", module, *arguments])  # noqa: S606


if __name__ == "__main__":
    become(sys.argv[1], sys.argv[2:])
