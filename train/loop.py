"""The training loop: the story of a run, from its folder to its last step."""

from contextlib import ExitStack

from model.whereabouts import HERE
from train.config import RunConfig
from train.interrupt import Interrupt, on_stop_signal
from train.outcome import Outcome, Status
from train.progress import refuse_divergence
from train.ranks import Ranks
from train.read import read, refuse_failures
from train.run import Run
from train.schedule import batch_size, learning_rate, model_at
from train.update import count_denominators, update
from train.watch.stall import DATA_WAIT


def train(config: RunConfig, ranks: Ranks) -> Outcome:
    """Run until the schedule's last step or a signal; all ranks return the same.

    Raises:
        ValueError: Corpus or checkpoint do not fit the config.
        SaveError: A checkpoint could not be written, and the config says to stop then.
        DataError: Samples could not be read; the run is saved.
        FloatingPointError: Too many steps in a row had gradients that were not finite.
    """
    interrupt = Interrupt()
    with ExitStack() as stack:
        stack.enter_context(on_stop_signal(interrupt.note))
        run = Run(config, ranks)
        stack.enter_context(run.saver)
        batches = stack.enter_context(run.batches)
        journal = stack.enter_context(run.open_journal())
        watchdog = stack.enter_context(run.watchdog)
        progress, schedule = run.progress, config.schedule
        run.make_up_evaluation(journal)

        while progress.step < schedule.steps:
            run.check_save(journal)
            run.profiler.start_step()
            size = batch_size(schedule, progress.step)
            with HERE.doing(DATA_WAIT, is_collective=False):
                micro_batches, position, failure = read(batches, progress.data, size)
            over = count_denominators(micro_batches, config.model, ranks)
            if ranks.any(interrupt.is_requested or failure is not None):
                run.save(journal, is_last=True)
                refuse_failures(failure, ranks)
                return Outcome(status=Status.interrupted, step=progress.step, reason="a signal")

            lr = learning_rate(schedule, progress.step)
            model = model_at(config.model, schedule, progress.step)
            run.drift.watch(progress)
            report = update(run.engine, micro_batches, over, config=model, lr=lr)
            progress.advance(position, over.targets, is_applied=report.is_applied)
            run.meters.count(size)
            if report.is_applied:
                run.ema.update(run.engine.fragments(), updates=progress.updates)
            run.profiler.end_step(micro_batches)
            watchdog.note_step(progress.step)

            if run.is_due(config.logging.every) or not report.is_applied:
                journal.write(run.meters.read(report, progress, lr=lr))
            run.check_drift(journal)
            refuse_divergence(progress, limit=config.optimizer.max_skipped_steps)
            if run.is_due(config.evaluation.every):
                run.evaluate(journal)
            if run.is_due(config.checkpoint.every):
                run.save(journal, is_last=progress.step == schedule.steps)
        return Outcome(status=Status.finished, step=progress.step, summary=run.summary())
