"""`thrifty train profile=true`: where the time of a run's steps goes."""

import logging
import time
from contextlib import ExitStack
from pathlib import Path

import torch

from data.atomic_file import write_json
from data.batches import Batch, Batches
from train.config import RunConfig
from train.engine.engine import Engine
from train.hardware import measure_bandwidth, measure_matrix_rate, wait_for
from train.profile.attribution import attributed
from train.profile.report import (
    PROFILE_FILE,
    Floors,
    draw_table,
    faster_half,
    mean_of_labels,
    put_together,
)
from train.profile.steps import WARM_UPS, check_steps
from train.profile.stopwatch import Seconds, Stopwatch
from train.profile.work import Documents, measure_documents, work_of
from train.ranks import Ranks

log = logging.getLogger(__name__)


class Profiler:
    """Takes every other step of a run apart, after some that warm up, and writes down what it saw.

    The steps between are timed as a whole, so that what measuring costs shows. All of them compute
    what they would without it.

    Raises:
        ValueError: The run has too few steps left.
    """

    def __init__(
        self, config: RunConfig, *, engine: Engine, batches: Batches, ranks: Ranks, step: int
    ) -> None:
        """`step` is where the run stands."""
        self._is_on = config.profile
        if self._is_on:
            check_steps(config.profile_steps, step=step, last=config.schedule.steps)
        self._config, self._engine, self._batches, self._ranks = config, engine, batches, ranks
        self._stack = ExitStack()
        self._stopwatch = Stopwatch(ranks.device)
        self._step = 0  # of this start
        self._start = 0.0
        self._whole: list[float] = []  # seconds of the steps between
        self._apart: list[tuple[Seconds, Documents]] = []

    def start_step(self) -> None:
        """Before a step reads its samples."""
        if not self._is_on or self._step < WARM_UPS:
            return
        wait_for(self._ranks.device)
        if self._takes_apart:
            follow = attributed(self._engine, self._batches, self._stopwatch)
            self._stack.enter_context(follow)
            self._stopwatch.start()
        self._start = time.perf_counter()

    def end_step(self, batches: list[Batch]) -> None:
        """After a step over these micro-batches; after the last that is wanted, reports."""
        if not self._is_on:
            return
        if self._step >= WARM_UPS and self._takes_apart:
            self._apart.append((self._stopwatch.stop(), measure_documents(batches)))
            self._stack.close()
        elif self._step >= WARM_UPS:
            wait_for(self._ranks.device)
            self._whole.append(time.perf_counter() - self._start)
        self._step += 1
        if len(self._apart) == self._config.profile_steps:
            self._is_on = False
            self._report()

    @property
    def _takes_apart(self) -> bool:
        return (self._step - WARM_UPS) % 2 == 1

    def _report(self) -> None:
        """Say where the time went; all ranks meet here."""
        device, dtype = self._ranks.device, self._config.precision.dtype
        self._ranks.wait()  # those that share a machine find what each has when all compute
        floors = Floors(measure_matrix_rate(device, dtype.torch), measure_bandwidth(device))
        apart = faster_half(self._apart, key=lambda step: sum(step[0].values()))
        read = Documents(0, 0)  # in these very steps
        for _, documents_of_step in apart:
            read = read.plus(documents_of_step)
        means = mean_of_labels([seconds for seconds, _ in apart])
        own = (means, faster_half(self._whole, key=float), read, floors)
        seconds, whole, documents, of_ranks = zip(*self._ranks.gather(own), strict=True)
        if not self._ranks.is_first:
            return
        share = len(apart) * self._ranks.count * self._ranks.ranks_per_replica
        total = Documents(*(sum(column) / share for column in zip(*documents, strict=True)))
        profile = put_together(
            seconds,
            whole=[second for rank in whole for second in rank],
            work=work_of(self._config, total, num_ranks=self._ranks.count),
            floors=Floors(*(sum(column) / len(column) for column in zip(*of_ranks, strict=True))),
        )
        about = {
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "precision": "fp8" if self._config.precision.fp8 else dtype.value,
            "ranks": self._ranks.count,
            "tokens_per_rank": total.tokens,
            "steps": len(apart),
        }
        path = Path(self._config.run_dir) / PROFILE_FILE
        write_json(path, about | profile.record())
        log.info("where a step's time goes (%s):\n%s", path, draw_table(profile))
