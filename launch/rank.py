"""`python -m launch.rank RUN_DIR`: becomes one rank of the run, `python -m train RUN_DIR`.

The first rank speaks to the terminal. What the others print (tracebacks, as a rule) goes to
RUN_DIR/logs/rank-00001.log and so on.
"""

import os
import sys
from pathlib import Path

from launch.bound import become


def log_path(run_dir: Path, rank: int) -> Path:
    return run_dir / "logs" / f"rank-{rank:05}.log"


def redirect_output(path: Path) -> None:
    """Append what this process prints, C libraries included, to a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())


if __name__ == "__main__":
    rank = int(os.environ.get("RANK", "0"))
    if rank > 0:
        redirect_output(log_path(Path(sys.argv[1]), rank))
    become("train", sys.argv[1:])
