"""The engine around the model: the only module that imports deepspeed.

It builds the model on its ranks, tells DeepSpeed which parameters are experts, and gives the
loop four verbs (`forward`, `backward`, `step`, `fragments`). How weights, gradients and moments
are kept depends on the ZeRO stage: `train/engine/sharding.py`. What is particular to DeepSpeed
0.19.8 is here and in `train/engine/partitions.py`, with its reasons.
"""

import datetime
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import deepspeed
import deepspeed.ops
import torch
import torch.distributed as dist
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
from deepspeed.runtime.constants import BFLOAT16
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero.config import ZERO_OPTIMIZATION
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS
from deepspeed.sequence.layer import DistributedAttention
from deepspeed.utils import groups
from deepspeed.utils.z3_leaf_module import set_z3_leaf_module
from torch import Tensor, nn

from data.batches import Batch
from model.attention import attend
from model.backends import set_kernels
from model.block import Block
from model.compiled import compile_regions
from model.ffn import SwiGLU
from model.init import first_experts, initial_value, initialise
from model.moe import MoE
from model.products import use_fp8
from model.transformer import MicroBatch, Sums, Transformer
from model.whereabouts import HERE
from train.checkpoint.manifest import Fragment
from train.config import RunConfig
from train.engine.deepspeed_config import deepspeed_config
from train.engine.nvme import Disk, zero_3_on
from train.engine.pipeline import Pipeline
from train.engine.replicated import Replicated
from train.engine.sequences import cut
from train.engine.sharded import Sharded
from train.engine.sharding import Sharding, StepResult
from train.engine.stages import Stages, plan_stages
from train.layout.memory import largest_state
from train.layout.parallel import Offload, ParallelConfig
from train.layout.placement import Seat, find_nodes
from train.optimizer.adamw import AdamW
from train.optimizer.config import build_optimizer, kept_states, parameter_groups
from train.optimizer.muon import Muon
from train.precision import Dtype
from train.ranks import Ranks, connect, read_device

log = logging.getLogger(__name__)

# The op for shared-memory collectives on the CPU is compiled at start-up (a minute, and a
# compiler is needed); gloo does without it.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

# DeepSpeed lets only optimizers that it knows run under ZeRO. Ours are element by element, or know
# where their matrices lie.
ZERO_SUPPORTED_OPTIMIZERS += [AdamW, Muon]


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
        groups._create_expert_and_data_parallel(config.expert, pp_size=config.pipeline)
    return connect(
        timeout_minutes=timeout_minutes,
        parts_per_sequence=config.sequence,
        pipeline_ranks=config.pipeline,
    )


