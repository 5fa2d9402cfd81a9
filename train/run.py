"""A run's collaborators, and what the loop asks of them at intervals."""

import logging
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from data.batches import Batches
from data.config import Verify
from data.held_out import open_held_out
from data.prepared_corpus import bring_here, open_corpora, verify_copies
from data.retry import longest_silence
from data.training_data import TrainingData
from model.backends import choose_all, describe
from model.cost import count_parameters
from model.mla import MLAConfig
from model.whereabouts import HERE
from train.checkpoint.checkpoints import Checkpoints, OnError, SaveError
from train.checkpoint.manifest import Fragment, Measured
from train.checkpoint.resume import Resumption, rng_fragment
from train.checkpoint.saver import Saver
from train.checkpoint.snapshot import Snapshot
from train.code_version import code_version
from train.config import RunConfig, describe_config
from train.ema import EMA
from train.engine.engine import Engine
from train.evaluation import evaluate
from train.hardware import peak_memory
from train.journal import Journal, open_journal, read_records
from train.layout.placement import describe_placement, draw_grid
from train.meters import Meters
from train.profile.profiler import Profiler
from train.ranks import Ranks
from train.read import DataError
from train.schedule import batch_size, learning_rate
from train.watch.agreement import check_agreement
from train.watch.drift import DriftMonitor
from train.watch.shard_agreement import agree_on_shards
from train.watch.watchdog import Watchdog

log = logging.getLogger(__name__)


