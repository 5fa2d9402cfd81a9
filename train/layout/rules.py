"""What combines with what: one table of rules, by which the start refuses and docs are written.

A rule names the settings that don't go together and says why; the nearest choice that works is
searched, so a message never proposes what another rule refuses.

A new rule is an entry in RULES; a setting that the search may change, an entry in CHOICES; a
feature's row and column in the documented table, one in `launch/pages/layout_page.py`'s FEATURES.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from enum import Enum
from itertools import combinations, product
from typing import Any

from data.config import DataConfig
from model.config import ModelConfig
from model.recompute import Recompute
from train.engine.stages import can_run, count_stages
from train.layout.parallel import ZERO_STAGES, Offload, ParallelConfig, PipelineSchedule
from train.optimizer.config import OptimizerConfig
from train.precision import PrecisionConfig
from train.schedule import ScheduleConfig

RANKS = "ranks"  # launch.processes, or the hosts' together
BATCH_SIZES = (
    "schedule.batch_size",
    "schedule.batch_ramp.start",
    "schedule.batch_ramp.increment",
)


@dataclass(slots=True, frozen=True, kw_only=True)
class Layout:
    """Everything that rules look at. Settings are named as on the command line."""

    parallel: ParallelConfig
    model: ModelConfig
    data: DataConfig
    optimizer: OptimizerConfig
    precision: PrecisionConfig
    schedule: ScheduleConfig
    ranks: int

    def value(self, setting: str) -> Any:
        """The value of a setting, such as `parallel.zero_stage`; None below a section of null."""
        found: Any = self
        for name in setting.split("."):
            found = getattr(found, name, None)
        return found

    def changed(self, values: Mapping[str, Any]) -> "Layout":
        """The same layout with some settings changed."""
        layout = self
        for setting, value in values.items():
            layout = _replace_at(layout, setting.split("."), value)
        return layout

    @property
    def num_replicas(self) -> int:
        """Ranks, or groups of them, that each read sequences of their own."""
        return max(self.ranks // (self.parallel.sequence * self.parallel.pipeline), 1)

    @property
    def num_experts(self) -> int:
        return self.model.moe.num_experts if self.model.moe is not None else 0


@dataclass(slots=True, frozen=True, kw_only=True)
class Rule:
    """Settings that don't go together. The first of them is the one to change, if that helps."""

    settings: tuple[str, ...]
    is_broken: Callable[[Layout], bool]
    #: Ends the sentence "a=1 and b=2 don't go together: ...", and stands in the docs.
    why: str
    #: Says the problem in words of its own, where those are better than the usual sentence.
    problem: Callable[[Layout], str] | None = None
    #: Says the way out in words of its own, where no choice of one setting is the obvious one.
    way_out: Callable[[Layout], str] | None = None


#: Settings that may be changed to find a way out, and what they may be. Nearest first.
CHOICES: dict[str, Callable[[Layout], Iterable[Any]]] = {
    "parallel.offload_optimizer": lambda _: Offload,
    "parallel.offload_parameters": lambda _: Offload,
    "parallel.recompute": lambda _: (Recompute.full, Recompute.none),
    "parallel.zero_stage": lambda layout: _nearest(ZERO_STAGES, layout.parallel.zero_stage),
    "parallel.expert": lambda layout: _nearest(divisors(layout.ranks), layout.parallel.expert),
    "parallel.sequence": lambda layout: _nearest(divisors(layout.ranks), layout.parallel.sequence),
    "parallel.pipeline": lambda layout: _nearest(divisors(layout.ranks), layout.parallel.pipeline),
    "parallel.pipeline_schedule": lambda _: PipelineSchedule,
    "parallel.pipeline_layers": lambda _: (None,),
    "parallel.overlap_comm": lambda _: (False,),
    "parallel.overlap_halves": lambda _: (False,),
}


def _whole_micro_batches(size: str) -> Rule:
    return Rule(
        settings=(size, "parallel.micro_batch_size", RANKS),
        is_broken=lambda layout: (
            _is_used(layout, size) and layout.value(size) % per_pass(layout) != 0
        ),
        why="a global batch is whole micro-batches on every rank",
        problem=lambda layout: (
            f"{size}={layout.value(size)} is not divisible by parallel.micro_batch_size="
            f"{layout.parallel.micro_batch_size} times {_describe_replicas(layout)}"
        ),
        way_out=lambda layout: f"a multiple of {per_pass(layout)} or a smaller micro-batch",
    )


def _needs_path(offload: str) -> Rule:
    return Rule(
        settings=(offload, "parallel.nvme_path"),
        is_broken=lambda layout: (
            layout.value(offload) is Offload.nvme and not layout.parallel.nvme_path
        ),
        why="the disk must be named",
        way_out=lambda _: f"a folder on a fast disk of each node, or {offload}=cpu",
    )


