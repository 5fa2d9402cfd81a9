"""The grown model's tensors, each computed when it is asked for from those of the old checkpoint.

Nothing is held: a tensor, or one expert's part of a stack, is in memory at a time.
"""

import hashlib
import math
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from model.init import initial_value
from model.transformer import Transformer
from train.checkpoint.stored_tensors import StoredTensors
from train.ema import EMA_KIND, WEIGHT
from train.grow.config import GrownMoments, Growth, Repeat
from train.grow.experts import ExpertPlan, ExpertSource, guaranteed_offset, plan_experts
from train.grow.layers import LayerSource, layer_sources
from train.grow.upcycle import UpcyclePlan, plan_upcycling

BUFFER, SECOND_MOMENT = "buffer/", "exp_avg_sq/"
STACKED = re.compile(r"\.experts\.(gate|up|down)$")
OUTPUTS = re.compile(r"(attention\.out\.weight|ffn\.(shared\.)?down\.weight|ffn\.experts\.down)$")
BLOCK = re.compile(r"^(layers\.(\d+)\.|mtp\.(\d+)\.block\.)(.*)$")


class Place(NamedTuple):
    """A tensor of the new model, or one expert's part of it."""

    name: str  # without its kind
    shape: tuple[int, ...]  # of the part
    expert: int | None = None

    @property
    def start(self) -> int:
        return 0 if self.expert is None else self.expert * math.prod(self.shape)


class _Block(NamedTuple):
    """Where a block of the new model comes from."""

    prefix: str  # of the old block's names
    is_repeat: bool
    experts: ExpertPlan | None = None  # old experts -> new ones
    upcycle: UpcyclePlan | None = None  # dense network -> experts


class _Value(NamedTuple):
    """A tensor, and by how much its gradient differs from that of the tensor it comes from."""

    data: Tensor
    gradient: float = 1.0


ExpertUse = Callable[[str], tuple[Tensor, Tensor]]
"""Load and router rows of the old block with this prefix; asked for where experts go."""


