"""Tensors in one safetensors file, written as a stream and hashed on the way.

The safetensors library reads the result. It is not used to write: it holds a second copy of all
tensors in host memory, and a full disk surfaces as an error of its own.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from train.checkpoint.manifest import StoredFile

CODES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
}
BLOCK_BYTES = 16 << 20  # copied to the host and written at a time


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], *, about: Mapping[str, str] | None = None
) -> StoredFile:
    """Write 1-D tensors from any device, flushed to disk, and give the file's size and hashes.

    `about` stands in the file's header, so that the header's hash tells one run's from another's.

    Raises:
        OSError: The disk is full or fails; what was written so far stays.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(about or {})}}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        header[name] = {
            "dtype": CODES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    head = encode_header(header)
    digest = new_hash(head)
    with path.open("wb") as file:
        num_bytes = file.write(head)
        for tensor in tensors.values():
            for part in tensor.detach().view(torch.uint8).split(BLOCK_BYTES):
                data = part.cpu().numpy().data
                digest.update(data)
                num_bytes += file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return StoredFile(num_bytes, digest.hexdigest(), new_hash(head).hexdigest())


def encode_header(header: Mapping[str, Any]) -> bytes:
    """A file's beginning: the length of what follows, and a JSON table of contents."""
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def hash_header(path: Path) -> str:
    """The hash of an existing file's beginning."""
    with path.open("rb") as file:
        length = file.read(8)
        announced = int.from_bytes(length, "little")
        there = os.fstat(file.fileno()).st_size  # a damaged length may be anything
        return new_hash(length + file.read(min(announced, there))).hexdigest()


def hash_tensors(path: Path) -> StoredFile:
    """Size and hashes of an existing file, to compare with what `write_tensors` gave."""
    digest = new_hash()
    num_bytes = 0
    with path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
            num_bytes += len(block)
    return StoredFile(num_bytes, digest.hexdigest(), hash_header(path))


def new_hash(data: bytes = b"") -> "hashlib.blake2b":
    """The hash that all of a checkpoint's files are checked with."""
    return hashlib.blake2b(data, digest_size=16)


def sync_folder(path: Path) -> None:
    """Make the names in a folder as durable as the files they name."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
