"""`make gpu-check`: the GPU tests and the benchmarks on one CUDA device, written to gpu-check.md.

Needs a CUDA device and the installed dependencies; downloads nothing. Without a device it says so
and fails: nothing that was not measured is reported.
"""

import subprocess
import sys
from pathlib import Path

import torch

PAGE = Path("gpu-check.md")
NO_TESTS = 5  # pytest's exit code when it has selected none


def main() -> int:
    if not torch.cuda.is_available():
        print("gpu-check: torch sees no CUDA device; nothing was checked", file=sys.stderr)
        return 1
    parts = [f"# {torch.cuda.get_device_name()}, torch {torch.__version__}\n"]
    failures = 0
    for title, module, accepted in (
        ("Tests", ("pytest", "-q", "-m", "gpu"), {0, NO_TESTS}),
        ("Benchmarks", ("bench",), {0}),
    ):
        run = subprocess.run(
            [sys.executable, "-m", *module],
            check=False,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        print(run.stdout, flush=True)
        failures += run.returncode not in accepted
        parts.append(f"## {title} (exit code {run.returncode})\n\n```\n{run.stdout.strip()}\n```\n")
    PAGE.write_text("\n".join(parts))
    print(f"written: {PAGE}")
    return failures


if __name__ == "__main__":
    sys.exit(main())
