"""This machine asked as if it were a node: the same module in a process of its own, without ssh."""

import os
import subprocess
import sys
from typing import Any

from launch.node_ranks import module_environment
from launch.ssh import read_answer


def ask_here(module: str, text: str, *, seconds: float) -> dict[str, Any]:
    """The module's last line of JSON; {"problem": why} where it gives none."""
    try:
        done = subprocess.run(  # noqa: S603 (a list, no shell)
            [sys.executable, "-m", module],
            input=text,
            env={**os.environ, **module_environment()},
            capture_output=True,
            text=True,
            errors="replace",
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {"problem": f"no answer within {seconds:.0f} s"}
    return read_answer(done)
