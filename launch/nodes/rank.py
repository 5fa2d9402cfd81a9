"""`python -m launch.nodes.rank RUN_DIR`: becomes one rank of the run, `python -m train RUN_DIR`.

Whoever started it (DeepSpeed's launcher, torchrun, srun, mpirun) has said in the environment which
rank it is. The first rank speaks to the terminal. What the others print (tracebacks, as a rule)
goes to RUN_DIR/logs/rank-00001.log and so on.
"""

import os
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from launch.nodes.bound import become
from launch.nodes.interface import interface_towards
from launch.nodes.node_ranks import INTERFACE_VARIABLES
from train.watch.stall import ATTEMPT_VARIABLE

# Where starters that know nothing of torch say what torch wants to know.
NAMES = {
    "RANK": ("SLURM_PROCID", "OMPI_COMM_WORLD_RANK"),
    "WORLD_SIZE": ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE"),
    "LOCAL_RANK": ("SLURM_LOCALID", "OMPI_COMM_WORLD_LOCAL_RANK"),
    "LOCAL_WORLD_SIZE": ("SLURM_NTASKS_PER_NODE", "OMPI_COMM_WORLD_LOCAL_SIZE"),
}


def log_path(run_dir: Path, rank: int) -> Path:
    return run_dir / "logs" / f"rank-{rank:05}.log"


def name_rank(environment: Mapping[str, str]) -> dict[str, str]:
    """RANK and its like, for a process that srun or mpirun started; nothing where they are set.

    Slurm's variables stand in a batch job's environment too: one source must know them all.
    """
    if "RANK" in environment:
        return {}
    for place in range(2):
        found = {name: environment.get(theirs[place]) for name, theirs in NAMES.items()}
        if place == 0 and "OMPI_COMM_WORLD_RANK" in environment:
            continue
        known = {name: value for name, value in found.items() if value is not None}
        if "RANK" in known and "WORLD_SIZE" in known:
            return known
    return {}


def name_interface(environment: Mapping[str, str]) -> dict[str, str]:
    """The interface that leads to the first node, unless one was chosen: not whatever the host's
    own name resolves to."""
    address = environment.get("MASTER_ADDR", "")
    if not address or all(name in environment for name in INTERFACE_VARIABLES):
        return {}
    with suppress(OSError):
        interface = interface_towards(address)
        return {name: interface for name in INTERFACE_VARIABLES if name not in environment}
    return {}


def redirect_output(path: Path) -> None:
    """Append what this process prints, C libraries included, to a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        if ATTEMPT_VARIABLE in os.environ:
            file.write(f"--- start {os.environ[ATTEMPT_VARIABLE]}\n")
            file.flush()
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())


if __name__ == "__main__":
    os.environ |= name_rank(os.environ)
    os.environ |= name_interface(os.environ)
    rank = int(os.environ.get("RANK", "0"))
    if rank > 0:
        redirect_output(log_path(Path(sys.argv[1]), rank))
    become("train", sys.argv[1:])
