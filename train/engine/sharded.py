"""ZeRO 1 to 3: DeepSpeed's engine under the verbs of ours."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from train.engine.partitions import GradientPartitions, ParameterPartitions
from train.engine.sharding import StepResult, Stretch
from train.optimizer.adamw import AdamW
from train.optimizer.muon import Muon
from train.ranks import Ranks


class Sharded:
    """Masters, moments and (ZeRO 2) gradients and (ZeRO 3) weights, each in parts over ranks."""

    def __init__(self, engine: Any, optimizer: AdamW, *, ranks: Ranks) -> None:
        self._engine = engine
        self._zero = engine.optimizer
        self._num_ranks = ranks.ranks_per_stage
        if ranks.pipeline_group is not None:
            _add_up_stages(self._zero, ranks.pipeline_group)
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

    def gather(self) -> None:
        """Take over, in the accumulation's precision, what a pipeline's backward pass has left."""
        if self._zero.use_grad_accum_attribute:
            self._zero.fill_grad_accum_attribute()

    def gathered(self, parameter: nn.Parameter) -> Tensor:
        """The accumulated gradient of one of this rank's parameters."""
        gradient: Tensor = self._zero.get_param_gradient_attribute(parameter)
        return gradient

    def reduce(self) -> None:
        """After a pipeline's last backward pass: average gradients over the ranks of a stage."""
        self._engine.set_gradient_accumulation_boundary(True)
        self._zero.reduce_gradients(pipeline_parallel=True)

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


def _add_up_stages(zero: Any, group: dist.ProcessGroup) -> None:
    """Make a ZeRO optimizer's norm that of all stages, and have them skip a step together."""
    norm_of_stage, overflows_here = zero.scaled_global_norm, zero.has_overflow

    def norm(*args: Any, **kwargs: Any) -> Tensor:
        of_stage = torch.as_tensor(norm_of_stage(*args, **kwargs), device=zero.device)
        square = of_stage.double().square().where(of_stage >= 0, torch.inf)
        dist.all_reduce(square, group=group)
        total = square.sqrt().float()
        return total.where(total.isfinite(), -1.0)  # DeepSpeed's own sign of an invalid norm

    def overflows(*args: Any, **kwargs: Any) -> bool:
        claim = torch.tensor([int(overflows_here(*args, **kwargs))], device=zero.device)
        dist.all_reduce(claim, op=dist.ReduceOp.MAX, group=group)
        return bool(claim)

    zero.scaled_global_norm, zero.has_overflow = norm, overflows
