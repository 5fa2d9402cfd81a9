"""`python -m bench`: every script of this folder, one after another."""

import subprocess
import sys
from pathlib import Path

# What runs, times or draws measurements is none itself.
RUNNERS = {
    *("__main__", "gpu_check", "one_process", "ranks", "rows", "timing"),
    *("balanced", "floors", "peer", "sizes"),
    *("grow_plot", "precision_plot", "profile_plot", "sweep_plot"),
}


def main() -> int:
    """The number of scripts that failed."""
    names = sorted(path.stem for path in Path(__file__).parent.glob("*.py"))
    failed = 0
    for name in names:
        if name in RUNNERS or name.startswith("_"):
            continue
        print(f"\n== bench.{name}", flush=True)
        failed += (
            subprocess.run([sys.executable, "-m", f"bench.{name}"], check=False).returncode != 0
        )
    return failed


if __name__ == "__main__":
    sys.exit(main())
