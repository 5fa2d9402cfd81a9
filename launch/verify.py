"""`thrifty verify`: whether a layout trains the same model as one process in plain PyTorch."""

import logging
import sys
import tempfile
import time
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

from rich.console import Console

from launch.run_folder import apply_overrides
from launch.settings.compose import Job, run_jobs, to_config, worst
from launch.settings.config import LaunchedRun, LocalLaunch, check_launched
from launch.start.local import run_ranks
from launch.verify_table import draw_differences
from train.config import (
    CONFIG_FILE,
    RunConfig,
    check_run,
    describe_config,
    read_config,
    write_config,
)
from train.config_diff import diff_values
from train.optimizer.config import MuonConfig
from train.optimizer.moments import Moments
from train.outcome import ExitCode, Outcome, Status
from train.precision import Dtype, PrecisionConfig
from train.verify.compare import Comparison, compare
from train.verify.config import ObservedRun, VerifyConfig, check_verify
from train.verify.diagnosis import diagnose
from train.verify.measure import build_measure
from train.verify.observation import read_observations
from train.verify.rank import OBSERVED_FILE, count_orders, layout_path, reference_path
from train.verify.shrink import shrink, shrink_ranks

WIDTH = 100  # also where the output is no terminal

log = logging.getLogger(__name__)


@dataclass(slots=True, kw_only=True)
class VerifiedRun(LaunchedRun):
    #: What is compared with the reference, and how closely.
    verify: VerifyConfig = field(default_factory=VerifyConfig)


def main() -> ExitCode:
    """Verify the layouts that the command line asks for."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    return worst(run_jobs(verify_job, schema=VerifiedRun))


def verify_job(job: Job) -> ExitCode:
    """Verify one layout: the command line's, or that of the run in a folder (`run_dir=RUN`).

    Raises:
        ValueError: The config can't be run, or the folder holds no run.
    """
    given = to_config(job.values, VerifiedRun)
    if any(override.startswith("run_dir=") for override in job.overrides):
        kept = read_config(Path(given.run_dir) / CONFIG_FILE, VerifiedRun)
        given = apply_overrides(kept, given, job.overrides)
    check_verify(given.verify)
    check_launched(given)
    config = settle(given)
    for change in diff_values(describe_config(given), describe_config(config)):
        log.info("for this check: %s", change)
    processes = config.launch.processes
    log.info("plain PyTorch in 1 process, then the layout on %d", processes)
    with tempfile.TemporaryDirectory(prefix="thrifty-verify-") as name:
        folder, start = Path(name), time.monotonic()
        outcome = observe(config, folder)
        if outcome.status is not Status.finished:
            log.error("%s: %s", outcome.status, outcome.reason)
            return outcome.exit_code
        return judge(read_comparison(folder, config), config, seconds=time.monotonic() - start)


def settle(given: VerifiedRun) -> VerifiedRun:
    """The config that is verified: in its precision, and shrunk unless it is to stay as it is."""
    parallel, num_ranks = given.parallel, given.launch.num_ranks
    dtype = given.verify.precision
    config = replace(given, precision=PrecisionConfig(dtype=dtype), init_from=None)
    if dtype is not Dtype.fp32:
        config.verify = replace(given.verify, steps=1)
    if given.optimizer.moments is Moments.int8:
        config.optimizer = replace(config.optimizer, moments=Moments.fp32)
    if isinstance(config.optimizer, MuonConfig):
        config.optimizer = replace(config.optimizer, iterate_in=Dtype.fp32)
    if not given.verify.full:
        parallel, num_ranks = shrink_ranks(given.parallel, given.launch.num_ranks)
        config = replace(config, parallel=parallel)
        config = shrink(config, num_ranks=given.launch.num_ranks, new_num_ranks=num_ranks)
    # All ranks run here, wherever the run itself goes.
    threads = given.launch.threads_per_process
    config.launch = LocalLaunch(processes=num_ranks, threads_per_process=threads)
    check_run(config, num_ranks=num_ranks)
    return config


def observe(config: VerifiedRun, folder: Path) -> Outcome:
    """The steps taken, plainly and by the layout's ranks; `folder` holds what they observed."""
    values = {field.name: getattr(config, field.name) for field in fields(RunConfig)}
    values["run_dir"] = str(folder)
    write_config(ObservedRun(**values, verify=config.verify), folder / OBSERVED_FILE)
    return run_ranks(folder, config.launch)


def read_comparison(folder: Path, config: VerifiedRun) -> Comparison:
    """What both observed, compared."""
    orders = range(count_orders(config))
    reference, *others = (read_observations([reference_path(folder, order)]) for order in orders)
    paths = [layout_path(folder, rank) for rank in range(config.launch.processes)]
    measure = build_measure(reference, others, config, tolerance=config.verify.tolerance)
    return compare(reference, read_observations(paths), measure=measure)


def judge(comparison: Comparison, config: VerifiedRun, *, seconds: float) -> ExitCode:
    """Print the table and the verdict."""
    Console(width=WIDTH).print(draw_differences(comparison.differences))
    diagnosis = diagnose(comparison, config)
    if diagnosis is not None:
        print(diagnosis)
        return ExitCode.FAILED
    number, closeness = len(comparison.differences), f"to {config.verify.tolerance:.0e}"
    if config.precision.dtype is not Dtype.fp32:
        closeness = "as far as BF16's rounding allows"
    print(f"VERIFIED: {number} tensors agree {closeness} ({seconds:.0f} s)")
    return ExitCode.FINISHED


if __name__ == "__main__":
    sys.exit(main())
