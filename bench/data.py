"""`python -m bench.data`: the loader against a plain memmap and against streaming libraries.

30M random tokens in documents of log-normal length (about 1000 tokens), in random order, in the
page cache. CPU time over all threads, in turns. Ours is the whole loader: the order, packing,
targets, positions, masks, tensors. Peers:

- memmap, same bytes: the very pieces that our rows hold, copied one by one into int64 arrays;
  nothing else, and where they lie was looked up before.
- memmap, inputs and targets: contiguous rows from random places, twice, the second one token
  later, as in nanoGPT's loader.
- `datasets` streaming of parquet, as it comes (lists) and in numpy format: document by document,
  without packing.
- `datasets` streaming, packed, which is the same job in the field's usual way (transformers'
  run_clm.py, streamed): shuffled in a buffer, documents joined and cut into rows by a batched
  `map`, inputs and labels by a DataLoader, collated as transformers does, or in torch format, which
  makes a tensor of each token. Documents see each other there, and no position is made.
- mosaicml-streaming of MDS, where it can be imported: shuffled, document by document, without
  packing. (It pins other versions than ours: `pip install --target DIR --no-deps` it and what it
  misses, and put DIR on PYTHONPATH.)
"""

import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib.machinery import ModuleSpec
from itertools import chain
from pathlib import Path
from types import ModuleType

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import torch
from torch.utils.data import DataLoader

from bench.timing import cpu_seconds
from data.atomic_file import write_json
from data.batches import Batches
from data.config import FilesData, Verify
from data.documents import write_index
from data.manifest import (
    FileRecord,
    Manifest,
    ShardRecord,
    SplitRecord,
    TokenizerRecord,
    record_file,
    write_manifest,
)
from data.mixture import Row
from data.packing import Packing
from data.position import Position
from data.shards import write_shard
from data.training_data import TrainingData

TOKENS, MEAN_LENGTH, VOCAB_SIZE = 30_000_000, 1000, 32_000
SEQ_LEN, MICRO_BATCH, GLOBAL_BATCH = 4096, 4, 32
SHUFFLE_BUFFER = 1000  # documents; the larger, the longer the first batch takes, not the others
ROUNDS, BATCHES_PER_ROUND = 9, 64
OURS, MEMMAP = "ours", "memmap, same bytes"

Documents = list[np.ndarray]


