"""From a checkpoint into a run: what is checked, what is loaded, and where the run came from."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from data.config import list_sources
from train.checkpoint.checkpoints import Checkpoints, load
from train.checkpoint.coverage import check_coverage
from train.checkpoint.manifest import Fragment, Manifest, Origin, Parent
from train.checkpoint.restore import check_start
from train.config import RunConfig, describe_config
from train.config_diff import diff_values
from train.ema import EMA, ema_name, is_average, is_weight
from train.engine.engine import Engine
from train.optimizer.changed import check_algorithm
from train.progress import Progress, read_progress
from train.ranks import Ranks

log = logging.getLogger(__name__)

RNG = "rng/rank-{:05}"  # of each rank; the only state that is not logical


@dataclass(slots=True, kw_only=True)
class Beginning:
    """Where this start of a run begins."""

    progress: Progress = field(default_factory=Progress)
    parent: Parent | None = None
    is_evaluated: bool = False  # whether held-out text was read at this step
    meters: Mapping[str, float] = field(default_factory=dict)
    changes: dict[str, Any] = field(default_factory=dict)  # key: [old, new], since the parent


class Resumption:
    """Fills a new engine from the run's own checkpoint, or from another run's weights.

    `tokenizer` is the corpus' fingerprint: a checkpoint must have been trained with it.
    """

    def __init__(self, config: RunConfig, ranks: Ranks, engine: Engine, *, tokenizer: str) -> None:
        self.config = config
        self.ranks = ranks
        self.engine = engine
        self.tokenizer = tokenizer

    def begin(self, checkpoints: Checkpoints, ema: EMA) -> Beginning:
        """The run's newest whole checkpoint loaded; without one `init_from`'s weights, or new.

        Raises:
            ValueError: The checkpoint does not fit the config.
        """
        manifest = checkpoints.find_newest(self.ranks)
        if manifest is not None:
            beginning = self._continue(checkpoints, manifest)
        elif self.config.init_from is not None:
            beginning = self._take_weights(Path(self.config.init_from))
        else:
            return Beginning()
        self._fill_average(checkpoints, manifest, ema)
        return beginning

    def _continue(self, source: Checkpoints, manifest: Manifest) -> Beginning:
        self._check_tokenizer(manifest, source)
        wanted = self.engine.tensors()
        allowed = self.config.checkpoint.allow_missing
        check_algorithm(manifest, wanted, self.config.optimizer, allow_missing=allowed)
        missing = self._check_coverage(manifest, wanted)
        folder = source.path(manifest.step)
        fragments = [*self.engine.fragments(), *self.engine.buffers()]
        load(folder, manifest, [one for one in fragments if one.name not in missing])
        progress = read_progress(manifest.progress)
        self.engine.finish_load(updates=progress.updates)
        self._restore_rng(folder, manifest)
        log.info("resumed from %s at sample %d", folder, progress.samples)
        changes = diff_values(manifest.config, describe_config(self.config))
        return Beginning(
            progress=progress,
            parent=_parent(Origin.continued, source, manifest),
            is_evaluated=manifest.evaluation is not None,
            meters=manifest.meters,
            changes={change.key: [change.old, change.new] for change in changes},
        )

    def _take_weights(self, run_dir: Path) -> Beginning:
        """Weights and routing biases of another run; everything else stays as new."""
        check_start(self.config)
        source = Checkpoints(run_dir, verify=self.config.checkpoint.verify)
        manifest = source.find_newest(self.ranks)
        assert manifest is not None, "check_start has found one"
        self._check_tokenizer(manifest, source)
        tensors = self.engine.tensors().items()
        wanted = {name: shape for name, shape in tensors if is_of_model(name)}
        missing = self._check_coverage(manifest, wanted)
        fragments = [one for one in self.engine.fragments() if is_of_model(one.name)]
        fragments += self.engine.buffers()
        load(
            source.path(manifest.step),
            manifest,
            [one for one in fragments if one.name not in missing],
        )
        self.engine.finish_load(updates=0)
        log.info("starting from the weights in %s", source.path(manifest.step))
        return Beginning(parent=_parent(Origin.init_from, source, manifest))

    def _check_coverage(
        self, manifest: Manifest, wanted: Mapping[str, tuple[int, ...]]
    ) -> list[str]:
        missing = check_coverage(
            manifest,
            wanted,
            allow_missing=self.config.checkpoint.allow_missing,
            allow_surplus=self.config.checkpoint.allow_surplus,
        )
        if missing:
            log.warning(
                "the checkpoint of step %d lacks %s: as new (checkpoint.allow_missing)",
                manifest.step,
                ", ".join(missing),
            )
        return missing

    def _fill_average(self, source: Checkpoints, manifest: Manifest | None, ema: EMA) -> None:
        """The average goes on where it stood; with none there it begins from the weights."""
        ema.restart(self.engine.fragments())
        has_average = manifest is not None and any(map(is_average, manifest.tensors))
        if manifest is not None and has_average and ema.fragments():
            tensors = self.engine.tensors().items()
            wanted = {ema_name(name): shape for name, shape in tensors if is_weight(name)}
            missing = self._check_coverage(manifest, wanted)
            fragments = [one for one in ema.fragments() if one.name not in missing]
            load(source.path(manifest.step), manifest, fragments)

    def _check_tokenizer(self, manifest: Manifest, source: Checkpoints) -> None:
        if manifest.tokenizer != self.tokenizer:
            raise ValueError(
                f"the checkpoint of step {manifest.step} in {source.folder} was trained with "
                f"another tokenizer than the one in {list_sources(self.config.data)[0].folder}; "
                "use that run's corpus, or another run_dir"
            )

    def _restore_rng(self, folder: Path, manifest: Manifest) -> None:
        name = RNG.format(self.ranks.rank)
        if name in manifest.tensors:  # absent where there were fewer ranks
            state = torch.get_rng_state()
            load(folder, manifest, [Fragment(name, tuple(state.shape), 0, state)])
            torch.set_rng_state(state)


def rng_fragment(rank: int) -> Fragment:
    """This rank's state of torch's generator."""
    state = torch.get_rng_state()
    return Fragment(RNG.format(rank), tuple(state.shape), 0, state)


def is_of_model(name: str) -> bool:
    """Whether a logical tensor is the model's own, not the optimizer's."""
    return name.startswith(("weight/", "buffer/"))


def _parent(origin: Origin, source: Checkpoints, manifest: Manifest) -> Parent:
    return Parent(origin, str(source.folder.parent), manifest.step, manifest.hash)
