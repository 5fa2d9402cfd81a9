"""What every rank runs: `python -m train RUN_DIR`, where the launcher has put config.yaml."""

import argparse
import logging
import os
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch

from train.checkpoint.checkpoints import SaveError
from train.config import CONFIG_FILE, RunConfig, check_run, read_config
from train.engine.engine import join, leave
from train.interrupt import on_stop_signal
from train.loop import train
from train.outcome import ExitCode, Outcome, Status, write_outcome
from train.ranks import Ranks
from train.read import DataError
from train.verify.config import ObservedRun
from train.verify.rank import OBSERVED_FILE, observe_layout, observe_reference
from train.watch.agreement import DisagreementError

log = logging.getLogger("train")

TIMEOUT_MINUTES = 30.0
# A rank that dies breaks the others' collectives. DeepSpeed's launcher looks once a second and
# names the first death that it finds, so those that only noticed one linger.
LAUNCHER_POLL_SECONDS = 2.0


def main() -> ExitCode:
    """Train as one rank of the run, and tell how it ended."""
    parser = argparse.ArgumentParser(prog="python -m train", description=__doc__)
    parser.add_argument("run_dir", type=Path, help="folder with the run's resolved config.yaml")
    run_dir: Path = parser.parse_args().run_dir
    is_first = os.environ.get("RANK", "0") == "0"
    configure_logging(is_first=is_first)
    try:
        config = read_task(run_dir)
        check_run(config, num_ranks=int(os.environ.get("WORLD_SIZE", "1")))
        if isinstance(config, ObservedRun) and is_first:
            observe_reference(config)
        ranks = join(config.parallel, timeout_minutes=TIMEOUT_MINUTES)
        if isinstance(config, ObservedRun):
            outcome = observe_layout(config, ranks)
            finish(run_dir, outcome, ranks)
        else:
            with on_stop_signal(lambda: None):  # one that comes after the loop changes nothing
                outcome = train(config, ranks)
                finish(run_dir, outcome, ranks)
        return outcome.exit_code
    except (SaveError, DataError) as error:  # perhaps one node's disk: another start may help
        log.error("%s", error)
        report_failure(run_dir, str(error), at_fault=error.ranks)
        return ExitCode.FAILED
    except DisagreementError as error:
        log.error("%s", error)
        report_failure(run_dir, str(error))
        return ExitCode.FAILED
    except (ValueError, FloatingPointError) as error:
        log.error("%s", error)
        report_failure(run_dir, str(error), is_final=True)
        return ExitCode.FAILED
    except Exception as error:
        report_failure(run_dir, repr(error))
        if os.environ.get("WORLD_SIZE", "1") != "1":
            time.sleep(LAUNCHER_POLL_SECONDS)
        raise


def finish(run_dir: Path, outcome: Outcome, ranks: Ranks) -> None:
    """Leave the outcome for the launcher, then the other ranks."""
    if ranks.is_first:  # before others exit: their launcher may end this rank as soon as one has
        write_outcome(run_dir, outcome)
    ranks.wait()
    leave()


def read_task(run_dir: Path) -> RunConfig:
    """The run's config, or, in a folder of `thrifty verify`, what is to be observed."""
    if (run_dir / OBSERVED_FILE).is_file():
        return read_config(run_dir / OBSERVED_FILE, ObservedRun)
    return read_config(run_dir / CONFIG_FILE, RunConfig)


def report_failure(
    run_dir: Path, reason: str, *, is_final: bool = False, at_fault: Sequence[int] = ()
) -> None:
    """Leave the outcome for the launcher, unless another rank or a full disk forbids it."""
    outcome = Outcome(
        status=Status.failed, step=-1, reason=reason, is_final=is_final, at_fault=list(at_fault)
    )
    if os.environ.get("RANK", "0") == "0":
        with suppress(OSError):
            write_outcome(run_dir, outcome)


def configure_logging(*, is_first: bool) -> None:
    """Our log lines from the first rank, warnings and worse from DeepSpeed, all on stderr."""
    logging.basicConfig(
        level=logging.INFO if is_first else logging.ERROR,
        format="%(levelname).1s %(name)s: %(message)s",
        stream=sys.stderr,
        force=True,
    )
    for name in ("DeepSpeed", "torch", "filelock", "urllib3"):
        logging.getLogger(name).setLevel(logging.WARNING if is_first else logging.ERROR)


if __name__ == "__main__":
    if "OMP_NUM_THREADS" in os.environ:
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    sys.exit(main())
