"""Streamed safetensors files against the safetensors library."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from train.checkpoint.tensor_file import hash_tensors
from train.checkpoint.tensor_stream import TensorFile, TensorSpec, cut_shards, write_stream


def make_tensors() -> dict[str, torch.Tensor]:
    return {
        "matrix": torch.randn(7, 5),
        "half": torch.randn(3).bfloat16(),
        "eighth": torch.randn(4, 4).to(torch.float8_e4m3fn),
        "zeros": torch.zeros(3_000_000),
        "last": torch.arange(6),
    }


def specs_of(tensors: dict[str, torch.Tensor]) -> list[TensorSpec]:
    return [TensorSpec(name, t.dtype, tuple(t.shape)) for name, t in tensors.items()]


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


def test_the_library_reads_what_is_written_as_a_stream(tmp_path: Path) -> None:
    tensors, seen = make_tensors(), list[int]()
    path = tmp_path / "file.safetensors"
    stored = write_stream(path, specs_of(tensors), iter(tensors.values()), advance=seen.append)
    got = load_file(path)
    assert got.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(bits(got[name]), bits(tensor)), name
    assert stored == hash_tensors(path)
    assert sum(seen) == sum(tensor.nbytes for tensor in tensors.values())


def test_any_part_of_what_the_library_writes_is_read(tmp_path: Path) -> None:
    tensors = make_tensors()
    path = tmp_path / "file.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    file = TensorFile(path)
    assert set(file.specs().values()) == set(specs_of(tensors))
    for name, tensor in tensors.items():
        assert torch.equal(bits(file.read(name)), bits(tensor.flatten()))
        assert torch.equal(bits(file.read(name, start=1, stop=3)), bits(tensor.flatten()[1:3]))
    file.close()


@pytest.mark.parametrize("num_bytes", [4, 60, 5000])
def test_a_file_that_is_cut_short_is_refused_when_it_is_opened(
    num_bytes: int, tmp_path: Path
) -> None:
    path = tmp_path / "file.safetensors"
    save_file(make_tensors(), path)
    path.write_bytes(path.read_bytes()[:num_bytes])
    with pytest.raises(ValueError, match=r"file.safetensors (is cut short|can't be read)"):
        TensorFile(path)


def test_only_one_tensor_exists_at_a_time(tmp_path: Path) -> None:
    alive = list[int]()

    def make() -> Iterator[torch.Tensor]:
        for number in range(3):
            alive.append(number)
            yield torch.full((2,), float(number))

    tensors = make()
    specs = [TensorSpec(str(number), torch.float32, (2,)) for number in range(3)]
    write_stream(
        tmp_path / "file",
        specs,
        tensors,
        advance=lambda _: alive.append(-1),  # a tensor's end comes before the next one's start
    )
    assert alive == [0, -1, 1, -1, 2, -1]


def test_shards_keep_the_order_and_their_size() -> None:
    specs = [TensorSpec(str(size), torch.uint8, (size,)) for size in (3, 4, 20, 1, 2, 8)]
    shards = cut_shards(specs, shard_bytes=10)
    sizes = [[spec.shape[0] for spec in shard] for shard in shards]
    assert sizes == [[3, 4], [20], [1, 2], [8]]
