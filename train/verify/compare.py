"""Two observations of the same steps, tensor by tensor."""

from collections.abc import Iterable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from model.cost import component_of
from train.checkpoint.manifest import Fragment
from train.verify.observation import (
    BUFFER,
    FORWARD,
    GRADIENT,
    LOAD,
    LOSS,
    NORM,
    TERM,
    WEIGHT,
    Key,
    read_key,
)

# In the order in which a step makes them: what differs first is nearest to the cause. Moments lie
# between the norm and the weights.
CAUSES = (FORWARD, LOAD, LOSS, GRADIENT, NORM)
EFFECTS = (WEIGHT, BUFFER)
EXACT = (LOAD, BUFFER)


class Difference(NamedTuple):
    """How far one tensor of the layout is from the reference's."""

    key: Key
    component: str
    error: float  # as `Measure` says
    is_match: bool
    problem: str = ""  # why there is nothing to compare


class Comparison(NamedTuple):
    differences: list[Difference]  # in the order of causes, within it in layer order
    expected: dict[Key, list[Fragment]]
    got: dict[Key, list[Fragment]]

    @property
    def mismatches(self) -> list[Difference]:
        return [difference for difference in self.differences if not difference.is_match]


class Measure(Protocol):
    """How far two tensors are from each other, and how far they may be."""

    def error(self, key: Key, got: Tensor, expected: Tensor) -> float: ...

    def limit(self, key: Key) -> float: ...


class Tolerances(NamedTuple):
    """fp32: the largest difference, relative to the largest value; none of counts and biases."""

    tolerance: float
    of_moments: float  # of what the optimizer keeps

    def error(self, key: Key, got: Tensor, expected: Tensor) -> float:
        return distance(got, expected, is_exact=key.quantity in EXACT)

    def limit(self, key: Key) -> float:
        if key.quantity in EXACT:
            return 0.0
        is_moment = key.quantity not in (*CAUSES, *EFFECTS)
        return self.of_moments if is_moment else self.tolerance


def compare(
    expected: Iterable[Fragment], got: Iterable[Fragment], *, measure: Measure
) -> Comparison:
    """Every tensor of the reference, and whatever the layout has beside them."""
    reference, layout = by_tensor(expected), by_tensor(got)
    order = {key: place for place, key in enumerate((*reference, *layout))}
    keys = [key for key in order if key.quantity != TERM]
    keys.sort(key=lambda key: (key.step, _rank(key.quantity), order[key]))
    routed = moe_layers(reference)
    differences = []
    for key in keys:
        component = component_at(key, routed)
        error, problem = _compare_one(key, reference.get(key), layout.get(key), measure)
        is_match = not problem and error <= measure.limit(key)
        differences.append(Difference(key, component, error, is_match, problem))
    return Comparison(differences, reference, layout)


def moe_layers(keys: Iterable[Key]) -> set[str]:
    """Names of the MoE layers, by the counts of their routers."""
    return {key.name.removesuffix(".router") for key in keys if key.quantity == LOAD}


def by_tensor(fragments: Iterable[Fragment]) -> dict[Key, list[Fragment]]:
    """The fragments of each logical tensor, in the order of their elements."""
    tensors: dict[Key, list[Fragment]] = {}
    for fragment in fragments:
        tensors.setdefault(read_key(fragment.name), []).append(fragment)
    for parts in tensors.values():
        parts.sort(key=lambda fragment: fragment.start)
    return tensors


def join(fragments: list[Fragment]) -> Tensor:
    """The logical tensor, flat.

    Raises:
        ValueError: An element is missing or has several owners.
    """
    end = 0
    for fragment in fragments:
        if fragment.start > end:
            raise ValueError(f"no rank has elements {end} to {fragment.start - 1}")
        if fragment.start < end:
            raise ValueError(f"several ranks have element {fragment.start}")
        end += fragment.data.numel()
    size = torch.Size(fragments[0].shape).numel()
    if end != size:
        raise ValueError(f"no rank has elements {end} to {size - 1}" if end < size else "too many")
    return torch.cat([fragment.data for fragment in fragments])


def component_at(key: Key, routed: set[str]) -> str:
    """The component of the model, or the name of a number of the whole step.

    `routed` are the names of the MoE layers: what they put out beyond the router's and the shared
    experts' parts is the routed experts' doing.
    """
    if key.quantity in (LOSS, NORM):
        return key.name
    if key.quantity == FORWARD:
        within = ".experts." if key.name in routed else "."
        block = key.name.rsplit(".", 1)[-1].isdigit()
        return component_of(f"{key.name}{'.norm.' if block else within}weight")
    return component_of(f"{key.name}.weight" if key.quantity == LOAD else key.name)


def _rank(quantity: str) -> int:
    if quantity in CAUSES:
        return CAUSES.index(quantity)
    if quantity in EFFECTS:
        return len(CAUSES) + 1 + EFFECTS.index(quantity)
    return len(CAUSES)


def _compare_one(
    key: Key, expected: list[Fragment] | None, got: list[Fragment] | None, measure: Measure
) -> tuple[float, str]:
    """The difference, and why there is none."""
    if expected is None or got is None:
        return float(
            "inf"
        ), "only the reference has it" if got is None else "only the layout has it"
    if expected[0].shape != got[0].shape:
        return float("inf"), f"its shape is {got[0].shape} instead of {expected[0].shape}"
    try:
        return measure.error(key, join(got), join(expected)), ""
    except ValueError as error:
        return float("inf"), str(error)


def distance(got: Tensor, expected: Tensor, *, is_exact: bool = False) -> float:
    """Largest absolute difference, over the largest absolute value; infinite where one is NaN."""
    if not expected.numel():
        return 0.0
    largest = float((got.double() - expected.double()).abs().max())
    scale = 1.0 if is_exact else float(expected.double().abs().max())
    if largest == 0:
        return 0.0
    if largest != largest or scale == 0 or scale != scale:
        return float("inf")
    return largest / scale
