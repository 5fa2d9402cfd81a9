"""Sequence parallelism trains the same model as one rank that holds whole sequences."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from model.attention import attend
from model.config import GQAModelConfig, ModelConfig, MTPConfig
from model.gqa import GQAConfig
from model.recompute import Recompute
from tests.ranks import ranks
from tests.train.tiny import (
    moe_with_all_losses,
    random_batches,
    tiny_attention,
    tiny_model,
    tiny_run,
)
from tests.train.trained import (
    Trained,
    assert_same_records,
    assert_same_training,
    run_on,
    train_layout,
)
from train.config import check_run
from train.engine.engine import UlyssesSequences, join
from train.engine.sequences import cut
from train.layout.parallel import ParallelConfig


def four_heads() -> ModelConfig:
    """Latent attention with a head for each of four ranks, MTP two tokens ahead, all losses."""
    attention = tiny_attention(num_heads=4)
    moe = moe_with_all_losses()
    return tiny_model(attention=attention, moe=moe, mtp=MTPConfig(depth=2))


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return train_layout(tmp_path_factory.mktemp("reference"), 1, model=four_heads())


LAYOUTS = [
    pytest.param(2, {"sequence": 2, "expert": 2, "accumulation": 2}, id="2 ranks"),
    pytest.param(4, {"sequence": 4, "expert": 2, "zero_stage": 2}, id="4 ranks"),
    *(
        pytest.param(
            4,
            {"sequence": sequence, "expert": expert, "zero_stage": zero_stage, **more},
            marks=pytest.mark.slow,
        )
        for sequence in (2, 4)
        for expert in (1, 2, 4)
        for zero_stage in (0, 1, 2, 3)
        for more in ({"recompute": Recompute.full}, {"accumulation": 2})
    ),
]


@pytest.mark.parametrize(("num_ranks", "layout"), LAYOUTS)
def test_parts_of_sequences_train_the_same_model_as_whole_ones(
    tmp_path: Path, reference: Trained, num_ranks: int, layout: dict[str, Any]
) -> None:
    got = train_layout(tmp_path, num_ranks, model=four_heads(), **layout)
    assert_same_training(got, reference)


@ranks(2)
def check_documents_alone(widths: tuple[int, int], key_heads: int) -> None:
    """Documents of 7, 2, 12 and 3 tokens; the border of two parts lies in the third."""
    segments, seq_len = [7, 2, 12, 3], 24
    generator = torch.Generator().manual_seed(0)
    wholes = [
        torch.randn(1, seq_len, *shape, generator=generator, requires_grad=True)
        for shape in ((4, widths[0]), (key_heads, widths[0]), (key_heads, widths[1]))
    ]
    alone = [
        attend(*document, scale=0.3, segments=[document[0].shape[1]])
        for document in zip(*(whole.split(segments, dim=1) for whole in wholes), strict=True)
    ]
    wanted = torch.cat(alone, dim=1)
    upstream = torch.randn(wanted.shape, generator=generator)
    wanted_grads = torch.autograd.grad(wanted, wholes, upstream)

    join(ParallelConfig(sequence=2, micro_batch_size=1), timeout_minutes=5)
    rank, half = dist.get_rank(), seq_len // 2
    mine = slice(rank * half, (rank + 1) * half)
    parts = [whole[:, mine].detach().clone().requires_grad_() for whole in wholes]
    mixed = UlyssesSequences(dist.group.WORLD).attend(*parts, scale=0.3, segments=segments)
    grads = torch.autograd.grad(mixed, parts, upstream[:, mine])
    for got, expected in zip((mixed, *grads), (wanted, *wanted_grads), strict=True):
        assert (got - expected[:, mine]).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize(
    ("widths", "key_heads"), [((12, 8), 4), ((8, 8), 2)], ids=["latent", "grouped"]
)
def test_documents_across_parts_equal_each_document_alone(
    widths: tuple[int, int], key_heads: int
) -> None:
    check_documents_alone(widths, key_heads)


def grouped_heads() -> ModelConfig:
    """A dense model with two key-value heads, each shared by two query heads."""
    return GQAModelConfig(
        vocab_size=512,
        dim=32,
        num_layers=2,
        num_dense_layers=2,
        ffn_dim=48,
        init_std=0.05,
        tie_embedding=True,
        attention=GQAConfig(num_heads=4, num_kv_heads=2, head_dim=8, qkv_bias=True),
    )


def test_grouped_query_attention_keeps_query_heads_with_their_key_value_head(
    tmp_path: Path,
) -> None:
    one = train_layout(tmp_path, 1, model=grouped_heads())
    assert_same_training(train_layout(tmp_path, 2, model=grouped_heads(), sequence=2), one)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model": tiny_model()},
            r"parallel.sequence=4 does not divide model.attention.num_heads=2",
        ),
        ({"model": grouped_heads()}, r"parallel.sequence=4 does not divide .*num_kv_heads=2"),
        ({"seq_len": 18}, r"parallel.sequence=4 does not divide data.seq_len=18"),
        ({"num_ranks": 6}, r"parallel.sequence=4 does not divide the 6 ranks"),
    ],
)
def test_sequences_that_cannot_be_shared_are_refused_with_the_nearest_number_of_ranks(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    parallel = ParallelConfig(sequence=4, micro_batch_size=1)
    config = tiny_run(tmp_path, model=changes.get("model", four_heads()), parallel=parallel)
    config.schedule.batch_size = 12
    config.data.seq_len = changes.get("seq_len", config.data.seq_len)
    with pytest.raises(ValueError, match=rf"{message}; choose parallel.sequence=2"):
        check_run(config, num_ranks=changes.get("num_ranks", 4))


def test_a_part_ends_with_the_tokens_of_the_next_that_mtp_looks_ahead_to() -> None:
    (batch,) = random_batches(0, rank=0, num_ranks=1, micro_batch_size=8)
    first, second = (cut(batch, part, parts=2, ahead=2) for part in range(2))
    assert torch.equal(first.tokens, batch.tokens[:, :10])
    assert torch.equal(second.tokens, batch.tokens[:, 8:])
    assert torch.equal(second.positions, batch.positions[:, 8:])
    assert first.document_lengths == second.document_lengths == batch.document_lengths


@pytest.mark.slow
def test_a_run_reads_evaluates_and_continues_as_on_one_rank(corpus: Path, tmp_path: Path) -> None:
    model = four_heads()
    expected = run_on(tmp_path / "one", corpus, 1, model=model, steps=6)
    run_on(tmp_path / "parts", corpus, 2, model=model, steps=4, sequence=2, expert=2)
    got = run_on(tmp_path / "parts", corpus, 1, model=model, steps=6)
    assert got["evaluation 4"]["targets"] == got["evaluation 6"]["targets"]
    assert_same_records(got, expected)
