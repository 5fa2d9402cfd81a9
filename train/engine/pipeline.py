"""Pipeline parallelism: the model's blocks in stages on several ranks, micro-batches in a row.

torch.distributed.pipelining decides what each rank does when; here is what a stage computes. With
the hidden state travels the share of the loss that the stages so far have: its gradient, 1, comes
back with the state's, so that each stage's balance losses are differentiated where they arise.

B micro-batch, S sequence, D model width.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleDualPipeV,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleZBVZeroBubble,
)

from model.part import Part
from model.transformer import MicroBatch, Sums, Transformer
from train.engine.sharded import Sharded
from train.engine.stages import Stages
from train.layout.parallel import PipelineSchedule

ShareOf = Callable[[Sums], Tensor]

SCHEDULES: dict[PipelineSchedule, Any] = {
    PipelineSchedule.one_f_one_b: Schedule1F1B,
    PipelineSchedule.interleaved: ScheduleInterleaved1F1B,
    PipelineSchedule.zero_bubble: ScheduleInterleavedZeroBubble,
    PipelineSchedule.zbv: ScheduleZBVZeroBubble,
    PipelineSchedule.dualpipev: ScheduleDualPipeV,
}


class Pipeline:
    """This rank's stages, and the schedule that they work by."""

    def __init__(
        self,
        model: Transformer,
        stages: Stages,
        *,
        group: dist.ProcessGroup,
        schedule: PipelineSchedule,
        state_shape: tuple[int, int, int],
        dtype: torch.dtype,
        device: torch.device,
        num_replicas: int,
        sharding: Sharded,
    ) -> None:
        """`group` holds the stages' owners; `state_shape` is B, S, D."""
        self._model = model
        self._parts, self._owners = stages
        self._group = group
        self._schedule = schedule
        self._device = device
        self._state = torch.empty(state_shape, dtype=dtype, device="meta", requires_grad=True)
        self._num_replicas = num_replicas
        self._sharding = sharding
        self._embedding = EmbeddingCopy(model, stages, group)
        self._batches: list[MicroBatch] = []
        self._share_of: ShareOf = lambda sums: sums.loss
        self._sums: list[Sums] = []
        self._built: Any = None
        self._built_for = 0

    def run(self, batches: list[MicroBatch], share_of: ShareOf) -> Sums:
        """Forward and backward of all micro-batches; what this rank's stages add up to."""
        self._batches, self._share_of, self._sums = batches, share_of, []
        if self._built_for != len(batches):
            self._built, self._built_for = self._build(len(batches)), len(batches)
        # The schedule cuts tensors into micro-batches: here it cuts a list of their numbers.
        numbers = torch.arange(len(batches))
        self._built.step(target=numbers, number=numbers, return_outputs=False)
        self._batches = []
        self._embedding.give_gradient(self._sharding)
        self._sharding.reduce()
        total, *others = self._sums
        for sums in others:
            total = total.plus(sums)
        return total

    @torch.no_grad()
    def forward(self, batch: MicroBatch) -> Sums:
        """The sums of this rank's stages on one micro-batch, without gradients."""
        rank, last = dist.get_rank(self._group), len(self._parts) - 1
        hidden: Tensor | None = None
        total: Sums | None = None
        for i, part in enumerate(self._parts):
            if self._owners[i] != rank:
                continue
            if i > 0 and self._owners[i - 1] != rank:
                hidden = torch.empty_like(self._state, device=self._device)
                dist.recv(hidden, self._global(i - 1), group=self._group)
            advanced = self._model.advance(part, hidden, batch)
            hidden = advanced.hidden
            total = advanced.sums if total is None else total.plus(advanced.sums)
            if i < last and self._owners[i + 1] != rank:
                dist.send(hidden, self._global(i + 1), group=self._group)
        assert total is not None, "every rank has a stage"
        return total

    def advance(self, part: Part, received: tuple[Tensor, ...], number: int) -> Any:
        """What a stage sends on: the state and the share so far; the last one the share."""
        hidden, share = received or (None, torch.zeros(1, device=self._device))
        advanced = self._model.advance(part, hidden, self._batches[number])
        self._sums.append(advanced.sums.detached())
        share = share + self._share_of(advanced.sums)
        return share if part.is_last else (advanced.hidden, share)

    def _build(self, num_micro_batches: int) -> Any:
        rank = dist.get_rank(self._group)
        stages = [self._stage(i) for i, owner in enumerate(self._owners) if owner == rank]
        kind = SCHEDULES[self._schedule]
        if self._schedule is PipelineSchedule.one_f_one_b and num_micro_batches < len(self._parts):
            kind = ScheduleGPipe  # 1F1B has no steady state then; torch refuses it
        takes_one = kind in (Schedule1F1B, ScheduleGPipe)
        return kind(
            stages[0] if takes_one else stages,
            num_micro_batches,
            loss_fn=lambda share, _: share.sum() * self._num_replicas,  # DeepSpeed averages
            scale_grads=False,
        )

    def _stage(self, index: int) -> PipelineStage:
        share = torch.empty(1, device="meta", requires_grad=True)
        part = self._parts[index]
        return _GatheringStage(
            self,
            _Stage(self, self._model, part),
            index,
            len(self._parts),
            self._device,
            input_args=() if part.is_first else (self._state, share),
            output_args=(share,) if part.is_last else (self._state, share),
            group=self._group,
            can_split=not (part.is_last and self._model.reads_embedding_in_chain),
        )

    def _global(self, part: int) -> int:
        return dist.get_global_rank(self._group, self._owners[part])

    def copy_embedding(self) -> None:
        """Give the last stage, if it reads a copy of the embedding, the owner's new weights."""
        self._embedding.take_weights()

    def gather(self) -> None:
        """Take over, in fp32, the gradients that a backward pass has left."""
        self._sharding.gather()
        self._embedding.gather()


