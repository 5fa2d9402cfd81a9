"""Moments in 8 bits: one byte per element, and one fp32 scale for every 256 of them.

The codes are bitsandbytes' (arXiv:2110.02861): a map from a byte to a number in [-1, 1], denser
near zero, times the largest value of the element's block. The library quantises; arithmetic and
storage are ours, so that the update is the same as in any other precision, a moment keeps its
logical name in checkpoints, and flat parts of any length work.
"""

import logging
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

BLOCK = 256
LIBRARY = "bitsandbytes"
UNSIGNED = ("exp_avg_sq",)  # moments that are never negative use a map of [0, 1]
HAS_LIBRARY = find_spec(LIBRARY) is not None


class QuantisedMoments:
    """Moments as bytes under their names, with their blocks' scales under `name_scale`."""

    is_read_in_place = False

    def __init__(self) -> None:
        # Importing warns of a missing kernel for 4-bit products, which nobody here computes.
        logging.getLogger(LIBRARY).setLevel(logging.ERROR)
        from bitsandbytes import functional

        self._library = functional
        self._maps: dict[tuple[bool, torch.device], Tensor] = {}
        self._opened: dict[int, Tensor] = {}  # by the address of the codes

    def start(self, state: dict[str, Any], name: str, parameter: Tensor) -> None:
        blocks = -(-parameter.numel() // BLOCK)
        state[name] = torch.zeros_like(parameter, dtype=torch.uint8)
        state[f"{name}_scale"] = torch.zeros(blocks, dtype=torch.float32, device=parameter.device)

    def read(self, state: dict[str, Any], name: str, part: slice) -> Tensor:
        codes = state[name].view(-1)[part]
        return self._library.dequantize_blockwise(
            codes, absmax=_scales(state, name, part), code=self._map(name, codes), blocksize=BLOCK
        )

    def write(self, state: dict[str, Any], name: str, part: slice, values: Tensor) -> None:
        """Quantise to the nearest code.

        A second moment never becomes zero beside a block's larger ones: the library would round
        it down to that, and a first moment over its root would explode at the next step.
        """
        self._opened.clear()
        kept = state[name].view(-1)[part]
        codes, quantised = self._library.quantize_blockwise(
            values, code=self._map(name, kept), blocksize=BLOCK
        )
        kept.copy_(codes.clamp_(min=1) if name in UNSIGNED else codes)
        _scales(state, name, part).copy_(quantised.absmax)

    def open(self, state: dict[str, Any], name: str) -> Tensor:
        """The values in fp32 in host memory: the device may have no room for them.

        They stay the same tensor until `close` or the next `write`.
        """
        key = state[name].data_ptr()
        if key not in self._opened:
            self._opened[key] = torch.empty(state[name].numel(), dtype=torch.float32)
            for part in _parts(state[name]):
                self._opened[key][part] = self.read(state, name, part)
        return self._opened[key]

    def close(self, state: dict[str, Any], name: str) -> None:
        """Quantise what was filled in; values that were quantised before come back exactly."""
        opened = self._opened.pop(state[name].data_ptr(), None)
        if opened is None:
            return
        others = dict(self._opened)  # which `write` would forget
        for part in _parts(state[name]):
            values = opened[part].to(state[name].device)
            self.write(state, name, part, values)
            self._restore(state, name, part, values)
        self._opened = others

    def _restore(self, state: dict[str, Any], name: str, part: slice, values: Tensor) -> None:
        """Find codes and scales again of blocks that consist of values of the map times a scale.

        The library's scale is the block's largest absolute value. That restores a block whose
        largest value is positive, where the map's largest number is 1. Its smallest is -0.993, so
        a block led by a negative value would shrink at every load.
        """
        codes, scales = state[name].view(-1)[part], _scales(state, name, part)
        numbers = self._map(name, codes)
        middles = (numbers[1:] + numbers[:-1]) / 2
        blocks = torch.zeros(len(scales) * BLOCK, device=values.device)
        blocks[: len(values)] = values
        blocks = blocks.view(-1, BLOCK)
        for candidate in _possible_scales(blocks, smallest=float(numbers[0])):
            found = torch.bucketize(blocks / candidate[:, None], middles)
            is_exact = (numbers[found] * candidate[:, None] == blocks).all(dim=1) & (candidate > 0)
            scales.copy_(torch.where(is_exact, candidate, scales))
            chosen = is_exact.repeat_interleave(BLOCK)[: len(values)]
            codes.copy_(torch.where(chosen, found.view(-1)[: len(values)].to(torch.uint8), codes))

    def _map(self, name: str, like: Tensor) -> Tensor:
        """The 256 numbers that the bytes stand for, rising."""
        key = (name not in UNSIGNED, like.device)
        if key not in self._maps:
            self._maps[key] = self._library.create_dynamic_map(signed=key[0]).to(like.device)
        return self._maps[key]


def _possible_scales(blocks: Tensor, *, smallest: float) -> list[Tensor]:
    """What may have been the blocks' scales, given the map's smallest number."""
    possible = [blocks.amax(dim=1)]
    if smallest < 0:
        led_by_negative = blocks.amin(dim=1) / smallest
        below = above = led_by_negative
        possible.append(led_by_negative)
        for _ in range(2):  # two roundings lie between the scale and this quotient
            below = torch.nextafter(below, torch.zeros_like(below))
            above = torch.nextafter(above, torch.full_like(above, float("inf")))
            possible += [below, above]
    return possible


def _scales(state: dict[str, Any], name: str, part: slice) -> Tensor:
    assert part.start % BLOCK == 0, "a stretch begins with a block"
    last = min(part.stop, state[name].numel())
    return state[f"{name}_scale"][part.start // BLOCK : -(-last // BLOCK)]


def _parts(codes: Tensor) -> list[slice]:
    length = 2**20
    return [slice(start, start + length) for start in range(0, codes.numel(), length)]
