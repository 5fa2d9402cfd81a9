"""The ranks of a run on this machine alone, as `thrifty train` starts them: once, unsupervised."""

import signal
from pathlib import Path

from launch.nodes.node_ranks import (
    LOOPBACK,
    NodeRanks,
    World,
    free_port,
    killing_signal,
    rank_environment,
    start_ranks,
)
from launch.nodes.rank import log_path
from launch.settings.config import LaunchConfig, threads_of
from train.interrupt import on_stop_signal
from train.outcome import OUTCOME_FILE, Outcome, Status, read_outcome


def run_ranks(run_dir: Path, launch: LaunchConfig) -> Outcome:
    """The outcome of all ranks' run, after the last process of it has ended."""
    (run_dir / OUTCOME_FILE).unlink(missing_ok=True)
    for rank in range(1, launch.processes):
        log_path(run_dir, rank).unlink(missing_ok=True)
    world = World(["localhost"], 0, launch.processes, LOOPBACK, free_port())
    process = start_ranks(run_dir, world, local_environment(launch, world))
    ranks = NodeRanks(process, run_dir)
    with on_stop_signal(ranks.stop):
        process.wait()
        ranks.end_orphans()
    outcome = read_outcome(run_dir)
    if outcome is not None:
        if outcome.status is Status.failed:
            outcome.reason += last_words(run_dir, launch.processes, process.returncode)
        return outcome
    # SIGTERM kills a rank only as long as it has nothing to save.
    is_unbegun = ranks.num_signals and killing_signal(process.returncode) == signal.SIGTERM
    if ranks.is_stopped_early or is_unbegun:
        reason = "stopped before the ranks were ready"
        return Outcome(status=Status.interrupted, step=0, reason=reason)
    reason = "a rank died without leaving an outcome"
    reason += last_words(run_dir, launch.processes, process.returncode)
    return Outcome(status=Status.failed, step=-1, reason=reason)


def local_environment(launch: LaunchConfig, world: World) -> dict[str, str]:
    """The ranks' environment on this machine: they meet on the loopback interface, whatever the
    host's name resolves to."""
    return rank_environment(
        world,
        threads=threads_of(launch),
        is_explicit=launch.threads_per_process is not None,
        interface="lo",
    )


def last_words(run_dir: Path, num_ranks: int, returncode: int) -> str:
    """The signal that killed a rank, if one did, and which logs to read."""
    words = ""
    number = killing_signal(returncode)
    if number is not None:
        words += f"; a rank was killed by {number.name}"
        words += " (out of memory?)" if number == signal.SIGKILL else ""
    logs = [log_path(run_dir, rank) for rank in range(1, num_ranks)]
    spoken = [str(path) for path in logs if path.is_file() and path.stat().st_size]
    if spoken:
        words += f"; see above and {', '.join(spoken)}"
    return words