def _key_heads(layout: Layout) -> str:
    """The setting that says how many heads keys and values have: no more ranks can share them."""
    grouped = "model.attention.num_kv_heads"
    return "model.attention.num_heads" if layout.value(grouped) is None else grouped


def _describe_undivided(layout: Layout, divisor: str, setting: str) -> str:
    one, other = (describe_value(name, layout.value(name)) for name in (divisor, setting))
    return f"{one} does not divide {other}"


RULES: tuple[Rule, ...] = (
    Rule(
        settings=("parallel.expert", RANKS),
        is_broken=lambda layout: layout.ranks % layout.parallel.expert != 0,
        why="the experts are spread over groups of equally many ranks",
        problem=lambda layout: (
            f"parallel.expert={layout.parallel.expert} does not divide the {layout.ranks} ranks"
        ),
        way_out=lambda layout: f"one of {divisors(layout.ranks)} or another number of ranks",
    ),
    Rule(
        settings=("parallel.expert", "model.moe"),
        is_broken=lambda layout: layout.parallel.expert > 1 and layout.model.moe is None,
        why="a dense model has no experts to spread",
        problem=lambda layout: (
            f"parallel.expert={layout.parallel.expert}, but model.moe=null has no experts"
        ),
    ),
    Rule(
        settings=("parallel.expert", "model.moe.num_experts"),
        is_broken=lambda layout: layout.num_experts % layout.parallel.expert != 0,
        why="every rank of a group holds equally many experts",
        problem=lambda layout: (
            f"model.moe.num_experts={layout.num_experts} is not divisible by "
            f"parallel.expert={layout.parallel.expert}"
        ),
        way_out=lambda layout: (
            "parallel.expert from "
            f"{[d for d in divisors(layout.ranks) if layout.num_experts % d == 0]}"
        ),
    ),
    Rule(
        settings=("parallel.overlap_halves", "parallel.expert"),
        is_broken=lambda layout: layout.parallel.overlap_halves and layout.parallel.expert == 1,
        why="where a rank has all experts no rows travel that the other half could hide",
    ),
    Rule(
        settings=("parallel.micro_batch_size", "parallel.overlap_halves"),
        is_broken=lambda layout: (
            layout.parallel.overlap_halves and layout.parallel.micro_batch_size % 2 != 0
        ),
        why="the halves have equally many sequences",
        way_out=lambda layout: (
            f"parallel.micro_batch_size={layout.parallel.micro_batch_size + 1} or another even "
            "number, or parallel.overlap_halves=false"
        ),
    ),
    Rule(
        settings=("parallel.overlap_halves", "model.moe.max_tokens_per_chunk"),
        is_broken=lambda layout: (
            layout.parallel.overlap_halves and layout.value("model.moe.max_tokens_per_chunk") == 1
        ),
        why="rows of both halves are at the experts at once, each half's at most half the limit",
    ),
    Rule(
        settings=("parallel.sequence", RANKS),
        is_broken=lambda layout: layout.ranks % layout.parallel.sequence != 0,
        why="every sequence is spread over equally many ranks",
        problem=lambda layout: (
            f"parallel.sequence={layout.parallel.sequence} does not divide the {layout.ranks} ranks"
        ),
    ),
    Rule(
        settings=("parallel.sequence", "model.attention.num_heads"),
        is_broken=lambda layout: layout.value(_key_heads(layout)) % layout.parallel.sequence != 0,
        why="attention runs over whole sequences, each rank on equally many heads (of keys and "
        "values: num_kv_heads, where the attention has that)",
        problem=lambda layout: _describe_undivided(layout, "parallel.sequence", _key_heads(layout)),
    ),
    Rule(
        settings=("parallel.sequence", "data.seq_len"),
        is_broken=lambda layout: layout.data.seq_len % layout.parallel.sequence != 0,
        why="every rank holds an equal part of each sequence",
        problem=lambda layout: _describe_undivided(layout, "parallel.sequence", "data.seq_len"),
    ),
    Rule(
        settings=("parallel.recompute", "parallel.zero_stage"),
        is_broken=lambda layout: (
            layout.parallel.recompute is Recompute.selective and layout.parallel.zero_stage == 3
        ),
        why="norms and projections would run again in the midst of the backward pass, where ZeRO 3 "
        "has let go of their weights; full gathers them with the block",
    ),
    Rule(
        settings=("parallel.zero_stage", "model.moe.max_tokens_per_chunk", "parallel.expert"),
        is_broken=lambda layout: (
            layout.parallel.zero_stage == 3
            and layout.value("model.moe.max_tokens_per_chunk") is not None
            and 1 < layout.parallel.expert < layout.ranks
        ),
        why="groups of ranks with the same experts would gather their weights once per chunk, but "
        "not take equally many chunks, and wait for each other for ever",
    ),
    Rule(
        settings=("parallel.zero_stage", "parallel.offload_optimizer"),
        is_broken=lambda layout: (
            layout.parallel.offload_optimizer is not Offload.none
            and layout.parallel.zero_stage == 0
        ),
        why="ZeRO 0 keeps masters and moments beside the weights",
    ),
    Rule(
        settings=("parallel.zero_stage", "parallel.offload_parameters"),
        is_broken=lambda layout: (
            layout.parallel.offload_parameters is not Offload.none
            and layout.parallel.zero_stage < 3
        ),
        why="below ZeRO 3 the accelerator holds all weights at all times",
    ),
    Rule(
        settings=("parallel.zero_stage", "parallel.offload_optimizer"),
        is_broken=lambda layout: (
            layout.parallel.offload_optimizer is Offload.nvme and layout.parallel.zero_stage < 3
        ),
        why="ZeRO 3's masters go to the disk one by one; views that DeepSpeed keeps of those of "
        "ZeRO 1 and 2 would hold them in host memory",
    ),
    _needs_path("parallel.offload_optimizer"),
    _needs_path("parallel.offload_parameters"),
    Rule(
        settings=("parallel.zero_stage", "optimizer.kind"),
        is_broken=lambda layout: (
            layout.parallel.zero_stage == 3 and layout.optimizer.kind == "muon"
        ),
        why="Muon needs whole matrices, and stage 3 cuts each of them over all ranks",
    ),
    Rule(
        settings=("parallel.offload_optimizer", "optimizer.kind"),
        is_broken=lambda layout: (
            layout.parallel.offload_optimizer is not Offload.none
            and layout.optimizer.kind == "muon"
        ),
        why="Muon's products and the exchange of cut matrices need the accelerator",
    ),
    Rule(
        settings=("parallel.pipeline", RANKS),
        is_broken=lambda layout: layout.ranks % layout.parallel.pipeline != 0,
        why="every stage is held by equally many ranks",
        problem=lambda layout: (
            f"parallel.pipeline={layout.parallel.pipeline} does not divide the {layout.ranks} ranks"
        ),
    ),
    Rule(
        settings=("parallel.sequence", "parallel.pipeline"),
        is_broken=lambda layout: layout.parallel.sequence > 1 and layout.parallel.pipeline > 1,
        why="a stage takes whole sequences",
    ),
    Rule(
        settings=("parallel.expert", "parallel.pipeline"),
        is_broken=lambda layout: (
            layout.ranks // layout.parallel.pipeline % layout.parallel.expert != 0
        ),
        why="a layer's experts are spread over the ranks of its stage",
        problem=lambda layout: (
            f"parallel.expert={layout.parallel.expert} does not divide the "
            f"{layout.ranks // layout.parallel.pipeline} ranks of a stage of "
            f"parallel.pipeline={layout.parallel.pipeline}"
        ),
    ),
    Rule(
        settings=("parallel.zero_stage", "parallel.pipeline"),
        is_broken=lambda layout: layout.parallel.pipeline > 1 and layout.parallel.zero_stage != 1,
        why="a pipeline's gradients are complete only after its last micro-batch, while ZeRO 2 and "
        "3 cut them up after each; ZeRO 0 keeps no account of stages",
    ),
    Rule(
        settings=("parallel.overlap_comm", "parallel.pipeline"),
        is_broken=lambda layout: layout.parallel.pipeline > 1 and layout.parallel.overlap_comm,
        why="a pipeline's gradients are reduced after its last micro-batch",
    ),
    Rule(
        settings=("parallel.pipeline", "parallel.pipeline_schedule", "model.num_layers"),
        is_broken=lambda layout: count_stages(layout.parallel) > layout.model.num_layers,
        why="every stage has a block; all schedules but one_f_one_b have two stages per rank",
    ),
    Rule(
        settings=("parallel.pipeline_layers", "parallel.pipeline", "model.num_layers"),
        is_broken=lambda layout: (
            (layers := layout.parallel.pipeline_layers) is not None
            and (len(layers), sum(layers))
            != (count_stages(layout.parallel), layout.model.num_layers)
        ),
        why="each stage's blocks are given, and together they are the model's",
        problem=lambda layout: (
            f"parallel.pipeline_layers={layout.parallel.pipeline_layers} must be "
            f"{count_stages(layout.parallel)} numbers (one for each stage) that add up to "
            f"model.num_layers={layout.model.num_layers}"
        ),
    ),
    Rule(
        settings=("parallel.offload_optimizer", "parallel.pipeline"),
        is_broken=lambda layout: (
            layout.parallel.pipeline > 1 and layout.parallel.offload_optimizer is not Offload.none
        ),
        why="DeepSpeed sends gradients to the host as single backward passes end",
    ),
    *(_whole_micro_batches(size) for size in BATCH_SIZES),
    Rule(
        settings=("parallel.pipeline_schedule", "parallel.pipeline", "schedule.batch_size"),
        is_broken=lambda layout: _refused_micro_batches(layout) is not None,
        why="dualpipev needs as many micro-batches as stages, interleaved and zero_bubble rounds "
        "of equally many",
        problem=lambda layout: (
            f"parallel.pipeline_schedule={layout.parallel.pipeline_schedule} can't put "
            f"{_refused_micro_batches(layout)} micro-batches (of a batch of that many times "
            f"{per_pass(layout)} sequences) through parallel.pipeline={layout.parallel.pipeline}"
        ),
    ),
)


