"""The steps as a run takes them: engine, update and all, in the layout that the config asks for."""

from collections.abc import Iterator

from data.batches import Batches
from data.position import Position
from train.checkpoint.manifest import Fragment
from train.config import RunConfig
from train.engine.engine import Engine
from train.engine.sharding import StepResult
from train.ranks import Ranks
from train.schedule import batch_size, model_at
from train.update import BALANCE_LOSSES, StepReport, count_denominators, update
from train.verify.forward_states import watch_forward
from train.verify.observation import (
    LOSS,
    NORM,
    Key,
    keep,
    keep_fragment,
    keep_load,
    keep_states,
)
from train.verify.random_samples import RandomSamples, random_biases


class WatchedEngine(Engine):
    """An engine that keeps the gradients which a step is about to use."""

    used: list[Fragment]

    def step(self, lr: float) -> StepResult:
        self.used = [fragment._replace(data=fragment.data.clone()) for fragment in self.gradients()]
        return super().step(lr)


def observe(config: RunConfig, ranks: Ranks, *, steps: int, lr: float) -> Iterator[Fragment]:
    """This rank's share of everything that is compared, of `steps` steps on random samples."""
    engine = WatchedEngine(config, ranks)
    random_biases(list(engine.buffers()), config.model)
    size, seq_len = config.parallel.micro_batch_size, config.data.seq_len
    part = seq_len // ranks.parts_per_sequence
    columns = range(ranks.sequence_part * part, (ranks.sequence_part + 1) * part)
    samples, across, position = RandomSamples(config), ranks.num_replicas, Position()
    with Batches(samples, rank=ranks.replica, world=across, micro_batch_size=size) as batches:
        for step in range(steps):
            count = batch_size(config.schedule, step)
            micro_batches, position = batches.take(position, count)
            model = model_at(config.model, config.schedule, step)
            over = count_denominators(micro_batches, model, ranks)
            with watch_forward(engine.model) as states:
                report = update(engine, micro_batches, over, config=model, lr=lr)
            starts = range(ranks.replica * size, count, across * size)
            rows = [range(start, start + size) for start in starts]
            yield from keep_states(step + 1, states, rows, columns, shape=(count, seq_len))
            if ranks.is_first:
                yield from _keep_report(step + 1, report, config)
            yield from (keep_fragment(step + 1, fragment) for fragment in engine.used)
            yield from (keep_fragment(step + 1, fragment) for fragment in engine.fragments())


def _keep_report(step: int, report: StepReport, config: RunConfig) -> Iterator[Fragment]:
    yield from keep_load(step, report.load, config.model)
    names = ["main loss", *(name.replace("_", " ") for name in BALANCE_LOSSES)]
    names += [f"MTP loss, depth {depth + 1}" for depth in range(config.model.mtp.depth)]
    for name, loss in zip(names, report.losses, strict=True):
        moe = config.model.moe
        is_unused = name in names[2:4] and not (moe and moe.has_group_balance_losses)
        if (moe is not None or "balance" not in name) and not is_unused:
            yield keep(Key(step, LOSS, name), loss[None])
    yield keep(Key(step, NORM, "global norm"), report.losses.new_tensor([report.grad_norm]))
