"""Samples that need no corpus, with everything in them that a layout may get wrong.

S = seq_len.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from data.mixture import Drawn
from data.position import Position
from data.rows import Rows, stack_rows
from data.samples import IGNORED, Sample, pack
from model.config import ModelConfig
from train.checkpoint.manifest import Fragment
from train.config import RunConfig


class RandomSamples:
    """Sample k for any k: random tokens, a pure function of (seed, k).

    Every second one has documents' borders in it, every third one ends in padding, so micro-batches
    have different numbers of targets.
    """

    def __init__(self, config: RunConfig) -> None:
        self._seed = config.seed
        self._vocab_size = config.model.vocab_size
        self._data = config.data

    def draw(self, position: Position, count: int) -> Drawn[int]:
        """The next `count` samples after a position."""
        after = position.samples + count
        return Drawn([*range(position.samples, after)], replace(position, samples=after))

    def read(self, rows: Sequence[int], batch_size: int) -> list[Rows]:
        """These samples, in batches of so many."""
        starts = range(0, len(rows), batch_size)
        return [
            stack_rows([self[index] for index in rows[start : start + batch_size]])
            for start in starts
        ]

    def __getitem__(self, index: int) -> Sample:
        seq_len = self._data.seq_len
        random = np.random.default_rng((self._seed, index))
        tokens = random.integers(self._vocab_size, size=seq_len + 1)
        borders: list[int] = []
        if index % 2 == 0:
            places = random.choice(np.arange(1, seq_len), min(2, seq_len - 1), replace=False)
            borders = sorted(places.tolist())
        sample = pack(
            tokens,
            borders,
            mask_documents=self._data.mask_documents,
            reset_positions=self._data.reset_positions,
        )
        if index % 3 == 1:
            num_padded = int(random.integers(seq_len // 4, seq_len // 2 + 1))
            sample.is_real[seq_len - num_padded :] = False
            sample.targets[~sample.is_real] = IGNORED
        return sample


def random_biases(buffers: list[Fragment], config: ModelConfig) -> None:
    """Fill the routers' biases in place, by name, so that they take part in the routing.

    (A run starts from zeros.) Routers without a bias keep their zeros.
    """
    if config.moe is None or not config.moe.router.bias:
        return
    for name, shape, start, data in buffers:
        generator = torch.Generator().manual_seed(sum(name.encode()))
        values = torch.empty(shape).normal_(std=0.05, generator=generator).flatten()
        data.copy_(values[start : start + data.numel()])