def draw_documents() -> Documents:
    random = np.random.default_rng(0)
    sizes = random.lognormal(np.log(MEAN_LENGTH) - 0.5, 1.0, TOKENS // MEAN_LENGTH)
    return [random.integers(0, VOCAB_SIZE, max(int(n), 2), np.uint16) for n in sizes]


def write_corpus(folder: Path, documents: Documents) -> None:
    """A prepared corpus of one shard, as `thrifty prepare` leaves it."""
    summary = write_shard(folder / "train-0", documents, vocab_size=VOCAB_SIZE)  # type: ignore[arg-type]
    write_index({folder / "train-0": False}, folder / "documents.i64", None)
    np.save(folder / "unigram.npy", np.ones(VOCAB_SIZE, np.int64))
    (folder / "tokenizer.model").write_bytes(b"none is needed")
    write_json(folder / "origin.json", {})
    shard = ShardRecord(
        name="train-0",
        documents=summary.documents,
        tokens=summary.tokens,
        prompt_tokens=0,
        text_bytes=0,
        bin=FileRecord("train-0.bin", summary.bin_bytes, summary.bin_sha256),
        idx=FileRecord("train-0.idx", summary.idx_bytes, summary.idx_sha256),
    )
    split = SplitRecord(
        documents=summary.documents,
        tokens=summary.tokens,
        prompt_tokens=0,
        text_bytes=0,
        unigram=record_file(folder / "unigram.npy"),
        index=record_file(folder / "documents.i64"),
        prompts=None,
        shards=[shard],
    )
    file = record_file(folder / "tokenizer.model")
    tokenizer = TokenizerRecord(file, VOCAB_SIZE, bos_id=0, eos_id=1, pad_id=2, fim=None)
    origin = record_file(folder / "origin.json")
    write_manifest(folder, Manifest(tokenizer, split, split, 0, origin))


def read_ours(folder: Path, packing: Packing, world: int = 1) -> Callable[[], int]:
    """Reads rank 0's share of global batches."""
    config = FilesData(
        folder=str(folder), paths=[""], seq_len=SEQ_LEN, packing=packing, verify=Verify.fast
    )
    order = TrainingData(config, seed=0)
    batches = Batches(order, rank=0, world=world, micro_batch_size=MICRO_BATCH)
    position = order.enter(Position())

    def read() -> int:
        nonlocal position
        num_tokens = 0
        for _ in range(BATCHES_PER_ROUND):
            taken = batches.read(position, GLOBAL_BATCH * world)
            position = taken.position
            num_tokens += sum(batch.tokens.numel() for batch in taken.batches)
        return num_tokens

    return read


def read_same_bytes(folder: Path) -> Callable[[], int]:
    """Copies the pieces of rows that a loader of another seed would read."""
    config = FilesData(folder=str(folder), paths=[""], seq_len=SEQ_LEN, verify=Verify.fast)
    order = TrainingData(config, seed=1)
    position = order.enter(Position())
    rows = order.draw(position, GLOBAL_BATCH * BATCHES_PER_ROUND).rows
    places = [_places(row) for row in rows]
    tokens = np.memmap(folder / "train-0.bin", np.uint16, mode="r")

    def read() -> int:
        for first in range(0, len(places), MICRO_BATCH):
            batch = np.empty((MICRO_BATCH, SEQ_LEN), np.int64)
            for row, pieces in zip(batch, places[first : first + MICRO_BATCH], strict=True):
                at = 0
                for start, length in pieces:
                    row[at : at + length] = tokens[start : start + length]
                    at += length
        return len(places) * SEQ_LEN

    return read


def _places(row: Row) -> list[tuple[int, int]]:
    starts = row.documents.starts
    return [
        (int(starts[piece.place - row.window.start]) + piece.offset, piece.length)
        for piece in row.pieces
    ]


def read_contiguous(folder: Path) -> Callable[[], int]:
    tokens = np.memmap(folder / "train-0.bin", np.uint16, mode="r")
    random = np.random.default_rng(0)

    def read() -> int:
        for _ in range(GLOBAL_BATCH * BATCHES_PER_ROUND // MICRO_BATCH):
            starts = random.integers(0, len(tokens) - SEQ_LEN - 1, MICRO_BATCH).tolist()
            np.stack([tokens[n : n + SEQ_LEN].astype(np.int64) for n in starts])
            np.stack([tokens[n + 1 : n + 1 + SEQ_LEN].astype(np.int64) for n in starts])
        return GLOBAL_BATCH * BATCHES_PER_ROUND * SEQ_LEN

    return read


def read_documents(
    documents: Iterator[np.ndarray] | Iterator[torch.Tensor], share: int = 10
) -> Callable[[], int]:
    """Takes so many documents that they would fill a part of a round's rows: they are slow."""

    def read() -> int:
        num_tokens = 0
        while num_tokens < GLOBAL_BATCH * BATCHES_PER_ROUND * SEQ_LEN // share:
            num_tokens += len(next(documents))
        return num_tokens

    return read


def stream_datasets(folder: Path, documents: Documents, form: str | None) -> Iterator[np.ndarray]:
    table = pa.table({"tokens": pa.array(documents, pa.list_(pa.uint16()))})
    pa.parquet.write_table(table, folder / f"{form}.parquet")
    files = str(folder / f"{form}.parquet")
    while True:
        stream = datasets.load_dataset("parquet", data_files=files, split="train", streaming=True)
        for example in stream.with_format(form):
            yield example["tokens"]


def pack_rows(examples: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
    """Documents joined and cut into rows; targets are the row itself, the model shifts them."""
    joined = list(chain.from_iterable(examples["tokens"]))
    last = len(joined) - len(joined) % SEQ_LEN
    rows = [joined[start : start + SEQ_LEN] for start in range(0, last, SEQ_LEN)]
    return {"input_ids": rows, "labels": [row.copy() for row in rows]}


def stream_packed(folder: Path, documents: Documents, form: str | None) -> Iterator[torch.Tensor]:
    """Inputs of batches; what remains of each thousand documents is left out, as there."""
    table = pa.table({"tokens": pa.array(documents, pa.list_(pa.uint16()))})
    pa.parquet.write_table(table, folder / f"packed-{form}.parquet")
    files = str(folder / f"packed-{form}.parquet")
    while True:
        stream = datasets.load_dataset("parquet", data_files=files, split="train", streaming=True)
        stream = stream.shuffle(seed=0, buffer_size=SHUFFLE_BUFFER)
        stream = stream.map(pack_rows, batched=True, remove_columns=["tokens"]).with_format(form)
        collate_rows = None if form else collate_lists
        for batch in DataLoader(stream, batch_size=MICRO_BATCH, collate_fn=collate_rows):
            assert batch["labels"].shape == batch["input_ids"].shape
            yield batch["input_ids"].flatten()


def collate_lists(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """As transformers' default_data_collator does."""
    return {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}


def stream_mosaic(folder: Path, documents: Documents) -> Iterator[np.ndarray]:
    if "torchvision" not in sys.modules:  # only its data sets of images need it
        for name in ("", ".datasets", ".transforms", ".transforms.functional"):
            module = ModuleType(f"torchvision{name}")
            module.__spec__, module.__path__ = ModuleSpec(module.__name__, None), []
            module.VisionDataset, module.to_tensor = object, None  # type: ignore[attr-defined]
            sys.modules[module.__name__] = module
    from streaming import MDSWriter, StreamingDataset

    with MDSWriter(out=str(folder / "mds"), columns={"tokens": "ndarray:uint16"}) as writer:
        for document in documents:
            writer.write({"tokens": document})
    stream = StreamingDataset(local=str(folder / "mds"), shuffle=True, batch_size=MICRO_BATCH)
    while True:
        for example in stream:
            yield example["tokens"]


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        documents = draw_documents()
        write_corpus(folder, documents)
        readers = {
            MEMMAP: read_same_bytes(folder),
            "memmap, inputs and targets": read_contiguous(folder),
            OURS: read_ours(folder, Packing.concatenate),
            "ours, best fit": read_ours(folder, Packing.best_fit),
            "ours, one of 64 ranks": read_ours(folder, Packing.concatenate, world=64),
            "datasets": read_documents(stream_datasets(folder, documents, None)),
            "datasets, packed": read_documents(stream_packed(folder, documents, None)),
            "datasets, packed, torch format": read_documents(
                stream_packed(folder, documents, "torch"), share=100
            ),
            "datasets, numpy format": read_documents(stream_datasets(folder, documents, "numpy")),
        }
        stream = stream_mosaic(folder, documents)
        try:
            next(stream)
            readers["mosaicml-streaming"] = read_documents(stream)
        except ImportError as error:
            print(f"mosaicml-streaming is left out: {error}")
        costs: dict[str, list[float]] = {name: [] for name in readers}  # seconds per token
        for number in range(ROUNDS + 1):
            for name, read in readers.items():
                counted: list[int] = []
                seconds = cpu_seconds(lambda: counted.append(read()))  # noqa: B023
                if number:  # the first round warms up
                    costs[name].append(seconds / counted[0])
        for name, own in costs.items():
            to_memmap, to_ours = (
                statistics.median(a / b for a, b in zip(own, costs[peer], strict=True))
                for peer in (MEMMAP, OURS)
            )
            print(
                f"{name:>30}: {1e-6 / statistics.median(own):8.1f} M tokens/s per core, cost "
                f"{to_memmap:6.2f} of the memmap's, {to_ours:6.2f} of ours",
                flush=True,
            )
        stream.close()  # before its files go


if __name__ == "__main__":
    main()
