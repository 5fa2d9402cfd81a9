"""The DeepSpeed engine around the model: the only module that imports deepspeed.

It builds the model on its ranks, tells DeepSpeed which parameters are experts, and gives the
loop four verbs (`forward`, `backward`, `step`, `fragments`). What is particular to DeepSpeed
0.19.8 is here, with its reasons.
"""

import datetime
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import deepspeed
import deepspeed.ops
import torch
import torch.distributed as dist
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS
from deepspeed.sequence.layer import DistributedAttention
from deepspeed.utils import groups
from torch import Tensor, nn

from data.batches import Batch
from model.attention import attend
from model.init import first_experts, initial_value, initialise
from model.moe import MoE
from model.transformer import Sums, Transformer
from train.adamw import MOMENTS, AdamW
from train.config import RunConfig
from train.deepspeed_config import deepspeed_config
from train.manifest import Fragment
from train.optimizer import build_optimizer, parameter_groups
from train.parallel import ParallelConfig
from train.precision import Dtype
from train.ranks import Ranks, connect, read_device
from train.sequences import cut

# The op for shared-memory collectives on the CPU is compiled at start-up (a minute, and a
# compiler is needed); gloo does without it.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

# DeepSpeed lets only optimizers that it knows run under ZeRO. Ours is element by element.
ZERO_SUPPORTED_OPTIMIZERS.append(AdamW)


class StepResult(NamedTuple):
    is_applied: bool  # False where gradients were not finite and the step was skipped
    grad_norm: float  # before clipping; over all parameters and experts of all ranks


def join(config: ParallelConfig, *, timeout_minutes: float) -> Ranks:
    """Meet the run's other processes (found through the environment) and form the groups."""
    for name, alone in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")):
        os.environ.setdefault(name, alone)
    if os.environ["WORLD_SIZE"] == "1":
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", "0")
    device = read_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    deepspeed.init_distributed(
        dist_backend="nccl" if device.type == "cuda" else "gloo",
        timeout=datetime.timedelta(minutes=timeout_minutes),
        verbose=False,
    )
    if config.expert > 1:
        groups._create_expert_and_data_parallel(config.expert)
    return connect(timeout_minutes=timeout_minutes, ranks_per_sequence=config.sequence)


