"""A shrunk config keeps everything that a layout could get wrong."""

from dataclasses import replace
from pathlib import Path

import pytest

from model.cost import count_parameters
from model.gqa import GQAConfig
from model.mla import MLAConfig
from tests.command import compose
from train.config import check_run
from train.layout.parallel import PipelineSchedule
from train.verify.shrink import NUM_RANKS, shrink, shrink_ranks

MODELS = sorted(path.stem for path in (Path(__file__).parents[2] / "configs/model").glob("*.yaml"))


@pytest.mark.parametrize("name", MODELS)
def test_every_preset_shrinks_to_a_small_model_of_the_same_kind(name: str) -> None:
    config = compose(f"model={name}", "launch.processes=4", "schedule.batch_size=32")
    small = shrink(config, num_ranks=4, new_num_ranks=4)
    check_run(small, num_ranks=4)
    old, new = config.model, small.model
    assert count_parameters(new).total < 1_000_000
    assert type(new) is type(old)
    assert (new.tie_embedding, new.mtp.depth) == (old.tie_embedding, old.mtp.depth)
    assert new.rope == old.rope
    assert (new.num_dense_layers > 0) == (old.num_dense_layers > 0)
    assert (new.moe is None) == (old.moe is None)
    match old.attention, new.attention:
        case MLAConfig() as before, MLAConfig() as after:
            assert (after.q_lora_rank is None) == (before.q_lora_rank is None)
        case GQAConfig() as before, GQAConfig() as after:
            assert after.qkv_bias == before.qkv_bias
            shared_by = before.num_heads // before.num_kv_heads
            assert after.num_heads == shared_by * after.num_kv_heads
    if old.moe is not None and new.moe is not None:
        assert new.moe.router == old.moe.router
        assert new.moe.top_k == old.moe.top_k < new.moe.num_experts
        assert new.moe.num_shared_experts == old.moe.num_shared_experts
        num_sparse = old.num_layers - old.num_dense_layers
        assert new.num_layers - new.num_dense_layers == min(num_sparse, 2)
    assert config.model.vocab_size == compose(f"model={name}").model.vocab_size, "was changed"


def test_the_layout_and_accumulation_stay() -> None:
    config = compose("model=v3", "parallel=expert", "launch.processes=8", "schedule.batch_size=640")
    config.parallel = replace(config.parallel, micro_batch_size=4)
    small = shrink(config, num_ranks=8, new_num_ranks=8)
    assert small.parallel.expert == 8
    assert small.model.moe is not None
    assert small.model.moe.num_experts % 8 == 0
    assert small.schedule.batch_size == 2 * small.parallel.micro_batch_size * 8


@pytest.mark.parametrize("schedule", PipelineSchedule)
def test_a_pipeline_keeps_a_block_and_a_micro_batch_for_every_stage(
    schedule: PipelineSchedule,
) -> None:
    config = compose("model=v3", "launch.processes=8", "schedule.batch_size=640")
    config.parallel = replace(
        config.parallel, pipeline=4, expert=2, pipeline_schedule=schedule, micro_batch_size=4
    )
    small = shrink(config, num_ranks=8, new_num_ranks=8)
    check_run(small, num_ranks=8)
    assert small.model.num_layers == max(3, 4 * schedule.parts_per_rank)
    assert small.schedule.batch_size == 2 * 2 * 4 * schedule.parts_per_rank


@pytest.mark.parametrize(
    ("num_ranks", "expert", "sequence", "expected"),
    [
        (8, 8, 1, (8, 8)),
        (64, 8, 1, (4, 8)),
        (64, 2, 1, (2, 8)),
        (32, 32, 2, (8, 8)),
        (12, 3, 1, (3, 6)),
    ],
)
def test_many_ranks_become_few_and_keep_two_replicas_of_the_experts_if_they_can(
    num_ranks: int, expert: int, sequence: int, expected: tuple[int, int]
) -> None:
    parallel = replace(compose().parallel, expert=expert, sequence=sequence)
    small, new_num_ranks = shrink_ranks(parallel, num_ranks)
    assert (small.expert, new_num_ranks) == expected
    assert new_num_ranks <= NUM_RANKS
    assert new_num_ranks % small.expert == 0
    assert parallel.expert == expert, "was changed"