def check_layout(layout: Layout) -> None:
    """Refuse, with a ValueError naming the settings and the nearest choice that works."""
    for rule in RULES:
        if rule.is_broken(layout):
            raise ValueError(f"{describe_problem(layout, rule)}; {describe_way_out(layout, rule)}")


def broken_rules(layout: Layout) -> list[Rule]:
    """Every rule that the layout breaks."""
    return [rule for rule in RULES if rule.is_broken(layout)]


def find_way_out(layout: Layout, rule: Rule) -> dict[str, Any] | None:
    """The settings to change, with their new values: as few as possible, each as near as possible.

    What comes back breaks no rule. None where no change of the rule's settings, and of the ZeRO
    stage with them, leads to that.
    """
    settings = list(dict.fromkeys((*rule.settings, "parallel.zero_stage")))
    changeable = [setting for setting in settings if setting in CHOICES]
    for count in range(1, len(changeable) + 1):
        for chosen in combinations(changeable, count):
            for values in product(*(CHOICES[setting](layout) for setting in chosen)):
                change = dict(zip(chosen, values, strict=True))
                if not broken_rules(layout.changed(change)):
                    return change
    return None


def describe_problem(layout: Layout, rule: Rule) -> str:
    if rule.problem is not None:
        return rule.problem(layout)
    named = " and ".join(describe_value(name, layout.value(name)) for name in rule.settings)
    return f"{named} don't go together: {rule.why}"