class Engine:
    """The model, its optimizer and ZeRO, on this rank."""

    def __init__(self, config: RunConfig, ranks: Ranks) -> None:
        self.ranks = ranks
        self._config = config
        parallel = config.parallel
        set_kernels(config.kernels)
        dtype = config.precision.dtype.torch
        for traced in compile_regions(config.compile, device=ranks.device, dtype=dtype):
            log.info("compiled: %s", traced.describe())
        expert_group = None
        if parallel.expert > 1:
            expert_group = groups._get_expert_parallel_group(_group_name(parallel))
        sequences = None
        if ranks.sequence_group is not None:
            sequences = UlyssesSequences(ranks.sequence_group)
        self._look_ahead = config.model.mtp.depth
        stages = plan_stages(parallel, config.model, seq_len=config.data.seq_len)
        # Under ZeRO 3 no rank ever holds the whole model: weights are made and cut one by one.
        is_cut_at_birth = parallel.zero_stage == 3
        with torch.device("meta") if is_cut_at_birth else nullcontext():
            model = Transformer(
                config.model,
                expert_group=expert_group,
                sequences=sequences,
                recompute=parallel.recompute,
                offloads=parallel.offload_activations,
                in_halves=parallel.overlap_halves,
                parts=stages.of(ranks.pipeline_rank),
            )
        if config.precision.fp8:
            use_fp8(model)
        if parallel.offload_activations and ranks.device.type == "cpu":
            log.warning("parallel.offload_activations=true only copies from host to host here")
        self.model = model
        self._first_experts = first_experts(model)
        self._num_experts = config.model.moe.num_experts if config.model.moe else 0
        self._shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        self._disk = self._open_disk(config)
        self._optimizer, self._sharding = self._shard(config)
        self._pipeline: Pipeline | None = None
        if ranks.pipeline_group is not None:
            self._pipeline = self._lay_pipeline(stages, config)
        for master in self._sharding.masters():  # before the first step, so that it can be loaded
            states = self._optimizer.start(master)
            if self._disk is not None and parallel.offload_optimizer is Offload.nvme:
                self._disk.take_states(states)
        if config.precision.dtype is not Dtype.fp32 and parallel.zero_stage > 0:
            self._restore_masters(config)

    def accumulate(self, batches: list[Batch], share_of: Callable[[Sums], Tensor]) -> Sums:
        """Forward and backward over the step's micro-batches; what they add up to on this rank.

        `share_of` gives the loss that some sums contribute: the shares of all ranks and
        micro-batches add up to the loss whose gradients are left.
        """
        if self._pipeline is not None:
            with HERE.doing("pipeline schedule"):
                return self._pipeline.run([self._take(batch) for batch in batches], share_of)
        total: Sums | None = None
        for i, batch in enumerate(batches):
            sums = self.forward(batch)
            self.backward(share_of(sums), is_last=i == len(batches) - 1)
            total = sums.detached() if total is None else total.plus(sums.detached())
        assert total is not None, "a global batch has at least one micro-batch per rank"
        return total

    def forward(self, batch: Batch) -> Sums:
        """The model's sums for this rank's part of a micro-batch of its replica.

        In a pipeline without gradients, and zero where other stages have a loss or a load.
        """
        taken = self._take(batch)
        if self._pipeline is not None:
            return self._pipeline.forward(taken)
        sums: Sums = self._sharding.forward(*taken[:-1], segments=taken.segments)
        return sums

    def backward(self, share_of_loss: Tensor, *, is_last: bool) -> None:
        """Accumulate the gradients of this rank's share; on the step's last call, reduce them.

        The shares of all ranks and micro-batches add up to the loss.
        """
        name = "backward and gradient reduction" if is_last else "backward"
        with HERE.doing(name, is_collective=is_last):
            self._sharding.backward(share_of_loss, is_last=is_last)

    @HERE.doing("optimizer step")
    def step(self, lr: float) -> StepResult:
        """Clip and update, or skip the step if a gradient anywhere is not finite."""
        result = self._sharding.step(lr)
        if self._pipeline is not None:
            self._pipeline.copy_embedding()
        return result

    def gradients(self) -> Iterator[Fragment]:
        """Between a step's last `backward` and its `step`: the gradients that this rank owns.

        Reduced over ranks, not clipped, as they would add up in one process; under the names of
        the parameters. Every element is owned by exactly one rank.
        """
        for name, start, kept in self._sharding.gradients():
            shape, first = self._logical_place(name)
            for kind, data in kept.items():
                yield Fragment(f"{kind}/{name}", shape, first + start, data)

    def fragments(self) -> Iterator[Fragment]:
        """All state that this rank owns, as live storage under logical names.

        Master weights, the optimizer's moments, and (on a stage's first rank) the routers' biases.
        Every element is owned by exactly one rank.
        """
        for name, start, states in self._sharding.stretches():
            shape, first = self._logical_place(name)
            for kind, data in states.items():
                yield Fragment(f"{kind}/{name}", shape, first + start, data)
        if self.ranks.is_first_of_stage:
            for name, buffer in self.model.named_buffers():
                yield Fragment(f"buffer/{name}", tuple(buffer.shape), 0, buffer.flatten())

    def buffers(self) -> Iterator[Fragment]:
        """This stage's routers' biases, of which each of its ranks fills a copy at a load."""
        for name, buffer in self.model.named_buffers():
            yield Fragment(f"buffer/{name}", tuple(buffer.shape), 0, buffer.view(-1))

    def copies(self) -> Iterator[Fragment]:
        """Weights and biases as the model computes with them, where other ranks hold the same.

        Weights that ZeRO 3 has cut are left out: no rank has another's part.
        """
        for name, parameter in self.model.named_parameters():
            if parameter.shape == self._shapes[name]:
                shape, first = self._logical_place(name)
                yield Fragment(f"weight/{name}", shape, first, parameter.detach().view(-1))
        yield from self.buffers()

    @property
    def seat(self) -> Seat:
        """This rank's place among all, as the groups have it that were really formed."""
        node_places = self.ranks.gather(int(os.environ["LOCAL_RANK"]))
        group: tuple[int, ...] = (self.ranks.rank,)
        if self._config.parallel.expert > 1:
            name = _group_name(self._config.parallel)
            group = tuple(dist.get_process_group_ranks(groups._get_expert_parallel_group(name)))
        held = self._num_experts // len(group)
        place = group.index(self.ranks.rank)
        return Seat(
            rank=self.ranks.rank,
            node=find_nodes(node_places)[self.ranks.rank],
            replica=self.ranks.replica,
            stage=self.ranks.pipeline_rank,
            part=self.ranks.sequence_part,
            expert_ranks=group,
            experts=range(place * held, (place + 1) * held),
        )

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every logical tensor of the state, whoever owns it."""
        with torch.device("meta"):
            whole = Transformer(self.model.config)
        shapes = {}
        for name, parameter in whole.named_parameters():
            for kind in ("weight", *kept_states(name, self._config.optimizer)):
                shapes[f"{kind}/{name}"] = tuple(parameter.shape)
        for name, buffer in whole.named_buffers():
            shapes[f"buffer/{name}"] = tuple(buffer.shape)
        return shapes

    def finish_load(self, *, updates: int) -> None:
        """Take over what was written into `fragments()`, and how many updates made it."""
        self._sharding.take_over()
        self._optimizer.finish_load(updates=updates)
        if self._pipeline is not None:
            self._pipeline.copy_embedding()

    def _take(self, batch: Batch) -> MicroBatch:
        """This rank's part of the batch's sequences, on its device."""
        part, parts = self.ranks.sequence_part, self.ranks.parts_per_sequence
        mine = cut(batch, part, parts=parts, ahead=self._look_ahead)
        device = self.ranks.device
        return MicroBatch(
            tokens=mine.tokens.to(device, non_blocking=True),
            targets=mine.targets.to(device, non_blocking=True),
            positions=mine.positions.to(device, non_blocking=True),
            counted=mine.is_real.to(device, non_blocking=True),
            segments=mine.document_lengths,
        )

    def _logical_place(self, name: str) -> tuple[tuple[int, ...], int]:
        """Logical shape, and where this rank's part of the tensor begins in it."""
        shape = self._shapes[name]
        first = self._first_experts.get(name)
        if first is None:
            return tuple(shape), 0
        return (self._num_experts, *shape[1:]), first * shape[1:].numel()

    def _shard(self, config: RunConfig) -> tuple[AdamW, Sharding]:
        """The optimizer over this rank's masters, and who keeps them."""
        model, parallel = self.model, config.parallel
        param_groups = parameter_groups(model, config.optimizer)
        if self.model.has_copied_embedding:
            for group in param_groups:  # its owner, on the first stage, updates it
                group["params"] = [p for p in group["params"] if p is not model.embed.weight]
        if parallel.zero_stage != 3:
            initialise(model, seed=config.seed, std=config.model.init_std)
        if parallel.zero_stage == 0:
            replicated = self._replicate(param_groups, config)
            return replicated.optimizer, replicated
        if parallel.expert > 1:
            _register_experts(model, ep_size=parallel.expert, group_name=_group_name(parallel))
        if parallel.zero_stage == 3:
            self._cut(param_groups, config)
        if parallel.expert > 1:
            param_groups = split_params_into_different_moe_groups_for_optimizer(param_groups)
            param_groups = [group for group in param_groups if group["params"]]
        optimizer = build_optimizer(param_groups, config.optimizer)
        is_pipeline = self.ranks.stage_group is not None
        with ExitStack() as changes:
            if is_pipeline:
                changes.enter_context(_zero_whatever_the_precision())
            if self._disk is not None:
                zero_3 = DeepSpeedZeroOptimizer_Stage3
                changes.enter_context(zero_3_on(self._disk, zero_3, parallel))
            engine, *_ = deepspeed.initialize(
                model=model,
                optimizer=optimizer,
                config=deepspeed_config(config),
                mpu=StageGroups(self.ranks) if is_pipeline else None,
            )
        return optimizer, Sharded(engine, optimizer, ranks=self.ranks)

    def _open_disk(self, config: RunConfig) -> Disk | None:
        """The disk on which state waits, if some does."""
        parallel = config.parallel
        if Offload.nvme not in (parallel.offload_optimizer, parallel.offload_parameters):
            return None
        assert parallel.nvme_path is not None, "layout_rules.py asks for it"
        nodes = find_nodes(self.ranks.gather(int(os.environ["LOCAL_RANK"])))
        return Disk(
            Path(parallel.nvme_path),
            needed=largest_state(config, num_ranks=len(nodes)).disk,
            num_ranks=nodes.count(nodes[self.ranks.rank]),
        )

    def _lay_pipeline(self, stages: Stages, config: RunConfig) -> Pipeline:
        assert self.ranks.pipeline_group is not None
        assert isinstance(self._sharding, Sharded), "check_layout asks for ZeRO 1"
        size = config.parallel.micro_batch_size
        return Pipeline(
            self.model,
            stages,
            group=self.ranks.pipeline_group,
            schedule=config.parallel.pipeline_schedule,
            state_shape=(size, config.data.seq_len, config.model.dim),
            dtype=config.precision.dtype.torch,
            device=self.ranks.device,
            num_replicas=self.ranks.num_replicas,
            sharding=self._sharding,
        )

    def _replicate(self, param_groups: list[dict[str, Any]], config: RunConfig) -> Replicated:
        expert_group = expert_copies = None
        if config.parallel.expert > 1:
            expert_group = groups._get_expert_parallel_group(_group_name(config.parallel))
            expert_copies = groups._get_expert_data_parallel_group(_group_name(config.parallel))
        return Replicated(
            self.model.to(self.ranks.device),
            param_groups,
            build=lambda of_masters: build_optimizer(of_masters, config.optimizer),
            dtype=config.precision.dtype.torch,
            clip_norm=config.optimizer.clip_norm,
            bucket_size=config.parallel.reduce_bucket_size,
            overlaps=config.parallel.overlap_comm,
            expert_names=frozenset(self._first_experts),
            expert_group=expert_group,
            expert_copies=expert_copies,
        )

    @torch.no_grad()
    def _cut(self, param_groups: list[dict[str, Any]], config: RunConfig) -> None:
        """Give the model of the meta device its weights, of which each rank keeps its part.

        DeepSpeed's `zero.Init` as a context would do it too, but rounds buffers, changes
        `F.linear` for the process and leaves the values open.
        """
        cutter = deepspeed.zero.Init(
            config_dict_or_path=deepspeed_config(config), dtype=config.precision.dtype.torch
        )
        head = self.model.head_weight
        born: dict[int, nn.Parameter] = {}
        for prefix, module in self.model.named_modules():
            for name, buffer in module.named_buffers(recurse=False):
                module._buffers[name] = torch.zeros_like(buffer, device=self.ranks.device)
            for name, empty in module.named_parameters(recurse=False):
                full_name = f"{prefix}.{name}" if prefix else name
                value = self._initial_value(full_name, config).to(config.precision.dtype.torch)
                parameter: Any = nn.Parameter(value.to(self.ranks.device))
                parameter.__dict__.update(empty.__dict__)  # the tags of experts
                module._parameters[name] = born[id(empty)] = parameter
                cutter._convert_to_deepspeed_param(parameter)
                parameter.partition()
        for group in param_groups:
            group["params"] = [born[id(empty)] for empty in group["params"]]
        # These are used outside the module that holds them: the head's matrix by the model's own
        # forward, a SwiGLU's three by the SwiGLU where it takes its products in FP8.
        deepspeed.zero.register_external_parameter(self.model, born[id(head)])
        for module in self.model.modules():
            if isinstance(module, Block) and module.in_halves:  # else gathered for each half
                set_z3_leaf_module(module, True)
            if isinstance(module, SwiGLU) and config.precision.fp8:
                for parameter in module.parameters():
                    deepspeed.zero.register_external_parameter(module, parameter)

    @torch.no_grad()
    def _restore_masters(self, config: RunConfig) -> None:
        """Give the masters their fp32 initial values: DeepSpeed rounded the model first."""
        for name, start, states in self._sharding.stretches():
            value = self._initial_value(name, config).flatten()
            states["weight"].copy_(value[start : start + states["weight"].numel()])

    def _initial_value(self, name: str, config: RunConfig) -> Tensor:
        return initial_value(
            name,
            self._shapes[name],
            seed=config.seed,
            std=config.model.init_std,
            first_expert=self._first_experts.get(name),
        )


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


