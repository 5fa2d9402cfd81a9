"""How a run is laid out over ranks. What combines with what: `train/layout/rules.py`."""

from dataclasses import dataclass
from enum import StrEnum

from model.recompute import Recompute

ZERO_STAGES = (0, 1, 2, 3)


class Offload(StrEnum):
    """Where something waits that the accelerator does not need just now."""

    none = "none"
    cpu = "cpu"
    nvme = "nvme"


class PipelineSchedule(StrEnum):
    """In which order a rank works on its stages' micro-batches (torch.distributed.pipelining)."""

    one_f_one_b = "one_f_one_b"  # one stage per rank; a backward after each forward
    interleaved = "interleaved"  # two stages per rank, round and round
    zero_bubble = "zero_bubble"  # interleaved, gradients of weights put off to fill gaps
    zbv = "zbv"  # two stages per rank, down and up again: first and last meet on one rank
    dualpipev = "dualpipev"  # DeepSeek's DualPipe cut in half: placed as zbv

    @property
    def parts_per_rank(self) -> int:
        return 1 if self is PipelineSchedule.one_f_one_b else 2

    @property
    def is_v_shaped(self) -> bool:
        return self in (PipelineSchedule.zbv, PipelineSchedule.dualpipev)


@dataclass(slots=True, kw_only=True)
class ParallelConfig:
    #: Ranks over which each layer's routed experts are spread.
    expert: int = 1
    #: Ranks over which each sequence is spread, for long contexts (DeepSpeed Ulysses).
    sequence: int = 1
    #: Ranks over which the model's blocks are spread in stages.
    pipeline: int = 1
    #: Order of the stages' work: one_f_one_b, interleaved, zero_bubble, zbv or dualpipev.
    pipeline_schedule: PipelineSchedule = PipelineSchedule.one_f_one_b
    #: Blocks of each stage, in order; null balances the stages' FLOPs.
    pipeline_layers: list[int] | None = None
    #: What ranks share out instead of repeating it: 0 nothing, 1 optimizer states, 2 gradients as
    #: well, 3 weights as well (ZeRO).
    zero_stage: int = 1
    #: Sequences in one forward pass of one rank; accumulation follows from the batch size.
    micro_batch_size: int
    #: Whether each micro-batch is computed as two halves in turns: while one's rows travel to
    #: experts and back, the other is computed.
    overlap_halves: bool = False
    #: What the backward pass computes again to save memory: norms, up-projections, SwiGLU and the
    #: experts' inside (selective), or whole blocks (full).
    recompute: Recompute = Recompute.none
    #: Whether what blocks keep for the backward pass waits in host memory.
    offload_activations: bool = False
    #: Where masters and moments stand, and are updated by the CPU: none leaves them on the
    #: accelerator, cpu is host memory, nvme a disk.
    offload_optimizer: Offload = Offload.none
    #: Where ZeRO 3 keeps its part of the weights between their uses.
    offload_parameters: Offload = Offload.none
    #: Folder on a fast disk of each node, for what is offloaded to nvme. Nothing stays in it.
    nvme_path: str | None = None
    #: Gradient elements per reduction; larger is faster and takes more memory.
    reduce_bucket_size: int = 50_000_000
    #: Elements up to which ZeRO 3 keeps a parameter whole on every rank between its uses.
    keep_whole: int = 100_000
    #: Whether gradients are reduced beside the backward pass (ZeRO 1 to 3: GPUs only).
    overlap_comm: bool = False


def check_parallel(config: ParallelConfig) -> None:
    """Refuse, with a ValueError, values that no layout can have."""
    if config.zero_stage not in ZERO_STAGES:
        raise ValueError(
            f"parallel.zero_stage={config.zero_stage} does not exist; choose one of "
            f"{list(ZERO_STAGES)}"
        )
    for name in ("expert", "sequence", "pipeline", "micro_batch_size", "reduce_bucket_size"):
        if getattr(config, name) < 1:
            raise ValueError(f"parallel.{name}={getattr(config, name)} must be at least 1")
    if config.keep_whole < 0:
        raise ValueError(
            f"parallel.keep_whole={config.keep_whole} must not be negative; 0 keeps nothing whole"
        )
    if config.pipeline_layers is not None and min(config.pipeline_layers, default=0) < 1:
        raise ValueError(
            f"parallel.pipeline_layers={config.pipeline_layers} leaves a stage without a block; "
            "give each at least 1, or null to balance the stages by FLOPs"
        )