class EmbeddingCopy:
    """The embedding's weights where the last stage reads them too: for MTP, or as its head.

    They belong to the first stage's rank. If the last stage is on another one, that has a copy,
    which no optimizer knows: its gradients go to the owner, the owner's new weights come back.
    """

    def __init__(self, model: Transformer, stages: Stages, group: dist.ProcessGroup) -> None:
        config, (owner, copier) = model.config, (stages.owners[0], stages.owners[-1])
        is_read_twice = config.tie_embedding or config.mtp.depth > 0
        rank = dist.get_rank(group)
        self._group = group
        self._owner, self._copier = (dist.get_global_rank(group, r) for r in (owner, copier))
        self._is_owner = is_read_twice and owner != copier and rank == owner
        self._is_copier = is_read_twice and owner != copier and rank == copier
        self._weight: nn.Parameter | None = None
        if self._is_owner or self._is_copier:
            self._weight = cast(nn.Parameter, model.embed.weight)
        self._gradient: Tensor | None = None

    def gather(self) -> None:
        if self._is_copier and self._weight is not None and self._weight.grad is not None:
            gradient = self._weight.grad.float()
            self._gradient = gradient if self._gradient is None else self._gradient + gradient
            self._weight.grad = None

    def give_gradient(self, sharding: Sharded) -> None:
        """Add the copy's gradient to the owner's, after a step's last backward pass."""
        if self._is_copier:
            assert self._gradient is not None, "the last stage has read the embedding"
            dist.send(self._gradient, self._owner, group=self._group)
            self._gradient = None
        if self._is_owner and self._weight is not None:
            gradient = torch.empty_like(self._weight, dtype=torch.float32)
            dist.recv(gradient, self._copier, group=self._group)
            sharding.gathered(self._weight).add_(gradient)

    @torch.no_grad()
    def take_weights(self) -> None:
        if self._weight is None:
            return
        if self._is_owner:
            dist.send(self._weight.detach(), self._copier, group=self._group)
        else:
            dist.recv(self._weight.detach(), self._owner, group=self._group)


class _Stage(nn.Module):
    """A part of the model as torch's pipelining wants it: a module with its own parameters."""

    def __init__(self, pipeline: Pipeline, model: Transformer, part: Part) -> None:
        super().__init__()
        self.modules_of_part = nn.ModuleList(model.modules_of(part))
        self._pipeline = pipeline
        self._part = part

    def forward(self, *received: Tensor, number: Tensor) -> Any:
        return self._pipeline.advance(self._part, received, int(number))


class _GatheringStage(PipelineStage):
    """After each backward pass gradients are taken over, in fp32, before the next adds to them."""

    def __init__(
        self, pipeline: Pipeline, module: nn.Module, *args: Any, can_split: bool, **kwargs: Any
    ) -> None:
        super().__init__(module, *args, **kwargs)
        self._pipeline = pipeline
        self._can_split = can_split

    def backward_one_chunk(
        self,
        bwd_chunk_id: int,
        loss: Any = None,
        full_backward: bool = True,
        last_backward: bool = False,
    ) -> None:
        is_full = full_backward or not self._can_split
        super().backward_one_chunk(bwd_chunk_id, loss, is_full, last_backward)
        self._pipeline.gather()

    def backward_weight_one_chunk(self, *args: Any, **kwargs: Any) -> None:
        if self._can_split:
            super().backward_weight_one_chunk(*args, **kwargs)
            self._pipeline.gather()
