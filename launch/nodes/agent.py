"""`python -m launch.nodes.agent`: starts a node's ranks, watches them, never leaves them alone.

The launcher speaks through standard input: one line with the order, then a word now and then:
`alive`, `stop` (save and end), `kill`. The agent answers on standard output: what follows MARK in a
line is an event as JSON, all else are the ranks' own words.

Where the launcher ends (standard input closes) the ranks save and end; where it falls silent (a cut
link) they are killed: cut off, they can't finish a step, and the launcher starts them elsewhere.
"""

import contextlib
import json
import os
import queue
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil

from launch.nodes.interface import interface_towards
from launch.nodes.node_ranks import NodeRanks, killing_signal, rank_environment, start_ranks
from launch.nodes.order import RUN_VARIABLE, Order, decode
from train.watch.stall import ATTEMPT_VARIABLE

MARK = "@thrifty "
HEARTBEAT_SECONDS = 2.0
POLL_SECONDS = 0.2
CLOSED = ""  # what a closed standard input reads as


def main() -> int:
    """Obey one order to its end."""
    words: queue.Queue[str] = queue.Queue()
    order = decode(sys.stdin.readline())
    os.environ |= order.environment
    os.environ |= {RUN_VARIABLE: order.run_id, ATTEMPT_VARIABLE: str(order.attempt)}
    threading.Thread(target=_listen, args=(words,), daemon=True).start()
    swept = sweep(order.run_id, order.attempt)
    if swept:
        tell("swept", processes=swept)
    ranks = NodeRanks(
        start_ranks(Path(order.run_dir), order.world, _environment(order)), Path(order.run_dir)
    )
    tell("started", pid=os.getpid())
    _watch(order, ranks, words)
    code = ranks.process.returncode
    number = killing_signal(code)
    tell("ended", code=code, signal=number.name if number is not None else None)
    return 0


def tell(event: str, **values: Any) -> None:
    """One event to the launcher, in one write; a launcher that is gone hears nothing."""
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.write(f"{MARK}{json.dumps({'event': event, **values})}\n")
        sys.stdout.flush()


def sweep(run_id: str, attempt: int) -> int:
    """Kill what earlier attempts of this launch left on this node; how many processes that were."""
    count = 0
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            environment = process.environ()
            if process.pid == os.getpid() or environment.get(RUN_VARIABLE) != run_id:
                continue
            if environment.get(ATTEMPT_VARIABLE) != str(attempt):
                process.kill()
                count += 1
    return count


def _watch(order: Order, ranks: NodeRanks, words: "queue.Queue[str]") -> None:
    """Until the ranks have ended: pass words on, say that the node lives, notice silence."""
    heard = told = time.monotonic()
    deadline: float | None = None  # by which ranks that were asked to stop are killed
    is_stopping = False
    while ranks.process.poll() is None:
        now = time.monotonic()
        try:
            word = words.get(timeout=POLL_SECONDS).strip() or "gone"
            heard = now
        except queue.Empty:
            word = "silence" if now - heard > order.lost_after_seconds else ""
        if word == "kill" or (word == "silence" and not is_stopping):
            if word == "silence":
                tell("alone")
            ranks.kill()
        elif word in ("stop", "gone") and not is_stopping:
            is_stopping, deadline = True, now + order.grace_seconds
            ranks.stop()
        if deadline is not None and now > deadline:
            ranks.kill()
        if now - told > HEARTBEAT_SECONDS:
            tell("alive")
            told = now
    if is_stopping:
        ranks.end_orphans()
    else:
        ranks.kill()  # one has died: the others of this node have nothing to wait for


def _environment(order: Order) -> dict[str, str]:
    cores = len(os.sched_getaffinity(0))
    return rank_environment(
        order.world,
        threads=order.threads or max(cores // order.processes, 1),
        is_explicit=order.threads is not None,
        interface=order.interface or interface_towards(order.address),
    )


def _listen(words: "queue.Queue[str]") -> None:
    for line in sys.stdin:
        words.put(line)
    words.put(CLOSED)


if __name__ == "__main__":
    sys.exit(main())
