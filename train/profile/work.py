"""What the parts of a step must at least do: FLOPs of products, bytes of what moves numbers."""

from statistics import mean
from typing import NamedTuple

from data.batches import Batch
from model.cost import (
    ATTENTION,
    EMBEDDING,
    FLOPS_PER_WEIGHT,
    HEAD,
    MTP,
    ROUTED,
    flops_by_component,
    parameters_by_component,
)
from train.config import RunConfig
from train.layout.memory import FP32, MOMENT_BYTES, shares_of
from train.profile.parts import Part

COMPONENT_OF = {
    Part.attention: ATTENTION,
    Part.dense: "dense feed-forward",
    Part.router: "router",
    Part.experts: ROUTED,
    Part.shared: "shared experts",
    Part.mtp: MTP,
    Part.head: HEAD,
}


class Work(NamedTuple):
    """Of a part in one step, forward and backward together; 0 where it is not known."""

    flops: float = 0.0  # recomputation does not count, as in MFU
    bytes: float = 0.0  # read and written at least, each number once


class Documents(NamedTuple):
    """What attention's work depends on, summed over documents."""

    tokens: float
    squares: float  # of the documents' lengths

    def plus(self, other: "Documents") -> "Documents":
        return Documents(*(one + another for one, another in zip(self, other, strict=True)))


def measure_documents(batches: list[Batch]) -> Documents:
    lengths = [length for batch in batches for length in batch.document_lengths]
    return Documents(sum(lengths), sum(length**2 for length in lengths))


def work_of(config: RunConfig, documents: Documents, *, num_ranks: int) -> dict[Part, Work]:
    """Every part's work on one rank; `documents` are those of a step, over the number of ranks."""
    work = {part: Work() for part in Part}
    for part, flops in _flops(config, documents).items():
        work[part] = Work(flops=flops)
    for part, count in _bytes(config, documents.tokens, num_ranks=num_ranks).items():
        work[part] = Work(bytes=count)
    return work


def _flops(config: RunConfig, documents: Documents) -> dict[Part, float]:
    model, tokens = config.model, documents.tokens
    # A token sees half of its document on average, so that long ones weigh more.
    of_token = flops_by_component(model, seq_len=documents.squares / tokens)
    flops = {part: tokens * of_token[component] for part, component in COMPONENT_OF.items()}
    moved = tokens * FLOPS_PER_WEIGHT * model.vocab_size * model.dim * model.mtp.depth
    flops[Part.mtp] -= moved  # what MTP needs the head for is timed as the head's
    flops[Part.head] += moved
    return flops


def _bytes(config: RunConfig, tokens: float, *, num_ranks: int) -> dict[Part, float]:
    model, size = config.model, config.precision.dtype.torch.itemsize
    parameters = parameters_by_component(model)
    row = tokens * model.dim * size
    # x in and y out; then x and dy in and dx out
    of_norms = 5 * size * tokens * parameters["norms"].total
    # rows out of the matrix; then their gradients in, and the matrix's out
    of_embedding = 3 * row + parameters[EMBEDDING].total * size / config.parallel.pipeline
    # tokens in, rows out, results in, sums out; then the same the other way, where the gradients
    # of the experts' weights need the results once more
    top_k = 0 if model.moe is None else model.moe.top_k
    of_dispatch = (model.num_layers - model.num_dense_layers) * row * (4 + 5 * top_k)
    of_updates = mean(
        _update_bytes(config, stage, num_ranks=num_ranks)
        for stage in range(config.parallel.pipeline)
    )
    return {
        Part.norms: of_norms,
        Part.embedding: of_embedding,
        Part.dispatch: of_dispatch if top_k else 0.0,
        Part.optimizer: of_updates,
    }


def _update_bytes(config: RunConfig, stage: int, *, num_ranks: int) -> float:
    """Gradient, master and moments in; master and moments out; of what one rank updates."""
    moment = MOMENT_BYTES[config.optimizer.moments]
    return sum(
        share.elements
        / (share.sharers if config.parallel.zero_stage else 1)
        * (FP32 + 2 * (FP32 + share.moments * moment))
        for share in shares_of(config, stage, num_ranks=num_ranks)
    )
