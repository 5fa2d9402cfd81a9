"""A module asked a question: run as a process, here or elsewhere, it answers in a line of JSON."""

import json
import os
import subprocess
import sys
import time
from typing import Any

from launch.nodes.node_ranks import module_environment


def ask_here(module: str, text: str, *, seconds: float) -> dict[str, Any]:
    """The answer of `python -m MODULE` on this machine; see `ask`."""
    return ask([sys.executable, "-m", module], text, seconds=seconds)


def ask(command: list[str], text: str, *, seconds: float) -> dict[str, Any]:
    """The command's last line of JSON, fed with `text`; {"problem": why} where it gives none.

    `asked` and `answered` in it are this machine's clock before and after.

    Raises:
        OSError: The command can't be started.
    """
    asked = time.time()
    try:
        done = subprocess.run(  # noqa: S603 (a list, no shell)
            command,
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
    lines = done.stdout.strip().splitlines()
    try:
        answer = json.loads(lines[-1]) if lines else None
    except ValueError:
        answer = None
    if isinstance(answer, dict):
        return {**answer, "asked": asked, "answered": time.time()}
    words = done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}"
    return {"problem": words.splitlines()[-1]}
