"""What a mismatch points at: the part at fault, and where the step first goes wrong.

A step has an order: states, counts, losses, gradients, norm, moments, weights, biases. What differs
first in it is nearest to the cause; what follows is consequence.
"""

import re
from typing import NamedTuple

import torch
from torch import Tensor

from model.cost import ROUTED
from train.config import RunConfig
from train.verify.compare import Comparison, Difference, component_at, join, moe_layers
from train.verify.observation import (
    BUFFER,
    FORWARD,
    GRADIENT,
    LOAD,
    LOSS,
    NORM,
    TERM,
    Key,
)

FINAL_NORM = "norm.weight"  # the last parameter before head and MTP
UNEXPLAINED = 1e-2  # of a difference that may remain beside what is said to explain it


class Diagnosis(NamedTuple):
    part: str  # a component of the model, or a number or rule of the whole step
    start: str  # where in the step, and in the model, it begins
    first: Difference  # the first tensor that differs, in the order of the step, then of layers
    hints: list[str]

    def __str__(self) -> str:
        key = self.first.key
        size = self.first.problem or f"differs by {self.first.error:.1e}"
        lines = [
            f"MISMATCH: {self.part}",
            f"  first tensor  {key.quantity} of {key.name} in step {key.step}: {size}",
            f"  starts        {self.start}",
            *(f"  hint          {hint}" for hint in self.hints),
        ]
        return "\n".join(lines)


def diagnose(comparison: Comparison, config: RunConfig) -> Diagnosis | None:
    """What the first mismatch of the steps points at; None where everything matches."""
    if not comparison.mismatches:
        return None
    first = comparison.mismatches[0]
    key, part = first.key, part_of(comparison, first.key)
    if first.problem:
        return Diagnosis(part, "in which elements the ranks own", first, [])
    hints = _factor_hint(comparison, key)
    if key.quantity == FORWARD:
        return Diagnosis(part, f"in the forward pass of {key.name}", first, hints)
    if key.quantity == LOAD:
        start = f"in the counts of {key.name}: the states of the whole forward pass agree"
        hints = _padding_hint(comparison, key, config) or hints
        return Diagnosis("routing counts", start, first, hints)
    if key.quantity == LOSS:
        start = "in this loss's sum or mean: states and routing counts agree"
        return Diagnosis(part, start, first, hints)
    if key.quantity == GRADIENT:
        return _diagnose_gradients(comparison, first)
    if key.quantity == NORM:
        start = "in the norm: the gradients that it is taken of agree"
        return Diagnosis("global norm", start, first, _norm_hint(comparison, key) or hints)
    if key.quantity == BUFFER:
        start = "in the bias's update: the routing counts agree"
        return Diagnosis("routing bias", start, first, _rounding_hint(comparison, key))
    start = "in the optimizer's update: gradients and their norm agree"
    return Diagnosis(f"{key.quantity} of the {part}", start, first, hints)


def part_of(comparison: Comparison, key: Key) -> str:
    """The component that a key belongs to, within MTP's block as anywhere else."""
    routed = {leave_mtp(name) for name in moe_layers(comparison.expected)}
    return component_at(key._replace(name=leave_mtp(key.name)), routed)


def leave_mtp(name: str) -> str:
    """A name under which a module of MTP's block counts as one of any other layer."""
    return re.sub(r"^mtp\.(\d+)\.block\b", r"mtp_layers.\1", name)


def is_of_mtp(name: str) -> bool:
    return name.startswith("mtp.")


def _diagnose_gradients(comparison: Comparison, first: Difference) -> Diagnosis:
    """Losses agree, gradients don't: a loss's weight, a reduction, or the backward pass."""
    differing = [
        difference
        for difference in comparison.mismatches
        if difference.key[:2] == (first.key.step, GRADIENT)
    ]
    terms = _explain_by_terms(comparison, first.key.step)
    if terms:
        start = "between the losses and their gradients: all losses are reported alike"
        hints = [f"the {term} counts {factor:.4g} times" for term, factor in terms.items()]
        part = next(iter(terms)) if len(terms) == 1 else "weights of the losses"
        return Diagnosis(part, start, first, hints)
    parts = {part_of(comparison, difference.key) for difference in differing}
    hints = _factor_hint(comparison, first.key)
    if len(parts) == 1:
        start = "in the reduction of its gradients: those of all other components agree"
        return Diagnosis(next(iter(parts)), start, first, hints)
    gradients = [key for key in comparison.expected if key[:2] == (first.key.step, GRADIENT)]
    names = {difference.key.name for difference in differing}
    is_only_above_mtp = FINAL_NORM in names and not any(is_of_mtp(name) for name in names)
    if len(differing) == len(gradients) or is_only_above_mtp:
        start = "between the losses, which are reported alike, and what their gradients enter first"
        hint = "sequences or tokens don't weigh alike in the gradient (micro-batches, ranks?)"
        return Diagnosis("weights of tokens in the loss", start, first, [hint])
    last = differing[-1].key
    start = f"in the backward pass of {last.name}, from which on towards the embedding they differ"
    return Diagnosis(part_of(comparison, last), start, first, hints)


