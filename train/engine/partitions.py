"""Which masters and moments are this rank's, read out of DeepSpeed's ZeRO optimizers.

DeepSpeed 0.19.8's own interfaces for this (`deepspeed.utils.tensor_fragment`) cover half of it, and
each stage otherwise; what is used here are attributes of its optimizers.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from train.engine.sharding import Stretch
from train.optimizer.adamw import AdamW
from train.optimizer.matrix_parts import Matrices, MatrixParts, matrices_of
from train.optimizer.muon import Muon


class GradientPartitions:
    """ZeRO 1 and 2: a group's parameters lie in one flat tensor, of which each rank has a part."""

    def __init__(self, zero: Any, optimizer: AdamW) -> None:
        self._zero = zero
        self._optimizer = optimizer

    def masters(self) -> list[Tensor]:
        """The flat fp32 tensors that the optimizer updates."""
        return [flat for group in self._optimizer.param_groups for flat in group["params"]]

    def stretches(self, model: nn.Module) -> Iterator[Stretch]:
        for name, parameter in model.named_parameters():
            mapping: Any = getattr(parameter, "_hp_mapping", None)
            if mapping is None:  # all of it is in other ranks' parts
                continue
            flat, place = self.masters()[mapping.param_group_index], mapping.hp_fragment_address
            part = slice(place.start, place.start + place.numel)
            yield Stretch(
                name, mapping.lp_fragment_address.start, _cut(flat, part, self._optimizer)
            )

    def place_matrices(self, model: nn.Module, optimizer: Muon) -> None:
        """Tell the optimizer which matrices its flat tensors consist of, wherever they are cut."""
        found: list[list[Matrices]] = [[] for _ in self.masters()]
        for parameter in model.parameters():
            mapping: Any = getattr(parameter, "_hp_mapping", None)
            if mapping is not None and parameter.ndim >= 2:
                start = mapping.hp_fragment_address.start - mapping.lp_fragment_address.start
                found[mapping.param_group_index].append(matrices_of(parameter, start=start))
        groups = self._zero.real_dp_process_group
        for flat, matrices, group in zip(self.masters(), found, groups, strict=True):
            optimizer.place(flat, MatrixParts(matrices, size=flat.numel(), group=group))

    def gradients(self, model: nn.Module) -> Iterator[Stretch]:
        for name, parameter in model.named_parameters():
            mapping: Any = getattr(parameter, "_hp_mapping", None)
            if mapping is None:
                continue
            first, count = mapping.lp_fragment_address.start, mapping.lp_fragment_address.numel
            index: Any = parameter
            own = mapping.get_lp_grad_fragment(index._index_in_param_group).flatten()
            if own.numel() == parameter.numel():  # ZeRO keeps all of it, though it owns a part
                own = own.narrow(0, first, count)
            yield Stretch(name, first, {"gradient": own})

    def take_over(self) -> None:
        """Give the model's weights the masters' values."""
        self._zero.update_lp_params()


class ParameterPartitions:
    """ZeRO 3: each parameter is cut over the ranks of its group; the last part is padded."""

    def __init__(self, zero: Any, optimizer: AdamW) -> None:
        self._zero = zero
        self._optimizer = optimizer

    def masters(self) -> list[Tensor]:
        """The flat fp32 tensors that the optimizer updates, one per sub-group of parameters."""
        flats: list[Tensor] = self._zero.fp32_partitioned_groups_flat
        return flats

    def stretches(self, model: nn.Module) -> Iterator[Stretch]:
        for name, parameter in model.named_parameters():
            start, numel = _own_elements(parameter)
            if numel == 0:
                continue
            sub_group, offset, _ = self._zero.grad_position[self._zero.get_param_id(parameter)]
            part = slice(offset, offset + numel)
            yield Stretch(name, start, _cut(self.masters()[sub_group], part, self._optimizer))

    def gradients(self, model: nn.Module) -> Iterator[Stretch]:
        for name, parameter in model.named_parameters():
            start, numel = _own_elements(parameter)
            if numel:
                own = self._zero.get_local_fp32_grad_for_param(parameter)
                yield Stretch(name, start, {"gradient": own.flatten()[:numel]})

    @torch.no_grad()
    def take_over(self) -> None:
        """Give the model's weights the masters' values."""
        zero = self._zero
        zero._partition_all_parameters()
        for sub_group in range(len(zero.fp16_groups)):
            zero._reassign_or_swap_out_partitioned_parameters(sub_group)
        if zero.persistent_parameters:  # small ones, which are kept whole between steps
            zero.persistent_parameters[0].all_gather(zero.persistent_parameters)


def _own_elements(parameter: Any) -> tuple[int, int]:
    """Start and number of a parameter's elements in this rank's part, without the padding."""
    start = parameter.ds_zero_partition_rank * parameter.ds_tensor.ds_numel
    return start, max(0, min(parameter.ds_tensor.ds_numel, parameter.ds_numel - start))


def _cut(flat: Tensor, part: slice, optimizer: AdamW) -> dict[str, Tensor]:
    """A part of a flat master and of all that the optimizer keeps of it."""
    states = {"weight": flat.detach(), **optimizer.open_state(flat)}
    return {kind: values[part] for kind, values in states.items()}
