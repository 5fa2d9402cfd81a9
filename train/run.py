"""A run's collaborators, and what the loop asks of them at intervals."""

import logging
import time
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from omegaconf import OmegaConf

from data.batches import Batches
from data.config import Verify, find_folder
from data.manifest import Split, read_manifest
from data.samples import open_samples
from model.cost import count_parameters
from train.checkpoint import Checkpoints, OnError, SaveError, check_coverage, load
from train.config import RunConfig
from train.engine import Engine
from train.evaluation import evaluate
from train.hardware import peak_memory
from train.journal import Journal, open_journal, read_records
from train.manifest import Fragment, Manifest
from train.meters import Meters
from train.progress import Progress
from train.ranks import Ranks
from train.restore import check_start

log = logging.getLogger(__name__)

RNG = "rng/rank-{:05}"  # of each rank; the only state that is not logical


class Run:
    """Engine, corpus, checkpoints and progress of one run, resumed where its folder says.

    Raises:
        ValueError: Corpus or checkpoint do not fit the config.
    """

    def __init__(self, config: RunConfig, ranks: Ranks) -> None:
        self.config = config
        self.ranks = ranks
        self.run_dir = Path(config.run_dir)
        self.corpus = find_folder(config.data)
        self.tokenizer = read_manifest(self.corpus).tokenizer
        if self.tokenizer.size > config.model.vocab_size:
            raise ValueError(
                f"model.vocab_size={config.model.vocab_size} is smaller than the "
                f"{self.tokenizer.size} entries of the tokenizer in {self.corpus}; "
                "choose at least that many"
            )
        # The first rank reads the whole corpus once to check it; the others trust its word.
        trusting = replace(config.data, verify=Verify.fast)
        data = config.data if ranks.is_first else trusting
        self.validation = open_samples(trusting, Split.validation, seed=config.seed)
        self.batches = Batches(
            open_samples(data, Split.train, seed=config.seed),
            rank=ranks.replica,
            world=ranks.num_replicas,
            micro_batch_size=config.parallel.micro_batch_size,
        )
        torch.manual_seed(config.seed)
        self.engine = Engine(config, ranks)
        self.checkpoints = Checkpoints(self.run_dir, keep=config.checkpoint.keep)
        self.progress = self._resume()
        self.meters = Meters(config, ranks)
        self._saved_step = self.progress.step

    def open_journal(self) -> Journal:
        """The first rank's journal; the others keep a silent one."""
        if not self.ranks.is_first:
            return Journal([])
        return open_journal(
            self.config.logging,
            run_dir=self.run_dir,
            step=self.progress.step,
            steps=self.config.schedule.steps,
            about=describe_config(self.config),
        )

    def is_due(self, every: int) -> bool:
        """Whether something that happens every so many steps, and at the end, happens now."""
        step = self.progress.step
        return step % every == 0 or step == self.config.schedule.steps

    def evaluate(self, journal: Journal) -> None:
        """Measure the validation split and write it down."""
        start = time.perf_counter()
        self.engine.model.eval()
        evaluation = evaluate(
            self.engine.forward,
            self.validation,
            corpus=self.corpus,
            ranks=self.ranks,
            micro_batch_size=self.config.parallel.micro_batch_size,
            max_sequences=self.config.evaluation.max_sequences,
            are_documents_masked=self.config.data.mask_documents,
        )
        self._write(journal, "evaluation", start, evaluation._asdict())

    def save(self, journal: Journal, *, is_last: bool) -> None:
        """Write a checkpoint of this step, unless there is one.

        Raises:
            SaveError: It could not be written, and the config says to stop then, or it is the
                last one, with which the work since the one before would be lost.
        """
        if self._saved_step == self.progress.step:
            return
        start = time.perf_counter()
        rng = torch.get_rng_state()
        own = Fragment(RNG.format(self.ranks.rank), tuple(rng.shape), 0, rng)
        try:
            self.checkpoints.save(
                self.progress.step,
                [*self.engine.fragments(), own],
                ranks=self.ranks,
                about={
                    "progress": asdict(self.progress),
                    "tokenizer": self.tokenizer.fingerprint,
                    "layout": {"ranks": self.ranks.count, "expert": self.config.parallel.expert},
                    "versions": {name: version(name) for name in ("thrifty", "torch", "deepspeed")},
                    "config": describe_config(self.config),
                },
            )
        except SaveError as error:
            if is_last or self.config.checkpoint.on_error is OnError.stop:
                raise
            log.warning("%s; the run goes on (checkpoint.on_error=proceed)", error)
            return
        self._saved_step = self.progress.step
        path = str(self.checkpoints.path(self.progress.step))
        self._write(journal, "checkpoint", start, {"path": path})

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

    def _resume(self) -> Progress:
        manifest = self.checkpoints.find_newest(self.ranks)
        if manifest is None:
            if self.config.init_from is not None:
                self._take_weights(Path(self.config.init_from))
            return Progress()
        self._check_tokenizer(manifest, self.checkpoints)
        check_coverage(manifest, self.engine.tensors())
        folder = self.checkpoints.path(manifest.step)
        load(folder, manifest, [*self.engine.fragments(), *self.engine.buffers()])
        progress = Progress(**manifest.progress)
        self.engine.finish_load(updates=progress.updates)
        self._restore_rng(folder, manifest)
        log.info("resumed from %s at sample %d", folder, progress.samples)
        return progress

    def _take_weights(self, run_dir: Path) -> None:
        """Weights and routing biases of another run; everything else stays as new."""
        check_start(self.config)
        source = Checkpoints(run_dir, keep=1)
        manifest = source.find_newest(self.ranks)
        assert manifest is not None, "check_start has found one"
        self._check_tokenizer(manifest, source)
        tensors = self.engine.tensors().items()
        check_coverage(manifest, {name: shape for name, shape in tensors if is_of_model(name)})
        fragments = [fragment for fragment in self.engine.fragments() if is_of_model(fragment.name)]
        load(source.path(manifest.step), manifest, [*fragments, *self.engine.buffers()])
        self.engine.finish_load(updates=0)
        log.info("starting from the weights in %s", source.path(manifest.step))

    def _check_tokenizer(self, manifest: Manifest, source: Checkpoints) -> None:
        if manifest.tokenizer != self.tokenizer.fingerprint:
            raise ValueError(
                f"the checkpoint of step {manifest.step} in {source.folder} was trained "
                f"with another tokenizer than the one in {self.corpus}; use that run's corpus, or "
                "another run_dir"
            )

    def _restore_rng(self, folder: Path, manifest: Manifest) -> None:
        name = RNG.format(self.ranks.rank)
        if name in manifest.tensors:  # absent where there were fewer ranks
            state = torch.get_rng_state()
            load(folder, manifest, [Fragment(name, tuple(state.shape), 0, state)])
            torch.set_rng_state(state)

    def _write(self, journal: Journal, event: str, start: float, numbers: dict[str, Any]) -> None:
        seconds = time.perf_counter() - start
        journal.write({"event": event, "step": self.progress.step, **numbers, "seconds": seconds})
        self.meters.pause()


def is_of_model(name: str) -> bool:
    """Whether a logical tensor is the model's own, not the optimizer's."""
    return name.startswith(("weight/", "buffer/"))


def describe_config(config: RunConfig) -> dict[str, Any]:
    """The config as plain values."""
    values = OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True)
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}