class StageGroups:
    """What DeepSpeed asks of a model-parallel unit (`mpu`): the ranks that hold a stage.

    It is told of no model parallelism, so that its norm is the stage's own: DeepSpeed 0.19.8 adds
    up norms over stages group by group of parameters, and hangs where one stage has no experts.
    `Sharded` adds up the stages' norms instead.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks

    def get_data_parallel_group(self) -> dist.ProcessGroup | None:
        return self._ranks.stage_group

    def get_data_parallel_world_size(self) -> int:
        return self._ranks.ranks_per_stage

    def get_data_parallel_rank(self) -> int:
        return self._ranks.replica

    def get_model_parallel_group(self) -> None:
        return None

    def get_model_parallel_world_size(self) -> int:
        return 1

    def get_model_parallel_rank(self) -> int:
        return 0


@contextmanager
def _zero_whatever_the_precision() -> Iterator[None]:
    """Within it DeepSpeed builds its ZeRO optimizer for BF16 with fp32 accumulation as well.

    0.19.8 takes another one at stage 1, whose gradients are gathered by its own backward calls;
    a pipeline's are not. (ZeRO's accumulates in fp32 too.)
    """
    choose = DeepSpeedEngine._do_optimizer_sanity_check
    DeepSpeedEngine._do_optimizer_sanity_check = lambda engine, optimizer: (
        ZERO_OPTIMIZATION if choose(engine, optimizer) == BFLOAT16 else choose(engine, optimizer)
    )
    try:
        yield
    finally:
        DeepSpeedEngine._do_optimizer_sanity_check = choose


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
                "ds_zero_partition_process_group": groups._get_expert_data_parallel_group(
                    group_name
                ),
                "ds_zero_placement_family": "autoep_expert",
            }
            for tag, value in tags.items():
                setattr(parameter, tag, value)


def _group_name(parallel: ParallelConfig) -> str:
    """DeepSpeed's name for the expert-parallel groups of that size."""
    return f"ep_size_{parallel.expert}"


def leave() -> None:
    """Close the groups; without it torch warns, and NCCL may hang, at exit."""
    if dist.is_initialized():
        dist.destroy_process_group()
