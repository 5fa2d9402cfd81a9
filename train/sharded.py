"""ZeRO 1 to 3: DeepSpeed's engine under the verbs of ours."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from train.adamw import AdamW
from train.muon import Muon
from train.partitions import GradientPartitions, ParameterPartitions
from train.sharding import StepResult, Stretch


class Sharded:
    """Masters, moments and (ZeRO 2) gradients and (ZeRO 3) weights, each in parts over ranks."""

    def __init__(self, engine: Any, optimizer: AdamW, *, num_ranks: int) -> None:
        self._engine = engine
        self._zero = engine.optimizer
        self._num_ranks = num_ranks
        is_stage_3 = engine.zero_optimization_partition_weights()
        kind = ParameterPartitions if is_stage_3 else GradientPartitions
        self._partitions: ParameterPartitions | GradientPartitions = kind(self._zero, optimizer)
        if isinstance(optimizer, Muon):
            assert isinstance(self._partitions, GradientPartitions), "refused: layout_rules.py"
            self._partitions.place_matrices(engine.module, optimizer)

    def forward(self, *inputs: Any, **settings: Any) -> Any:
        return self._engine(*inputs, **settings)

    def backward(self, share_of_loss: Tensor, *, is_last: bool) -> None:
        """DeepSpeed averages over ranks, so the share is multiplied by their number here."""
        self._engine.set_gradient_accumulation_boundary(is_last)
        self._engine.backward(share_of_loss * self._num_ranks, scale_wrt_gas=False)

    def step(self, lr: float) -> StepResult:
        for group in self._zero.param_groups:
            group["lr"] = lr
        self._engine.step()
        return StepResult(not self._zero.overflow, float(self._engine.get_global_grad_norm()))

    def masters(self) -> list[Tensor]:
        return self._partitions.masters()

    def stretches(self) -> Iterator[Stretch]:
        yield from self._partitions.stretches(self._engine.module)

    def gradients(self) -> Iterator[Stretch]:
        yield from self._partitions.gradients(self._engine.module)

    def take_over(self) -> None:
        self._partitions.take_over()