class Engine:
    """The model, its optimizer and ZeRO, on this rank."""

    def __init__(self, config: RunConfig, ranks: Ranks) -> None:
        self.ranks = ranks
        parallel = config.parallel
        group_name = f"ep_size_{parallel.expert}"
        expert_group = None
        if parallel.expert > 1:
            expert_group = groups._get_expert_parallel_group(group_name)
        sequences = None
        if ranks.sequence_group is not None:
            sequences = UlyssesSequences(ranks.sequence_group)
        self._look_ahead = config.model.mtp.depth
        model = Transformer(
            config.model,
            expert_group=expert_group,
            sequences=sequences,
            recompute=parallel.recompute,
        )
        initialise(model, seed=config.seed, std=config.model.init_std)
        self._first_experts = first_experts(model)
        self._num_experts = config.model.moe.num_experts if config.model.moe else 0

        param_groups = parameter_groups(model, config.optimizer)
        if expert_group is not None:
            _register_experts(model, ep_size=parallel.expert, group_name=group_name)
            param_groups = split_params_into_different_moe_groups_for_optimizer(param_groups)
            param_groups = [group for group in param_groups if group["params"]]
        self._optimizer = build_optimizer(param_groups, config.optimizer)
        self._engine, *_ = deepspeed.initialize(
            model=model, optimizer=self._optimizer, config=deepspeed_config(config)
        )
        self._zero = self._engine.optimizer
        self.model: Transformer = self._engine.module
        for flat in self._flat_parts():  # before the first step, so that it can be loaded into
            self._optimizer.start(flat)
        if config.precision.dtype is not Dtype.fp32:
            self._restore_masters(config)

    def forward(self, batch: Batch) -> Sums:
        """The model's sums for this rank's part of a micro-batch of its replica."""
        device = self.ranks.device
        batch = cut(
            batch,
            self.ranks.place_in_replica,
            parts=self.ranks.ranks_per_replica,
            ahead=self._look_ahead,
        )
        sums: Sums = self._engine(
            batch.tokens.to(device, non_blocking=True),
            batch.targets.to(device, non_blocking=True),
            batch.positions.to(device, non_blocking=True),
            batch.is_real.to(device, non_blocking=True),
            segments=batch.document_lengths,
        )
        return sums

    def backward(self, share_of_loss: Tensor, *, is_last: bool) -> None:
        """Accumulate the gradients of this rank's share; on the step's last call, reduce them.

        The shares of all ranks and micro-batches add up to the loss. (DeepSpeed averages over
        ranks, so the share is multiplied by their number here.)
        """
        self._engine.set_gradient_accumulation_boundary(is_last)
        self._engine.backward(share_of_loss * self.ranks.count, scale_wrt_gas=False)

    def step(self, lr: float) -> StepResult:
        """Clip and update, or skip the step if a gradient anywhere is not finite."""
        for group in self._zero.param_groups:
            group["lr"] = lr
        self._engine.step()
        return StepResult(not self._zero.overflow, float(self._engine.get_global_grad_norm()))

    def gradients(self) -> Iterator[Fragment]:
        """Between a step's last `backward` and its `step`: the gradients that this rank owns.

        Reduced over ranks, not clipped, as they would add up in one process; under the names of
        the parameters. Every element is owned by exactly one rank.
        """
        parameters: Iterator[tuple[str, Any]] = self.model.named_parameters()
        for name, parameter in parameters:
            mapping = _partition(parameter)
            if mapping is None:
                continue
            shape, start = self._logical_place(name, parameter)
            first, count = mapping.lp_fragment_address.start, mapping.lp_fragment_address.numel
            own = mapping.get_lp_grad_fragment(parameter._index_in_param_group).flatten()
            if own.numel() == parameter.numel():  # ZeRO keeps all of it, though it owns a part
                own = own.narrow(0, first, count)
            yield Fragment(f"gradient/{name}", shape, start + first, own)

    def fragments(self) -> Iterator[Fragment]:
        """All state that this rank owns, as live storage under logical names.

        Master weights, the optimizer's moments, and (on the first rank) the routers' biases. Every
        element is owned by exactly one rank.
        """
        for name, parameter in self.model.named_parameters():
            mapping = _partition(parameter)
            if mapping is None:
                continue
            shape, start = self._logical_place(name, parameter)
            start += mapping.lp_fragment_address.start
            master = mapping.get_hp_fragment().detach()
            yield Fragment(f"weight/{name}", shape, start, master)
            for kind, values in self._moments(mapping):
                yield Fragment(f"{kind}/{name}", shape, start, values)
        if self.ranks.is_first:
            for name, buffer in self.model.named_buffers():
                yield Fragment(f"buffer/{name}", tuple(buffer.shape), 0, buffer.flatten())

    def buffers(self) -> Iterator[Fragment]:
        """The routers' biases, of which every rank holds a copy to be filled at a load."""
        for name, buffer in self.model.named_buffers():
            yield Fragment(f"buffer/{name}", tuple(buffer.shape), 0, buffer.view(-1))

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every logical tensor of the state, whoever owns it."""
        shapes = {}
        for name, parameter in self.model.named_parameters():
            for kind in ("weight", *MOMENTS):
                shapes[f"{kind}/{name}"] = self._logical_place(name, parameter)[0]
        for name, buffer in self.model.named_buffers():
            shapes[f"buffer/{name}"] = tuple(buffer.shape)
        return shapes

    def finish_load(self, *, updates: int) -> None:
        """Take over what was written into `fragments()`, and how many updates made it."""
        self._optimizer.finish_load(updates=updates)
        self._zero.update_lp_params()

    def _logical_place(self, name: str, parameter: nn.Parameter) -> tuple[tuple[int, ...], int]:
        """Logical shape, and where this rank's part of the tensor begins in it."""
        first = self._first_experts.get(name)
        if first is None:
            return tuple(parameter.shape), 0
        per_expert = parameter[0].numel()
        return (self._num_experts, *parameter.shape[1:]), first * per_expert

    def _flat_parts(self) -> list[Tensor]:
        """This rank's part of each parameter group, which is all that the optimizer sees."""
        return [group["params"][0] for group in self._optimizer.param_groups]

    def _moments(self, mapping: Any) -> Iterator[tuple[str, Tensor]]:
        """What the optimizer keeps for this rank's part of a parameter, as storage to be filled."""
        flat, place = self._flat_parts()[mapping.param_group_index], mapping.hp_fragment_address
        for kind, values in self._optimizer.open_state(flat).items():
            yield kind, values.narrow(0, place.start, place.numel)

    def _restore_masters(self, config: RunConfig) -> None:
        """Give the masters their fp32 initial values: DeepSpeed rounded the model first."""
        for name, parameter in self.model.named_parameters():
            mapping = _partition(parameter)
            if mapping is None:
                continue
            value = initial_value(
                name,
                parameter.shape,
                seed=config.seed,
                std=config.model.init_std,
                first_expert=self._first_experts.get(name),
            )
            start, master = mapping.lp_fragment_address.start, mapping.get_hp_fragment().detach()
            master.copy_(value.flatten()[start : start + master.numel()])


