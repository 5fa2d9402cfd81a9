"""`python -m launch.nodes.signal_ranks RUN_DIR RUN_ID stop|kill`: reaches a launch's ranks here.

For launchers of others, which pass no signal on that would let ranks save: DeepSpeed's runner kills
pdsh and with it the ranks' standard output, mpirun allows a second.
"""

import json
import os
import sys
from contextlib import suppress
from pathlib import Path

import psutil

from launch.nodes.node_ranks import is_rank
from launch.nodes.order import RUN_VARIABLE


def main() -> int:
    """Signal them and tell how many there were, as a line of JSON."""
    run_dir, run_id, word = sys.argv[1:]
    print(json.dumps({"processes": signal_ranks(Path(run_dir), run_id, word)}))
    return 0


def signal_ranks(run_dir: Path, run_id: str, word: str) -> int:
    """`stop` asks the launch's ranks to save and end, `kill` ends all of its processes here."""
    count = 0
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if process.pid == os.getpid() or process.environ().get(RUN_VARIABLE) != run_id:
                continue
            if word == "kill":
                process.kill()
            elif is_rank(process, run_dir):
                process.terminate()
            else:
                continue
            count += 1
    return count


if __name__ == "__main__":
    sys.exit(main())
