"""A config made small enough for a CPU, with everything in it that a layout could get wrong.

Widths and depths shrink; kinds, ratios of heads, groups of experts, shared experts, MTP's depth,
tied embeddings, and the layout stay. Every rule is a line of one of these functions, in the order
of the config; `thrifty verify` prints what they changed.
"""

import math
from copy import deepcopy
from typing import TypeVar

from model.config import ModelConfig
from model.gqa import GQAConfig
from model.mla import MLAConfig
from model.moe import MoEConfig
from model.router import GroupScore
from train.config import RunConfig
from train.engine.stages import can_run, count_stages
from train.layout.parallel import ParallelConfig

VOCAB_SIZE, DIM, SEQ_LEN = 512, 64, 32
LORA_RANK, HEAD_DIM, ROPE_DIM = 32, 16, 8
NUM_HEADS, NUM_KV_HEADS = 4, 2
NUM_DENSE, NUM_SPARSE = 1, 2  # layers
MICRO_BATCH_SIZE, ACCUMULATION, BUCKET_SIZE = 2, 2, 5_000
LEAST_LOSS_WEIGHT, CLIP_NORM = 0.01, 0.1
CHUNK = 48  # rows; a micro-batch has more, so that chunks happen
NUM_RANKS = 8

Config = TypeVar("Config", bound=RunConfig)


def shrink(config: Config, *, num_ranks: int, new_num_ranks: int) -> Config:
    """The config for `new_num_ranks`, shrunk; `num_ranks` is what it was meant for.

    `config.parallel` is already the one for the new number of ranks.
    """
    small = deepcopy(config)
    parallel = small.parallel
    shrink_model(small.model, parallel)
    per_rank = max(SEQ_LEN // parallel.sequence, config.model.mtp.depth + 1)
    small.data.seq_len = min(config.data.seq_len, per_rank * parallel.sequence)
    # Clipping takes part if the norm exceeds it, and a small model's does.
    small.optimizer.clip_norm = min(config.optimizer.clip_norm, CLIP_NORM)
    # Gradients are reduced in several buckets, as those of a large model are.
    parallel.reduce_bucket_size = min(config.parallel.reduce_bucket_size, BUCKET_SIZE)
    if parallel.zero_stage == 3:  # weights are cut and gathered, as those of a large model are
        parallel.keep_whole = 0
    parallel.pipeline_layers = None
    per_replica = config.schedule.batch_size // count_replicas(parallel, num_ranks)
    accumulation = per_replica // parallel.micro_batch_size
    parallel.micro_batch_size = min(parallel.micro_batch_size, MICRO_BATCH_SIZE)
    small.schedule.batch_size = (
        parallel.micro_batch_size
        * count_replicas(parallel, new_num_ranks)
        * shrink_accumulation(parallel, accumulation)
    )
    small.schedule.batch_ramp.start = None
    return small


def count_replicas(parallel: ParallelConfig, num_ranks: int) -> int:
    return num_ranks // (parallel.sequence * parallel.pipeline)


def shrink_accumulation(parallel: ParallelConfig, accumulation: int) -> int:
    """Two micro-batches per step, or one per stage of a pipeline; never more than before."""
    least = min(max(ACCUMULATION, parallel.pipeline > 1 and count_stages(parallel)), accumulation)
    while least < accumulation and not can_run(parallel, least):
        least += 1
    return max(least, 1)


def shrink_ranks(parallel: ParallelConfig, num_ranks: int) -> tuple[ParallelConfig, int]:
    """At most NUM_RANKS ranks where that is possible.

    Replicas of the experts are halved down to two, then the ranks that experts are spread over,
    then a pipeline's. The ranks of a sequence stay: their number must go with the heads.
    """
    small = deepcopy(parallel)
    while num_ranks > NUM_RANKS and num_ranks % (2 * small.sequence * small.pipeline) == 0:
        replicas = num_ranks // small.pipeline // small.expert
        if replicas <= 2 or replicas % 2:
            if small.expert > 2 and small.expert % 2 == 0:
                small.expert //= 2
            elif small.pipeline > 2 and small.pipeline % 2 == 0:
                small.pipeline //= 2
            else:
                break
        num_ranks //= 2
    return small, num_ranks


def shrink_model(model: ModelConfig, parallel: ParallelConfig) -> None:
    """Shrink in place."""
    factor = max(model.dim / DIM, 1.0)
    model.vocab_size = min(model.vocab_size, VOCAB_SIZE)
    model.dim = min(model.dim, DIM)
    stages = count_stages(parallel)  # each needs a block
    num_sparse = model.num_layers - model.num_dense_layers
    num_dense = min(model.num_dense_layers, NUM_DENSE if num_sparse else max(NUM_SPARSE, stages))
    num_sparse = min(num_sparse, max(NUM_SPARSE, stages - num_dense))
    model.num_dense_layers = min(model.num_dense_layers, max(num_dense, stages - num_sparse))
    model.num_layers = model.num_dense_layers + num_sparse
    model.ffn_dim = _divide(model.ffn_dim, factor)
    model.init_std *= math.sqrt(factor)  # products of narrower matrices keep their size
    match model.attention:
        case MLAConfig():
            _shrink_mla(model.attention, parallel.sequence)
        case GQAConfig():
            _shrink_gqa(model.attention, parallel.sequence)
    if model.moe is not None:
        _shrink_moe(model.moe, expert=parallel.expert, factor=factor)


def _shrink_mla(config: MLAConfig, sequence: int) -> None:
    config.num_heads = min(config.num_heads, max(NUM_HEADS, sequence))
    if config.q_lora_rank is not None:
        config.q_lora_rank = min(config.q_lora_rank, LORA_RANK)
    config.kv_lora_rank = min(config.kv_lora_rank, LORA_RANK)
    config.nope_head_dim = min(config.nope_head_dim, HEAD_DIM)
    config.rope_head_dim = min(config.rope_head_dim, ROPE_DIM)
    config.v_head_dim = min(config.v_head_dim, HEAD_DIM)


def _shrink_gqa(config: GQAConfig, sequence: int) -> None:
    shared_by = config.num_heads // config.num_kv_heads
    config.num_kv_heads = min(config.num_kv_heads, max(NUM_KV_HEADS, sequence))
    config.num_heads = config.num_kv_heads * shared_by
    config.head_dim = min(config.head_dim, HEAD_DIM)


def _shrink_moe(config: MoEConfig, *, expert: int, factor: float) -> None:
    """`top_k` and the groups stay; about half of the experts are visited by no token."""
    router = config.router
    in_group = 2 if router.num_groups > 1 and router.group_score is GroupScore.top2_sum else 1
    in_group = max(in_group, math.ceil(config.top_k / router.top_groups))
    unit = math.lcm(expert, router.num_groups)
    least = max(2 * config.top_k, in_group * router.num_groups)
    config.num_experts = min(config.num_experts, math.ceil(least / unit) * unit)
    config.expert_dim = _divide(config.expert_dim, factor)
    if config.max_tokens_per_chunk is not None:
        config.max_tokens_per_chunk = min(config.max_tokens_per_chunk, CHUNK)
    # A loss of weight 1e-4 could be wrong by half without a trace above the tolerance.
    for name in ("balance_loss", "device_balance_loss", "communication_balance_loss"):
        weight = getattr(config, f"{name}_weight")
        if weight > 0:
            setattr(config, f"{name}_weight", max(weight, LEAST_LOSS_WEIGHT))


def _divide(width: int, factor: float) -> int:
    """A width over the factor, as a multiple of 8."""
    return min(width, max(round(width / factor / 8), 1) * 8)
