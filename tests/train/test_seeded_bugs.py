"""Bugs that the field has had, patched into the ranks: verify must fail, and point at the part."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import deepspeed.runtime.zero.stage_1_and_2 as zero
import pytest
import torch
import torch.distributed as dist
from deepspeed.moe.utils import is_moe_param
from torch import Tensor

import model.exchange
import model.moe
import train.engine.engine
import train.engine.sharded
import train.update
from data.batches import Batch
from model.config import ModelConfig, MTPConfig
from model.exchange import Flight
from model.moe import MoE
from model.part import Part
from model.transformer import Sums, Transformer
from tests.train.tiny import tiny_model, tiny_run
from tests.train.verification import Bug, verify
from train.engine.engine import Engine, UlyssesSequences
from train.engine.pipeline import EmbeddingCopy, Pipeline
from train.layout.parallel import ParallelConfig, Recompute
from train.precision import Dtype, PrecisionConfig
from train.update import Denominators
from train.verify.diagnosis import diagnose

ZERO = zero.DeepSpeedZeroOptimizer


def replaced(owner: Any, name: str, new: Any) -> AbstractContextManager[Any]:
    return mock.patch.object(owner, name, new)


def expert_gradients_not_averaged_over_their_replicas() -> AbstractContextManager[Any]:
    reduce = ZERO.allreduce_and_scatter

    def skip(self: Any, bucket: Any, *args: Any, process_group: Any, **kwargs: Any) -> None:
        if process_group not in self.expert_dp_process_group.values():
            reduce(self, bucket, *args, process_group=process_group, **kwargs)

    return replaced(ZERO, "allreduce_and_scatter", skip)


def expert_gradients_divided_twice() -> AbstractContextManager[Any]:
    reduce = ZERO.allreduce_and_scatter

    def divide(self: Any, bucket: Any, *args: Any, process_group: Any, **kwargs: Any) -> None:
        if process_group in self.expert_dp_process_group.values():
            for _, gradient, _ in bucket:
                gradient /= dist.get_world_size(process_group)
        reduce(self, bucket, *args, process_group=process_group, **kwargs)

    return replaced(ZERO, "allreduce_and_scatter", divide)


def clip_norm_without_experts() -> AbstractContextManager[Any]:
    norm_of = ZERO.get_grad_norm_direct

    def forget(self: Any, gradients: Any, params: Any, norm_type: int = 2) -> Tensor:
        norm: Tensor = norm_of(self, gradients, params, norm_type)
        return norm * 0 if is_moe_param(params[0]) else norm

    return replaced(ZERO, "get_grad_norm_direct", forget)


def clip_norm_counting_replicas() -> AbstractContextManager[Any]:
    norm_of = ZERO.get_grad_norm_direct

    def count(self: Any, gradients: Any, params: Any, norm_type: int = 2) -> Tensor:
        norm: Tensor = norm_of(self, gradients, params, norm_type)
        return norm if is_moe_param(params[0]) else norm * dist.get_world_size() ** 0.5

    return replaced(ZERO, "get_grad_norm_direct", count)


def balance_loss_divided_by_the_micro_batch() -> AbstractContextManager[Any]:
    objective = train.update.objective

    def divide(sums: Sums, over: Denominators, config: ModelConfig) -> Tensor:
        return objective(sums, over._replace(sequences=2), config)  # the micro-batch size

    return replaced(train.update, "objective", divide)


def padding_counted() -> AbstractContextManager[Any]:
    count_load = model.moe.count_load

    def count(expert_ids: Tensor, counted: Tensor, *, num_experts: int) -> Tensor:
        return count_load(expert_ids, torch.ones_like(counted), num_experts=num_experts)

    return replaced(model.moe, "count_load", count)


@contextmanager
def counts_that_recomputation_adds_to() -> Iterator[None]:
    """Counts as state: each layer adds to its own, and the step reads them after the backward."""
    states: dict[MoE, Tensor] = {}
    running: list[MoE] = []
    count_load, forward, whole_forward = model.moe.count_load, MoE.forward, Transformer.forward

    def note_layer(self: MoE, *args: Any, **kwargs: Any) -> Any:
        running.append(self)
        return forward(self, *args, **kwargs)

    def add(*args: Any, **kwargs: Any) -> Tensor:
        load: Tensor = count_load(*args, **kwargs)
        states[running[-1]] += load
        return load

    def read_later(self: Transformer, *args: Any, **kwargs: Any) -> Sums:
        layers = [module for module in self.modules() if isinstance(module, MoE)]
        live = torch.zeros(len(layers), layers[0].num_experts, dtype=torch.int64)
        states.update(zip(layers, live, strict=True))
        return whole_forward(self, *args, **kwargs)._replace(load=live)

    with (
        replaced(model.moe, "count_load", add),
        replaced(MoE, "forward", note_layer),
        replaced(Transformer, "forward", read_later),
    ):
        yield


def bias_in_bf16() -> AbstractContextManager[Any]:
    step_bias = train.update.step_bias

    def round_bias(bias: Tensor, load: Tensor, *, speed: float) -> None:
        step_bias(bias, load, speed=speed)
        bias.copy_(bias.bfloat16())

    return replaced(train.update, "step_bias", round_bias)


def mtp_loss_summed_over_depth() -> AbstractContextManager[Any]:
    objective = train.update.objective

    def add(sums: Sums, over: Denominators, config: ModelConfig) -> Tensor:
        loss: Tensor = objective(sums, over, config)
        for nats, targets in zip(sums.mtp_loss, over.mtp_targets, strict=True):
            missing = 1 - 1 / config.mtp.depth
            loss = loss + config.mtp.loss_weight * missing * nats / targets
        return loss

    return replaced(train.update, "objective", add)


def wrong_order_of_splits() -> AbstractContextManager[Any]:
    land = model.exchange.Flight.land

    def reverse(flight: Flight) -> Tensor:
        return torch.cat(land(flight).split(flight._route.received)[::-1])

    return replaced(model.exchange.Flight, "land", reverse)


def shared_experts_not_reduced() -> AbstractContextManager[Any]:
    """They are taken for routed ones, which have no replica where every rank holds its own."""
    register = train.engine.engine._register_experts

    def register_all(layers: Transformer, **kwargs: Any) -> None:
        register(layers, **kwargs)
        for layer in layers.modules():
            if isinstance(layer, MoE) and layer.shared is not None:
                for parameter in layer.shared.parameters():
                    vars(parameter).update(vars(layer.experts.gate))

    return replaced(train.engine.engine, "_register_experts", register_all)


@contextmanager
def micro_batches_weighted_alike() -> Iterator[None]:
    """Each micro-batch's mean loss counts as much as any other's, however many targets it has."""
    objective, forward = train.update.objective, Engine.forward
    targets = 0

    def note(self: Engine, batch: Batch) -> Sums:
        nonlocal targets
        targets = batch.num_targets()
        return forward(self, batch)

    def weigh(sums: Sums, over: Denominators, config: ModelConfig) -> Tensor:
        return objective(sums, over._replace(targets=targets * over.sequences // 2), config)

    with replaced(Engine, "forward", note), replaced(train.update, "objective", weigh):
        yield


def counts_of_one_rank() -> AbstractContextManager[Any]:
    all_reduce = dist.all_reduce

    def keep(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        return None if tensor.dtype == torch.int64 else all_reduce(tensor, *args, **kwargs)

    return replaced(train.update.dist, "all_reduce", keep)


def balance_loss_of_each_part_of_a_sequence() -> AbstractContextManager[Any]:
    return replaced(UlyssesSequences, "total", lambda self, counts: counts)


def copied_embedding_not_summed() -> AbstractContextManager[Any]:
    """The last stage's copy keeps its gradient to itself."""
    return replaced(EmbeddingCopy, "give_gradient", lambda self, sharding: None)