def _explain_by_terms(comparison: Comparison, step: int) -> dict[str, float]:
    """How many times each loss counts whose weight alone explains the difference; else empty."""
    columns: dict[str, list[Tensor]] = {}
    differences = []
    for key in comparison.expected:
        if key[:2] != (step, TERM):
            continue
        term, name = key.name.split("/")
        gradient = Key(step, GRADIENT, name)
        if gradient not in comparison.got:
            return {}
        expected, got = _both(comparison, gradient)
        scale = expected.abs().max().clamp(min=1e-30)
        of_term = columns.setdefault(term, [])
        of_term.append(join(comparison.expected[key]).double() / scale)
        if len(columns) == 1:
            differences.append((got - expected) / scale)
    if not columns:
        return {}
    difference = torch.cat(differences)
    matrix = torch.stack([torch.cat(parts) for parts in columns.values()], dim=1)
    factors = torch.linalg.lstsq(matrix, difference[:, None], driver="gelsd").solution[:, 0]
    rest = difference - matrix @ factors
    if not rest.norm() <= UNEXPLAINED * difference.norm() or float(difference.abs().max()) < 1e-5:
        return {}
    named = dict(zip(columns, factors.tolist(), strict=True))
    return {term: 1 + factor for term, factor in named.items() if abs(factor) > UNEXPLAINED}


def _factor_hint(comparison: Comparison, key: Key) -> list[str]:
    """Whether the layout's tensor is a multiple of the reference's."""
    if key not in comparison.got or key not in comparison.expected:
        return []
    expected, got = _both(comparison, key)
    factor = float((got @ expected) / (expected @ expected))
    if not (got - factor * expected).norm() <= 1e-3 * got.norm():
        return []
    if abs(factor - 1) < 1e-3:
        return []
    return [f"it is {factor:.4g} times the reference's, in every element"]


def _padding_hint(comparison: Comparison, key: Key, config: RunConfig) -> list[str]:
    """Whether there are as many choices as tokens, padding included."""
    shape = next(parts[0].shape for k, parts in comparison.expected.items() if k[1] == FORWARD)
    expected, got = _both(comparison, key)
    assert config.model.moe is not None, "a dense model has no counts"
    if int(got.sum()) != torch.Size(shape).numel() * config.model.moe.top_k:
        return []
    return [f"padding is counted: {int(got.sum())} choices instead of {int(expected.sum())}"]


def _norm_hint(comparison: Comparison, key: Key) -> list[str]:
    """What the norm leaves out or counts several times, judged by the layout's own gradients."""
    squares = {True: 0.0, False: 0.0}  # of the routed experts, and of all others
    for other, parts in comparison.got.items():
        if other[:2] == (key.step, GRADIENT):
            is_routed = part_of(comparison, other) == ROUTED
            squares[is_routed] += float(join(parts).double().square().sum())
    reported = float(join(comparison.got[key])) ** 2
    hints = []
    for is_routed, name in ((True, "the routed experts"), (False, "all but the routed experts")):
        times = (reported - squares[not is_routed]) / max(squares[is_routed], 1e-30)
        if abs(times - round(times)) < 1e-3 and round(times) != 1:
            count = "leaves out" if round(times) == 0 else f"counts {round(times)} times"
            hints.append(f"it {count} {name}")
    return hints


def _rounding_hint(comparison: Comparison, key: Key) -> list[str]:
    expected, got = _both(comparison, key)
    is_rounded = torch.equal(got.bfloat16().double(), got)
    return ["it is rounded to BF16"] if is_rounded and not torch.equal(got, expected) else []


def _both(comparison: Comparison, key: Key) -> tuple[Tensor, Tensor]:
    """The reference's and the layout's tensor."""
    return join(comparison.expected[key]).double(), join(comparison.got[key]).double()