class Run:
    """Engine, corpus, checkpoints and progress of one run, resumed where its folder says.

    Raises:
        ValueError: Corpus or checkpoint do not fit the config.
    """

    def __init__(self, config: RunConfig, ranks: Ranks) -> None:
        self.config = config
        self.ranks = ranks
        self.run_dir = Path(config.run_dir)
        corpora = open_corpora(config.data)
        # Nodes may have disks of their own, each with copies of what lies behind a URL.
        if ranks.is_first_of_node:
            verify_copies(corpora, config.data.verify)
        bring_here(corpora)
        agree_on_shards(corpora, ranks)
        # The first rank reads the whole corpus once to check it; the others trust its word.
        trusting = replace(config.data, verify=Verify.fast)
        data = config.data if ranks.is_first else trusting
        self.held_out = open_held_out(trusting, corpora=corpora)
        self.tokenizer = self.held_out.samples.tokenizer
        if self.tokenizer.size > config.model.vocab_size:
            raise ValueError(
                f"model.vocab_size={config.model.vocab_size} is smaller than the "
                f"{self.tokenizer.size} entries of the corpus' tokenizer; choose at least that many"
            )
        self.training = TrainingData(data, seed=config.seed, corpora=corpora)
        self.batches = Batches(
            self.training,
            rank=ranks.replica,
            world=ranks.num_replicas,
            micro_batch_size=config.parallel.micro_batch_size,
        )
        torch.manual_seed(config.seed)
        self.engine = Engine(config, ranks)
        self.ema = EMA(config.ema, self.engine.fragments())
        keeping = config.checkpoint
        self.checkpoints = Checkpoints(
            self.run_dir,
            keep=keeping.keep,
            keep_every=keeping.keep_every,
            keep_best=keeping.keep_best,
            verify=keeping.verify,
        )
        tokenizer = self.tokenizer.fingerprint
        resumption = Resumption(config, ranks, self.engine, tokenizer=tokenizer)
        self._beginning = resumption.begin(self.checkpoints, self.ema)
        self.progress = self._beginning.progress
        self.progress.data = self.training.enter(self.progress.data)
        self._note_held_out()
        self.drift = DriftMonitor(config.precision.drift, self.engine.model, self.progress, ranks)
        self.profiler = Profiler(
            config,
            engine=self.engine,
            batches=self.batches,
            ranks=ranks,
            step=self.progress.step,
        )
        self.meters = Meters(config, ranks)
        self.meters.restore(self._beginning.meters)
        self.saver = self._open_saver()
        self._evaluation: Measured | None = None
        self._saved_step: int | None = self.progress.step  # or the one that is being saved
        self._stall_seconds = 0.0
        self._versions = code_version()
        self._described = describe_config(config)  # once: it takes longer than a small state's copy
        silence = longest_silence(config.data.retry, is_remote=any(one.remote for one in corpora))
        self.watchdog = Watchdog(
            config.watchdog, run_dir=self.run_dir, ranks=ranks, data_seconds=silence
        )
        self._show_placement()
        self._show_backends()
        self.check_agreement()

    def open_journal(self) -> Journal:
        """The first rank's journal; the others keep a silent one."""
        if not self.ranks.is_first:
            return Journal([])
        return open_journal(
            self.config.logging,
            run_dir=self.run_dir,
            step=self.progress.step,
            steps=self.config.schedule.steps,
            about=self._described,
        )

    def is_due(self, every: int) -> bool:
        """Whether something that happens every so many steps, and at the end, happens now."""
        step = self.progress.step
        return step % every == 0 or step == self.config.schedule.steps

    def make_up_evaluation(self, journal: Journal) -> None:
        """Evaluate where an earlier start stopped because it could not read the held-out text.

        Raises:
            DataError: It still can't be read.
        """
        step, is_due = self.progress.step, self.is_due(self.config.evaluation.every)
        if step == 0 or not is_due or self._beginning.is_evaluated:
            return
        records = read_records(self.run_dir, event="evaluation") if self.ranks.is_first else []
        if not self.ranks.any(any(record["step"] == step for record in records)):
            self.evaluate(journal)

    @HERE.doing("evaluation")
    def evaluate(self, journal: Journal) -> None:
        """Measure the validation split and write it down.

        Raises:
            DataError: It can't be read; the run is saved.
        """
        start = time.perf_counter()
        self.engine.model.eval()
        try:
            evaluation = evaluate(
                self.engine.forward,
                self.held_out,
                ranks=self.ranks,
                micro_batch_size=self.config.parallel.micro_batch_size,
                max_sequences=self.config.evaluation.max_sequences,
            )
        except DataError:
            self.save(journal, is_last=True)
            raise
        self._evaluation = Measured(self.progress.step, evaluation.loss)
        self._write(journal, "evaluation", start, evaluation._asdict())

    @HERE.doing("checkpoint")
    def save(self, journal: Journal, *, is_last: bool) -> None:
        """Write a checkpoint of this step, unless there is one; beside training if so configured.

        Raises:
            SaveError: This save or the one before it failed, and the config says to stop then, or
                this is the last one, with which the work since the one before would be lost.
        """
        start = time.perf_counter()
        stops = self.config.checkpoint.on_error is OnError.stop
        if self.saver.step is not None:
            self._finish_save(journal, must_succeed=stops and not is_last)
        if self._saved_step == self.progress.step:
            return
        self.check_agreement()
        self._saved_step = self.progress.step
        self.saver.start(self.progress.step, self._state(), self._describe())
        self._stall_seconds = time.perf_counter() - start
        if is_last or not self.config.checkpoint.asynchronous:
            self._finish_save(journal, must_succeed=stops or is_last)
        self.meters.pause()

    def check_save(self, journal: Journal) -> None:
        """Take note of a save that has ended since it was started; on all ranks at one step.

        Raises:
            SaveError: It failed, and the config says to stop then.
        """
        if self.saver.step is not None and self.ranks.any(self.saver.has_ended()):
            stops = self.config.checkpoint.on_error is OnError.stop
            self._finish_save(journal, must_succeed=stops)

    def check_drift(self, journal: Journal) -> None:
        """Write down how far FP8 was off, where that was compared, and what has left it."""
        step, config = self.progress.step, self.config.precision
        for drift in self.drift.judge(self.progress):
            record = {"step": step, "layer": drift.layer, "drift": drift.difference}
            journal.write({"event": "drift", **record})
            if self.drift.is_too_far(drift):
                journal.write({"event": "fallback", **record})
                log.warning(
                    "step %d: the output of %s is off by %.3g in FP8, more than "
                    "precision.drift.limit=%s; from now on it computes in %s",
                    *(step, drift.layer, drift.difference, config.drift.limit, config.dtype.value),
                )

    def check_agreement(self) -> None:
        """Compare with the other ranks what all must have alike.

        Raises:
            DisagreementError: Ranks disagree.
        """
        check_agreement(self.engine, self.progress, self._described, self.ranks)

    def _note_held_out(self) -> None:
        """Say so where evaluations are no longer of the text that they were of so far."""
        before, now = self.progress.held_out, self.held_out.fingerprint
        if before not in ("", now) and self.ranks.is_first:
            log.warning(
                "the held-out text is another one than before (%s, was %s): evaluations up to step "
                "%d and after it can't be compared",
                *(now[:12], before[:12], self.progress.step),
            )
        self.progress.held_out = now

    def _show_backends(self) -> None:
        """Which implementation each operation takes, printed by the first rank."""
        precision, model = self.config.precision, self.config.model
        choices = choose_all(
            self.ranks.device,
            precision.dtype.torch,
            is_fp8=precision.fp8,
            has_experts=model.moe is not None,
            has_split_heads=isinstance(model.attention, MLAConfig),
            widths=() if model.moe is None else (model.dim, model.moe.expert_dim),
        )
        if self.ranks.is_first:
            log.info("operations:\n%s", describe(choices))

    def _show_placement(self) -> None:
        """Who sits where, printed by the first rank; nothing if it is alone."""
        seats = self.ranks.gather(self.engine.seat)
        if self.ranks.count == 1:
            return
        log.info("ranks:\n%s", draw_grid(seats))
        moe = self.config.model.moe
        if moe is not None:
            groups, top = moe.router.num_groups, moe.router.top_groups
            for line in describe_placement(seats, num_groups=groups, top_groups=top):
                log.warning("%s", line)

    def _finish_save(self, journal: Journal, *, must_succeed: bool) -> None:
        """Wait for the save in flight, and write it down."""
        try:
            saved = self.saver.finish()
        except SaveError as error:
            self._saved_step = None
            if must_succeed:
                raise
            log.warning("%s; the run goes on (checkpoint.on_error=proceed)", error)
            return
        journal.write(
            {
                "event": "checkpoint",
                "step": saved.written.step,
                "path": str(saved.written.path),
                "bytes": saved.written.num_bytes,
                "seconds": self._stall_seconds,
                "write_seconds": saved.seconds,
            }
        )

    def _state(self) -> Iterator[Fragment]:
        yield from self.engine.fragments()
        yield from self.ema.fragments()
        yield rng_fragment(self.ranks.rank)

    def _describe(self) -> dict[str, Any]:
        """What the manifest says besides what lies where."""
        step, schedule = self.progress.step, self.config.schedule
        evaluation = self._evaluation
        return {
            "progress": asdict(self.progress),
            "tokens": self.progress.targets,
            "schedule": {
                "learning_rate": learning_rate(schedule, step - 1) if step else 0.0,
                "batch_size": batch_size(schedule, step - 1) if step else 0,
            },
            "evaluation": evaluation if evaluation and evaluation.step == step else None,
            "loss": self.meters.loss,
            "meters": self.meters.state(),
            "parent": self._beginning.parent,
            "tokenizer": self.tokenizer.fingerprint,
            "layout": {
                "ranks": self.ranks.count,
                **self._described["parallel"],
            },
            "versions": self._versions,
            "config": self._described,
            "changes": self._beginning.changes,
        }

    def _open_saver(self) -> Saver:
        snapshot = None
        if self.config.checkpoint.asynchronous:
            snapshot = Snapshot(self._state())
            log.info(
                "asynchronous checkpoints: %s bytes of host memory on this rank, %s on all",
                f"{snapshot.num_bytes:,}",
                f"{sum(self.ranks.gather(snapshot.num_bytes)):,}",
            )
        return Saver(self.checkpoints, self.ranks, snapshot=snapshot)

    def summary(self) -> dict[str, float]:
        """What a table of several runs compares, earlier starts included; the first rank's."""
        memory = max(self.ranks.gather(peak_memory(self.ranks.device)))
        if not self.ranks.is_first:
            return {}
        parameters = count_parameters(self.config.model)
        rates = [r["tokens_per_second"] for r in read_records(self.run_dir, event="step")]
        summary: dict[str, float] = {
            "parameters_total": parameters.total + parameters.mtp,
            "parameters_active": parameters.active,
            "memory_bytes": memory,
            "tokens_per_second": median(rates) if rates else 0.0,
        }
        for evaluation in read_records(self.run_dir, event="evaluation")[-1:]:
            summary["validation_loss"] = evaluation["loss"]
            summary["bits_per_byte"] = evaluation["bits_per_byte"]
            summary["unigram_entropy"] = evaluation["unigram_entropy"]
        return summary

    def _write(self, journal: Journal, event: str, start: float, numbers: dict[str, Any]) -> None:
        seconds = time.perf_counter() - start
        journal.write({"event": event, "step": self.progress.step, **numbers, "seconds": seconds})
        self.meters.pause()
        self.watchdog.note_pause()