def _partition(parameter: Any) -> Any:
    """Where this rank's part of a parameter lies in ZeRO's flat partitions; None if it has none."""
    return parameter._hp_mapping


class UlyssesSequences:
    """Sequences of which the ranks of a group hold a part each.

    To ZeRO these ranks are data-parallel: each adds its tokens' share of the loss, and the messages
    carry gradients back. Were DeepSpeed told of the group (by `mpu`), it would divide gradients by
    fewer ranks, and refuse ZeRO-3 with experts.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self._attention = DistributedAttention(attend, group, scatter_idx=2, gather_idx=1)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, *, scale: float, segments: list[int]
    ) -> Tensor:
        """Exchange heads for tokens, attend over whole sequences, and exchange back."""
        batch_dim = 0
        mixed: Tensor = self._attention(
            query, key, value, batch_dim, scale=scale, segments=segments
        )
        return mixed

    def total(self, counts: Tensor) -> Tensor:
        """Sums over the group, of counts that carry no gradient."""
        dist.all_reduce(counts, group=self._group)
        return counts


class _RegisteredMoE(MoE, AutoEPMoELayer):
    """Our layer under the one type by which DeepSpeed knows experts of stacked weights.

    Nothing of AutoEP's layer runs but `set_deepspeed_parallelism`. With deepspeed.moe's own
    layer as the marker ZeRO-3 and saving fail; with tags on a plain module ZeRO crashes.
    """


def _register_experts(model: Transformer, *, ep_size: int, group_name: str) -> None:
    """Mark MoE layers and experts so that ZeRO reduces and partitions them in their own group."""
    for module in model.modules():
        if not isinstance(module, MoE):
            continue
        module.__class__ = _RegisteredMoE
        registered: Any = module
        registered.ep_size = ep_size
        registered.ep_group_name = group_name
        for parameter in module.experts.parameters():
            tags: dict[str, Any] = {
                "allreduce": False,
                "group_name": group_name,
                "ds_zero_partition_group_name": group_name,
                "ds_zero_placement_family": "autoep_expert",
            }
            for tag, value in tags.items():
                setattr(parameter, tag, value)


def leave() -> None:
    """Close the groups; without it torch warns, and NCCL may hang, at exit."""
    if dist.is_initialized():
        dist.destroy_process_group()
