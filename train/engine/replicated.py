"""ZeRO 0: every rank keeps all masters and moments of its parameters, and updates them itself.

This one is ours. DeepSpeed 0.19.8's stage 0 clips wrongly with expert parallelism: by the mean of
the ranks' norms in fp32 (runtime/utils.py:413), without the experts in BF16.

Each rank's gradients are those of its share of the loss, and an expert's rank has been sent the
tokens of all ranks of its expert-parallel group. So gradients are added, never averaged: over all
ranks, and the experts' over the ranks that hold the same experts.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from train.engine.reduction import Bucket, Reduction, fill_buckets
from train.engine.sharding import StepResult, Stretch
from train.optimizer.adamw import AdamW


class Copies(NamedTuple):
    """Parameters of which the ranks of `group` hold the same copy; None: all ranks."""

    names: list[str]
    group: dist.ProcessGroup | None


class Replicated:
    """Masters, gradients and moments of all of this rank's parameters, in fp32."""

    def __init__(
        self,
        model: nn.Module,
        param_groups: list[dict[str, Any]],
        *,
        build: Callable[[list[dict[str, Any]]], AdamW],
        dtype: torch.dtype,
        clip_norm: float,
        bucket_size: int,
        overlaps: bool,
        expert_names: frozenset[str],
        expert_group: dist.ProcessGroup | None,
        expert_copies: dist.ProcessGroup | None,
    ) -> None:
        """`model` holds fp32 values; `expert_group` spreads the experts, `expert_copies` repeats
        them. `overlaps`: gradients leave beside the backward pass that completes them."""
        self._model = model
        self._clip_norm = clip_norm
        self._expert_group = expert_group
        parameters = dict(model.named_parameters())
        is_spread = expert_group is not None
        self._experts = Copies(
            [n for n in parameters if is_spread and n in expert_names], expert_copies
        )
        self._others = Copies([n for n in parameters if n not in self._experts.names], None)
        self._masters = parameters
        if dtype != torch.float32:
            self._masters = {name: _split_off_master(p, dtype) for name, p in parameters.items()}
        of_parameter = {id(p): self._masters[name] for name, p in parameters.items()}
        for group in param_groups:
            group["params"] = [of_parameter[id(parameter)] for parameter in group["params"]]
        self.optimizer = build(param_groups)
        self._buckets = self._fill_buckets(bucket_size)
        self._reduction: Reduction | None = None  # of the backward pass that is running
        if overlaps:
            for name, parameter in parameters.items():  # after its master has gathered it
                parameter.register_post_accumulate_grad_hook(partial(self._note, name))

    def forward(self, *inputs: Any, **settings: Any) -> Any:
        return self._model(*inputs, **settings)

    def backward(self, share_of_loss: Tensor, *, is_last: bool) -> None:
        reduction = Reduction(self._buckets, self._gradient) if is_last else None
        self._reduction = reduction
        share_of_loss.backward()
        self._reduction = None
        if reduction is not None:
            for master in self._masters.values():
                if master.grad is None:  # no micro-batch of this rank used it
                    master.grad = torch.zeros_like(master)
            reduction.finish()

    def step(self, lr: float) -> StepResult:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        norm = self._norm()
        is_finite = bool(norm.isfinite())
        if is_finite:
            if self._clip_norm:  # DeepSpeed's formula
                scale = ((norm + 1e-6) / self._clip_norm).clamp(min=1.0)
                torch._foreach_div_(self._gradients(self._masters), scale.float())
            self.optimizer.step()
            self._cast()
        for master in self._masters.values():
            master.grad = None
        return StepResult(is_finite, float(norm) if is_finite else float("inf"))

    def masters(self) -> list[Tensor]:
        return list(self._masters.values())

    def stretches(self) -> Iterator[Stretch]:
        """Whole parameters; each is owned by one of the ranks that have a copy, in turn."""
        for name, owner in self._owners().items():
            if owner == dist.get_rank():
                master = self._masters[name]
                kept = {"weight": master.detach().view(-1), **self.optimizer.open_state(master)}
                yield Stretch(name, 0, kept)

    def gradients(self) -> Iterator[Stretch]:
        for name, owner in self._owners().items():
            if owner == dist.get_rank():
                (gradient,) = self._gradients([name])
                yield Stretch(name, 0, {"gradient": gradient.view(-1)})

    @torch.no_grad()
    def take_over(self) -> None:
        """Give all copies what their owners have loaded, and the model's weights with them."""
        owners = self._owners()
        for copies in (self._others, self._experts):
            for name in copies.names:
                master = self._masters[name]
                for tensor in (master.detach(), *self.optimizer.open_state(master).values()):
                    here = tensor.to(master.device)  # 8-bit moments are opened in host memory
                    dist.broadcast(here, owners[name], group=copies.group)
                    tensor.copy_(here)
        self._cast()

    @torch.no_grad()
    def _cast(self) -> None:
        """Give the model's weights, where they are not the masters themselves, their values."""
        for name, parameter in self._model.named_parameters():
            if parameter is not self._masters[name]:
                parameter.copy_(self._masters[name])

    def _owners(self) -> dict[str, int]:
        """Of each parameter, the rank that writes it down and reads it."""
        owners: dict[str, int] = {}
        for copies in (self._others, self._experts):
            ranks = dist.get_process_group_ranks(copies.group or dist.group.WORLD)
            owners |= {name: ranks[i % len(ranks)] for i, name in enumerate(copies.names)}
        return owners

    def _note(self, name: str, _: Tensor) -> None:
        if self._reduction is not None:
            self._reduction.note(name)

    def _fill_buckets(self, size: int) -> list[Bucket]:
        """In the order in which a backward pass completes them."""
        buckets = [
            bucket
            for copies in (self._others, self._experts)
            for bucket in fill_buckets(
                {name: self._masters[name].numel() for name in copies.names},
                copies.group,
                bucket_size=size,
            )
        ]
        places = {name: place for place, name in enumerate(self._masters)}
        return sorted(buckets, key=lambda bucket: places[bucket.names[0]], reverse=True)

    @torch.no_grad()
    def _norm(self) -> Tensor:
        """Of the whole gradient: each replicated parameter once, the experts of all ranks."""
        squares = self._squares(self._others)
        if self._expert_group is not None:
            of_experts = self._squares(self._experts)
            dist.all_reduce(of_experts, group=self._expert_group)
            squares = squares + of_experts
        return squares.sqrt()

    def _gradients(self, names: Iterable[str]) -> list[Tensor]:
        return [self._gradient(name) for name in names]

    def _gradient(self, name: str) -> Tensor:
        """Of a master; after a step's last backward pass each has one."""
        gradient = self._masters[name].grad
        assert gradient is not None, "asked for when it is complete"
        return gradient

    def _squares(self, copies: Copies) -> Tensor:
        norms = torch._foreach_norm(self._gradients(copies.names))
        return torch.stack([norm.double() for norm in norms]).square().sum()


def _split_off_master(parameter: nn.Parameter, dtype: torch.dtype) -> nn.Parameter:
    """An fp32 master of a parameter that is cast to `dtype`; the master gathers its gradients."""
    master = nn.Parameter(parameter.detach().clone())
    parameter.data = parameter.data.to(dtype)

    @torch.no_grad()
    def accumulate(source: Tensor) -> None:
        assert source.grad is not None, "called when it has been added to"
        if master.grad is None:
            master.grad = source.grad.float()
        else:
            master.grad.add_(source.grad)
        source.grad = None

    parameter.register_post_accumulate_grad_hook(accumulate)
    return master
