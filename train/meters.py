"""A step's numbers as a person and a plot want them."""

import time
from collections.abc import Mapping

from model.balance import max_violation
from model.config import ModelConfig
from model.cost import flops_per_token
from train.config import RunConfig
from train.hardware import peak_flops, peak_memory
from train.journal import Record
from train.progress import Progress
from train.ranks import Ranks
from train.update import BALANCE_LOSSES, StepReport


class Meters:
    """Turns reports into records; rates are those since the last reading."""

    def __init__(self, config: RunConfig, ranks: Ranks) -> None:
        self._model: ModelConfig = config.model
        self._seq_len = config.data.seq_len
        self._ranks = ranks
        self._flops_per_token = flops_per_token(config.model, seq_len=config.data.seq_len)
        self._peak = peak_flops(ranks.device, config.precision.dtype.torch) * ranks.count
        self._train_seconds = 0.0
        self.loss: float | None = None  # as it was last read
        self._sequences = 0
        self._since = self._counted = time.perf_counter()

    def state(self) -> dict[str, float]:
        """What a resumed run goes on counting from."""
        return {"train_seconds": self._train_seconds}

    def restore(self, state: Mapping[str, float]) -> None:
        """Go on from a checkpoint's `state()`; what it lacks starts at 0."""
        self._train_seconds = state.get("train_seconds", 0.0)

    def count(self, sequences: int) -> None:
        """Note that a step over so many sequences is done."""
        self._sequences += sequences
        now = time.perf_counter()
        self._train_seconds += now - self._counted
        self._counted = now

    def read(self, report: StepReport, progress: Progress, *, lr: float) -> Record:
        """The record of a step. Waits for the device; every rank must call it."""
        loss, *others = report.losses.tolist()
        self.loss = loss
        balance_losses = dict(zip(BALANCE_LOSSES, others, strict=False))
        mtp_losses = others[len(BALANCE_LOSSES) :]
        if self._model.moe is None or not self._model.moe.has_group_balance_losses:
            balance_losses = {"balance_loss": balance_losses["balance_loss"]}
        load = report.load.cpu()
        memory = max(self._ranks.gather(peak_memory(self._ranks.device)))
        seconds = time.perf_counter() - self._since
        tokens_per_second = self._sequences * self._seq_len / seconds
        flops = tokens_per_second * self._flops_per_token
        record: Record = {
            "event": "step",
            "step": progress.step,
            "loss": loss,
            **{f"mtp_loss_{k}": value for k, value in enumerate(mtp_losses, start=1)},
            **balance_losses,
            "grad_norm": report.grad_norm,
            "lr": lr,
            "tokens_per_second": tokens_per_second,
            "flops_per_second": flops,
            "mfu": flops / self._peak,
            "memory_bytes": memory,
            "train_seconds": self._train_seconds,
            "samples": progress.samples,
            "targets": progress.targets,
            "skipped": progress.skipped,
        }
        if len(load):
            violation = max_violation(load)
            record["max_vio"] = violation.mean().item()
            record["max_vio_per_layer"] = violation.tolist()
            record["dead_experts"] = int((load == 0).sum())
        self._restart()
        return record

    def pause(self) -> None:
        """Leave out of the rates what has happened since the last step (evaluation, saving)."""
        self._restart()

    def _restart(self) -> None:
        self._since = self._counted = time.perf_counter()
        self._sequences = 0
