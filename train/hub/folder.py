"""The weights of a Hugging Face folder, read tensor by tensor."""

import re
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from data.atomic_file import read_json
from train.checkpoint.tensor_stream import TensorFile, TensorSpec
from train.hub.dtype import SCALE, decode
from train.hub.fp8_blocks import count_blocks
from train.hub.names import HubTensor

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
DERIVED = re.compile(r"rotary_emb\.inv_freq$")  # of old folders; follows from config.json


class HubFolder:
    """A folder's safetensors: one file, or several with an index.

    Raises:
        ValueError: It holds none, or index and files disagree.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._files: dict[str, TensorFile] = {}  # by tensor
        self.specs: dict[str, TensorSpec] = {}
        for file in map(TensorFile, self._list_files()):
            for name, spec in file.specs().items():
                if not DERIVED.search(name):
                    self._files[name] = file
                    self.specs[name] = spec

    def read(self, name: str) -> Tensor:
        """The tensor as it is stored."""
        return self._files[name].read(name).view(self.specs[name].shape)

    def read_part(self, name: str, *, start: int, count: int) -> Tensor:
        """Some elements of the flattened tensor."""
        return self._files[name].read(name, start=start, stop=start + count)

    def read_values(self, name: str) -> Tensor:
        """The tensor in fp32, out of FP8 blocks if it is stored so."""
        scales = [self.read(name + SCALE)] if name + SCALE in self.specs else []
        return decode([self.read(name), *scales])

    def check_coverage(self, tensors: Iterable[HubTensor]) -> None:
        """Refuse, with a ValueError naming the first, tensors that lack, are more or misshapen."""
        wanted = {tensor.name: tensor.shape for tensor in tensors}
        for name in list(wanted):
            if name in self.specs and self.specs[name].dtype == torch.float8_e4m3fn:
                wanted[name + SCALE] = count_blocks(wanted[name])
        for name, shape in wanted.items():
            if name not in self.specs:
                raise ValueError(f"{self.path}: {name} is missing, which its config.json asks for")
            if self.specs[name].shape != shape:
                raise ValueError(
                    f"{self.path}: {name} has shape {list(self.specs[name].shape)}, but its "
                    f"config.json asks for {list(shape)}"
                )
        for name in self.specs:
            if name not in wanted:
                raise ValueError(f"{self.path}: {name} is one too many for its config.json")

    def _list_files(self) -> list[Path]:
        index, single = self.path / INDEX, self.path / SINGLE
        if not index.is_file():
            if not single.is_file():
                raise ValueError(
                    f"{self.path} holds neither {SINGLE} nor {INDEX}; weights in another format "
                    "must be converted to safetensors first"
                )
            return [single]
        names = sorted(set(read_json(index)["weight_map"].values()))
        for name in names:
            if not (self.path / name).is_file():
                raise ValueError(f"{self.path / name} is missing, {INDEX} names it")
        return [self.path / name for name in names]
