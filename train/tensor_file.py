"""Tensors in one safetensors file, written as a stream and hashed on the way.

The safetensors library reads the result. It is not used to write: it holds a second copy of all
tensors in host memory, and a full disk surfaces as an error of its own.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from train.manifest import StoredFile

CODES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
}
BLOCK_BYTES = 16 << 20  # copied to the host and written at a time


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> StoredFile:
    """Write 1-D tensors from any device, flushed to disk, and give the file's size and hash.

    Raises:
        OSError: The disk is full or fails; what was written so far stays.
    """
    header, end = {}, 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        header[name] = {
            "dtype": CODES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.blake2b(digest_size=16)
    num_bytes = 0
    with path.open("wb") as file:
        for block in (len(text).to_bytes(8, "little"), text):
            digest.update(block)
            num_bytes += file.write(block)
        for tensor in tensors.values():
            for part in tensor.detach().view(torch.uint8).split(BLOCK_BYTES):
                data = part.cpu().numpy().data
                digest.update(data)
                num_bytes += file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return StoredFile(num_bytes, digest.hexdigest())


def hash_tensors(path: Path) -> StoredFile:
    """Size and hash of an existing file, to compare with what `write_tensors` gave."""
    digest = hashlib.blake2b(digest_size=16)
    num_bytes = 0
    with path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
            num_bytes += len(block)
    return StoredFile(num_bytes, digest.hexdigest())


def sync_folder(path: Path) -> None:
    """Make the names in a folder as durable as the files they name."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