def micro_batches_in_another_order_on_the_last_stage() -> AbstractContextManager[Any]:
    advance = Pipeline.advance

    def reverse(self: Pipeline, part: Part, received: Any, number: int) -> Any:
        last = len(self._batches) - 1
        return advance(self, part, received, last - number if part.is_last else number)

    return replaced(Pipeline, "advance", reverse)


def clip_norm_of_one_stage() -> AbstractContextManager[Any]:
    return replaced(train.engine.sharded, "_add_up_stages", lambda zero, group: None)


class Seeded(NamedTuple):
    bug: Bug
    part: str  # at fault
    says: str  # in the message, beside that
    layout: dict[str, Any]
    num_ranks: int = 2


EXPERT = {"expert": 2, "micro_batch_size": 2}
BUGS = [
    Seeded(
        expert_gradients_not_averaged_over_their_replicas, "routed experts", "reduction", EXPERT, 4
    ),
    Seeded(expert_gradients_divided_twice, "routed experts", "0.5 times", EXPERT, 4),
    Seeded(clip_norm_without_experts, "global norm", "leaves out the routed experts", EXPERT),
    Seeded(clip_norm_counting_replicas, "global norm", "counts 2 times all but the routed", EXPERT),
    Seeded(balance_loss_divided_by_the_micro_batch, "balance loss", "counts 4 times", EXPERT),
    Seeded(padding_counted, "routing counts", "padding is counted", EXPERT),
    Seeded(
        counts_that_recomputation_adds_to,
        "routing counts",
        "2 times the reference's",
        {"micro_batch_size": 4, "recompute": Recompute.full},
    ),
    Seeded(bias_in_bf16, "routing bias", "rounded to BF16", EXPERT),
    Seeded(mtp_loss_summed_over_depth, "MTP loss", "counts 2 times", EXPERT),
    Seeded(wrong_order_of_splits, "routed experts", "forward pass of layers.1.ffn", EXPERT),
    Seeded(shared_experts_not_reduced, "shared experts", "several ranks have element", EXPERT),
    Seeded(
        micro_batches_weighted_alike, "weights of tokens in the loss", "don't weigh alike", EXPERT
    ),
    Seeded(
        balance_loss_of_each_part_of_a_sequence,
        "balance loss",
        "in this loss's sum or mean",
        {"sequence": 2, "micro_batch_size": 4},
    ),
    Seeded(
        copied_embedding_not_summed,
        "embedding",
        "reduction of its gradients",
        {"pipeline": 2, "micro_batch_size": 2},
    ),
    Seeded(
        micro_batches_in_another_order_on_the_last_stage,
        "attention",
        "forward pass of layers.2.attention",
        {"pipeline": 2, "micro_batch_size": 2},
    ),
    Seeded(
        clip_norm_of_one_stage, "global norm", "the norm", {"pipeline": 2, "micro_batch_size": 2}
    ),
    Seeded(counts_of_one_rank, "routing counts", "layers.1.ffn.router", EXPERT),
]