class GrownTensors:
    """All of the new model's tensors. `use` is needed only where experts become fewer.

    Raises:
        ValueError: The models don't fit together (see `plan_experts` and the other plans).
    """

    def __init__(
        self, growth: Growth, stored: StoredTensors, *, use: ExpertUse | None = None
    ) -> None:
        self._growth = growth
        self._stored = stored
        with torch.device("meta"):
            empty = Transformer(growth.new)
        self.shapes = {name: tuple(p.shape) for name, p in empty.named_parameters()}
        self.buffers = {name: tuple(b.shape) for name, b in empty.named_buffers()}
        self._blocks = {prefix: self._trace(prefix, source, use) for prefix, source in self._list()}

    def places(self) -> Iterator[Place]:
        """Every parameter, a stack of experts one by one."""
        for name in self.shapes:
            yield from self.places_of(name)

    def places_of(self, name: str) -> Iterator[Place]:
        """A parameter, or each expert of a stack."""
        shape = self.shapes[name]
        if STACKED.search(name):
            yield from (Place(name, shape[1:], expert) for expert in range(shape[0]))
        else:
            yield Place(name, shape)

    def read(self, kind: str, place: Place) -> Tensor:
        """The values of one kind (`weight/`, `ema/`, a moment's) at a place, in fp32."""
        is_weight = kind in (WEIGHT, EMA_KIND)
        if not is_weight and self._growth.choices.moments is GrownMoments.zero:
            return torch.zeros(place.shape)
        found = BLOCK.match(place.name)
        if found is None:
            return self._whole(kind, place.name, place.shape)
        block, rest = self._blocks[found[1]], found[4]
        is_identity = block.is_repeat and self._growth.choices.repeat is Repeat.identity
        if is_identity and (OUTPUTS.search(place.name) or not is_weight):
            return torch.zeros(place.shape)
        value = self._in_block(kind, place, block, rest)
        if is_weight:
            return value.data
        return value.data * value.gradient ** (2 if kind == SECOND_MOMENT else 1)

    def read_buffer(self, name: str) -> Tensor:
        """A router's bias in the new model."""
        found = BLOCK.match(name)
        assert found is not None, "only routers have buffers"
        block, (num_experts,) = self._blocks[found[1]], self.buffers[name]
        if block.upcycle is not None:
            replica = torch.arange(num_experts) // block.upcycle.pieces
            return -block.upcycle.bias_step * replica
        assert block.experts is not None, "a layer with a bias has experts"
        old = self._old_bias(block.prefix)
        offset = self._growth.choices.offset
        old_moe = self._growth.old.moe
        assert old_moe is not None, "a layer with experts comes from one"
        if offset is None:
            offset = guaranteed_offset(old, old_moe.router)
        mixed = [sum(old[e] * w for e, w in s.shares.items()) for s in block.experts.sources]
        bias = torch.stack([torch.as_tensor(value) for value in mixed])
        is_dormant = torch.tensor([source.is_dormant for source in block.experts.sources])
        return (bias - offset * is_dormant) * block.experts.bias_scale

    def _list(self) -> Iterator[tuple[str, LayerSource]]:
        growth = self._growth
        sources = layer_sources(growth.old, growth.new, order=growth.choices.order)
        for layer, source in enumerate(sources):
            yield f"layers.{layer}.", source
        for depth in range(growth.new.mtp.depth):
            yield f"mtp.{depth}.block.", LayerSource(-1, is_repeat=False)

    def _trace(self, prefix: str, source: LayerSource, use: ExpertUse | None) -> _Block:
        old_prefix = prefix if source.layer < 0 else f"layers.{source.layer}."
        had_experts = f"{BUFFER}{old_prefix}ffn.router.bias" in self._stored.manifest.tensors
        has_experts = f"{prefix}ffn.router.bias" in self.buffers
        old, new = self._growth.old.moe, self._growth.new.moe
        if not has_experts:
            return _Block(old_prefix, source.is_repeat)
        assert new is not None, "it has experts"
        if not had_experts:
            plan = plan_upcycling(self._growth.new, new)
            return _Block(old_prefix, source.is_repeat, upcycle=plan)
        assert old is not None, "it had experts"
        load, rows = None, None
        if new.num_experts < old.num_experts:
            assert use is not None, "the caller has measured the experts' use"
            load, rows = use(old_prefix)
        shrink = self._growth.choices.shrink
        experts = plan_experts(old, new, shrink=shrink, load=load, rows=rows)
        return _Block(old_prefix, source.is_repeat, experts=experts)

    def _in_block(self, kind: str, place: Place, block: _Block, rest: str) -> _Value:
        has_moved = block.upcycle is not None or block.experts is not None
        if not (has_moved and rest.startswith("ffn.")):
            return _Value(self._whole(kind, block.prefix + rest, place.shape))
        part, _, matrix = rest.removeprefix("ffn.").removesuffix(".weight").partition(".")
        if part == "shared":
            return _Value(self._shared(kind, place, block, rest, matrix))
        if block.upcycle is not None:
            return self._upcycled(kind, place, block.prefix, block.upcycle, part, matrix)
        assert block.experts is not None, "has_moved"
        if part == "router":
            return self._router(kind, place, block, block.experts, rest)
        return self._expert(kind, place, block, block.experts, rest, matrix)

    def _expert(
        self, kind: str, place: Place, block: _Block, plan: ExpertPlan, rest: str, matrix: str
    ) -> _Value:
        assert place.expert is not None, "experts come one by one"
        source = plan.sources[place.expert]
        name, size = block.prefix + rest, math.prod(place.shape)

        def read(expert: int) -> Tensor:
            return self._stored.read(kind + name, start=expert * size, shape=place.shape)

        data = _mix(source, read)
        gradient = 1 / plan.active
        if matrix == "down":
            gradient /= plan.down_scale
        if kind not in (WEIGHT, EMA_KIND):
            return _Value(data, gradient)
        if matrix == "down":
            data = data * plan.down_scale
        return _Value(self._with_noise(data, place, is_copy=source.is_copy))

    def _router(
        self, kind: str, place: Place, block: _Block, plan: ExpertPlan, rest: str
    ) -> _Value:
        assert self._growth.old.moe is not None, "a router comes from one"
        shape = (self._growth.old.moe.num_experts, place.shape[1])
        old = self._whole(kind, block.prefix + rest, shape)
        rows = torch.stack([_mix(source, old.__getitem__) for source in plan.sources])
        return _Value(rows, 1 / plan.active)

    def _shared(self, kind: str, place: Place, block: _Block, rest: str, matrix: str) -> Tensor:
        """The old shared experts, then new ones whose output is zero at first."""
        data = torch.zeros(place.shape)
        if kind in (WEIGHT, EMA_KIND) and matrix != "down":
            data = self._initial(place)
        stored = self._stored.manifest.tensors.get(f"{WEIGHT}{block.prefix}{rest}")
        if stored is not None and block.upcycle is None:
            old = self._whole(kind, block.prefix + rest, stored.shape)
            if any(o > n for o, n in zip(old.shape, data.shape, strict=True)):
                raise ValueError(
                    "model.moe.num_shared_experts can't become less: every token visits them"
                )
            data[tuple(slice(size) for size in old.shape)] = old
        return data

    def _upcycled(
        self, kind: str, place: Place, prefix: str, plan: UpcyclePlan, part: str, matrix: str
    ) -> _Value:
        is_weight = kind in (WEIGHT, EMA_KIND)
        if part == "router":
            if not is_weight:
                return _Value(torch.zeros(place.shape))
            rows = self._initial(place)[: plan.replicas] * plan.row_scale
            return _Value(rows.repeat_interleave(plan.pieces, dim=0))
        assert place.expert is not None, "experts come one by one"
        replica, piece = divmod(place.expert, plan.pieces)
        dim, width = self._growth.old.dim, self._growth.old.ffn_dim
        inner = width // plan.pieces
        name = f"{kind}{prefix}ffn.{matrix}.weight"
        gradient = 1 / plan.replicas
        if matrix != "down":
            data = self._stored.read(name, start=piece * inner * dim, shape=(inner, dim))
        else:
            whole = self._stored.read(name, start=0, shape=(dim, width))
            data = whole[:, piece * inner : (piece + 1) * inner].clone()
            gradient /= plan.down_scale
            data = data * plan.down_scale if is_weight else data
        if is_weight:
            data = self._with_noise(data, place, is_copy=replica > 0)
        return _Value(data, gradient)

    def _whole(self, kind: str, name: str, shape: tuple[int, ...]) -> Tensor:
        return self._stored.read(kind + name, start=0, shape=shape)

    def _old_bias(self, prefix: str) -> Tensor:
        assert self._growth.old.moe is not None, "a bias comes from a router"
        shape = (self._growth.old.moe.num_experts,)
        return self._whole(BUFFER, f"{prefix}ffn.router.bias", shape)

    def _initial(self, place: Place) -> Tensor:
        growth = self._growth
        shape = torch.Size(place.shape)
        return initial_value(place.name, shape, seed=growth.seed, std=growth.new.init_std)

    def _with_noise(self, data: Tensor, place: Place, *, is_copy: bool) -> Tensor:
        """A copy of an expert moved off its original by noise of its own."""
        if not is_copy or not self._growth.choices.noise:
            return data
        identity = f"grow/{self._growth.seed}/{place.name}/{place.expert}"
        digest = hashlib.blake2b(identity.encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest) >> 1)
        noise = torch.randn(data.shape, generator=generator)
        return data + self._growth.choices.noise * data.std() * noise


def _mix(source: ExpertSource, read: Callable[[int], Tensor]) -> Tensor:
    """One old expert's tensor as it is, or the mean of several by their shares."""
    (first, share), *others = source.shares.items()
    if not others:
        return read(first)
    data = read(first) * share
    for expert, weight in others:
        data += read(expert) * weight
    return data
