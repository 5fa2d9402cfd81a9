"""safetensors files, read and written tensor by tensor.

The safetensors library maps files into memory, where every page once read counts as the
process's own until the file is closed, and writes only what is all in memory at once. These two
hold one tensor at a time, whatever the file's size.
"""

import json
import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from data.progress import Advance
from train.checkpoint.manifest import StoredFile
from train.checkpoint.tensor_file import BLOCK_BYTES, CODES, encode_header, new_hash

DTYPE_CODES = CODES | {torch.float8_e4m3fn: "F8_E4M3"}
DTYPES = {code: dtype for dtype, code in DTYPE_CODES.items()}


class TensorSpec(NamedTuple):
    """A tensor in a file, without its values."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class _Place(NamedTuple):
    spec: TensorSpec
    begin: int  # byte in the file


class TensorFile:
    """An existing file.

    Raises:
        ValueError: It is no safetensors file, is cut short, or holds a type that we don't know.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("rb", buffering=0)
        self._places = {place.spec.name: place for place in self._read_header()}

    def specs(self) -> dict[str, TensorSpec]:
        """What the file holds, by name."""
        return {name: place.spec for name, place in self._places.items()}

    def read(self, name: str, *, start: int = 0, stop: int | None = None) -> Tensor:
        """A copy of the elements from `start` to `stop` of the flattened tensor, [stop - start].

        Raises:
            ValueError: The file has been cut short since it was opened.
        """
        spec, begin = self._places[name]
        stop = math.prod(spec.shape) if stop is None else stop
        data = torch.empty((stop - start) * spec.dtype.itemsize, dtype=torch.uint8)
        self._fill(memoryview(data.numpy().data), name, begin + start * spec.dtype.itemsize)
        return data.view(spec.dtype)

    def read_into(self, out: Tensor, name: str, *, start: int) -> None:
        """Fill a 1-D tensor with the elements from `start` on, through one block of memory at
        most, and through none where it lies in host memory in the file's own type.

        Raises:
            ValueError: The file has been cut short since it was opened.
        """
        spec, begin = self._places[name]
        if out.device.type == "cpu" and out.dtype == spec.dtype and out.is_contiguous():
            place = begin + start * spec.dtype.itemsize
            self._fill(memoryview(out.view(torch.uint8).numpy().data), name, place)
            return
        size = BLOCK_BYTES // spec.dtype.itemsize
        for number, block in enumerate(out.split(size)):
            first = start + number * size
            block.copy_(self.read(name, start=first, stop=first + len(block)))

    def _fill(self, rest: memoryview, name: str, place: int) -> None:
        self._file.seek(place)
        while rest:
            count = self._file.readinto(rest)
            if not count:
                raise ValueError(f"{self.path} ends before the last element of {name}")
            rest = rest[count:]

    def close(self) -> None:
        self._file.close()

    def _read_header(self) -> list[_Place]:
        size = os.fstat(self._file.fileno()).st_size
        length = int.from_bytes(self._file.read(8), "little")
        try:
            if length > size:
                raise ValueError("it is cut short")
            header: dict[str, Any] = json.loads(self._file.read(length))
            header.pop("__metadata__", None)
            places = [
                _Place(
                    TensorSpec(name, DTYPES[entry["dtype"]], tuple(entry["shape"])),
                    8 + length + entry["data_offsets"][0],
                )
                for name, entry in header.items()
            ]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{self.path} can't be read as safetensors: {error!r}") from error
        for spec, begin in places:
            if begin + spec.num_bytes > size:
                raise ValueError(f"{self.path} is cut short: it ends before {spec.name} does")
        return places


def write_stream(
    path: Path, specs: Sequence[TensorSpec], tensors: Iterable[Tensor], *, advance: Advance
) -> StoredFile:
    """Write tensors as they come, in the order of `specs`, and give the file's size and hash.

    Blocks of zeros become holes, which take no room on file systems that know them.

    Raises:
        OSError: The disk is full or fails; what was written so far stays.
    """
    header = _header(specs)
    digest = new_hash(header)
    with path.open("wb") as file:
        file.write(header)
        for spec, tensor in zip(specs, tensors, strict=True):
            assert (tensor.dtype, tuple(tensor.shape)) == (spec.dtype, spec.shape), spec.name
            for block in tensor.flatten().split(BLOCK_BYTES // spec.dtype.itemsize):
                part = block.contiguous().view(torch.uint8)
                data = part.numpy().data
                digest.update(data)
                if part.any():
                    file.write(data)
                else:
                    file.seek(len(data), os.SEEK_CUR)
            advance(spec.num_bytes)
        num_bytes = file.tell()
        file.truncate(num_bytes)
        file.flush()
        os.fsync(file.fileno())
    return StoredFile(num_bytes, digest.hexdigest(), new_hash(header).hexdigest())


def cut_shards(specs: Sequence[TensorSpec], *, shard_bytes: int) -> list[list[TensorSpec]]:
    """The specs in order, in shards of at most so many bytes; a larger tensor is one by itself."""
    shards: list[list[TensorSpec]] = []
    room = 0
    for spec in specs:
        if not shards or spec.num_bytes > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(spec)
        room -= spec.num_bytes
    return shards


def _header(specs: Sequence[TensorSpec]) -> bytes:
    """The file's beginning: the length of what follows, and a JSON table of contents."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for spec in specs:
        begin, end = end, end + spec.num_bytes
        entries[spec.name] = {
            "dtype": DTYPE_CODES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [begin, end],
        }
    return encode_header(entries)