@pytest.mark.parametrize("seeded", BUGS, ids=lambda seeded: seeded.bug.__name__)
def test_verify_catches_the_bug_and_names_the_part(tmp_path: Path, seeded: Seeded) -> None:
    config = tiny_run(
        tmp_path,
        model=tiny_model(mtp=MTPConfig(depth=2)),
        parallel=ParallelConfig(**seeded.layout),
    )
    config.optimizer.clip_norm = 0.1
    comparison = verify(config, seeded.num_ranks, steps=1, bug=seeded.bug)
    diagnosis = diagnose(comparison, config)
    assert diagnosis is not None, "verify passed"
    assert diagnosis.part == seeded.part
    assert seeded.says in str(diagnosis)


@pytest.mark.parametrize(
    ("bug", "part"),
    [
        pytest.param(expert_gradients_divided_twice, "routed experts", marks=pytest.mark.slow),
        (bias_in_bf16, "routing bias"),
        pytest.param(padding_counted, "routing counts", marks=pytest.mark.slow),
        pytest.param(clip_norm_counting_replicas, "global norm", marks=pytest.mark.slow),
    ],
)
def test_verify_in_bf16_catches_what_rounding_does_not_explain(
    tmp_path: Path, bug: Bug, part: str
) -> None:
    parallel = ParallelConfig(expert=2, micro_batch_size=1, zero_stage=2)
    precision = PrecisionConfig(dtype=Dtype.bf16)
    config = tiny_run(tmp_path, parallel=parallel, precision=precision)
    diagnosis = diagnose(verify(config, 4, steps=1, bug=bug), config)
    assert diagnosis is not None, "verify passed"
    assert diagnosis.part == part