def describe_way_out(layout: Layout, rule: Rule) -> str:
    if rule.way_out is not None:
        return f"choose {rule.way_out(layout)}"
    change = find_way_out(layout, rule)
    if change is None:
        return f"change {' or '.join(rule.settings)}"
    return f"choose {' and '.join(describe_value(name, value) for name, value in change.items())}"


def describe_value(setting: str, value: Any) -> str:
    """As it stands on a command line."""
    if setting == RANKS:
        return f"{value} ranks"
    if isinstance(value, Enum):
        value = value.value
    if isinstance(value, bool) or value is None:
        value = {True: "true", False: "false", None: "null"}[value]
    return f"{setting}={value}"


def per_pass(layout: Layout) -> int:
    """Sequences that all ranks take in one forward pass."""
    return layout.parallel.micro_batch_size * layout.num_replicas


def _describe_replicas(layout: Layout) -> str:
    if layout.num_replicas == layout.ranks:
        return f"{layout.ranks} ranks"
    return f"{layout.num_replicas} replicas of {layout.ranks // layout.num_replicas} ranks"


def _refused_micro_batches(layout: Layout) -> int | None:
    """A number of micro-batches that some step has and the pipeline's schedule can't take."""
    if layout.parallel.pipeline == 1:
        return None
    ramp, last = layout.schedule.batch_ramp, layout.schedule.batch_size
    sizes = [last] if ramp.start is None else [*range(ramp.start, last, ramp.increment), last]
    counts = [size // per_pass(layout) for size in sizes]
    return next((count for count in counts if not can_run(layout.parallel, count)), None)


def divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def _is_used(layout: Layout, size: str) -> bool:
    """Whether the schedule has that batch size; a ramp without a start is none."""
    return size == "schedule.batch_size" or layout.schedule.batch_ramp.start is not None


def _nearest(choices: Iterable[int], value: int) -> Iterator[int]:
    yield from sorted((c for c in choices if c != value), key=lambda choice: abs(choice - value))


def _replace_at(node: Any, path: list[str], value: Any) -> Any:
    name, *rest = path
    if rest:
        value = _replace_at(getattr(node, name), rest, value)
    return replace(node, **{name: value})
