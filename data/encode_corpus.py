"""Tokenizes a corpus into shards over worker processes, going on where a killed run stopped."""

import multiprocessing
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from data.config import DataConfig, count_workers
from data.corpus import read_documents
from data.document import Document
from data.encode_shard import (
    EncodedShard,
    encode_in_worker,
    hash_documents,
    read_record,
    record_path,
    start_worker,
)
from data.progress import Advance


def cut_shards(documents: Iterable[Document], shard_bytes: int) -> Iterator[list[Document]]:
    """Consecutive documents in lists that end with the document that reaches `shard_bytes`."""
    shard: list[Document] = []
    size = 0
    for document in documents:
        shard.append(document)
        size += document.num_bytes
        if size >= shard_bytes:
            yield shard
            shard, size = [], 0
    if shard:
        yield shard


def encode_corpus(
    config: DataConfig, *, folder: Path, tokenizer_path: Path, advance: Advance
) -> list[EncodedShard]:
    """The records of all shards in order, those kept from an earlier run included.

    This process reads, the workers tokenize; which worker gets a shard changes nothing in it.

    Raises:
        ValueError: See `read_documents`; the text of a shard that is kept has changed.
        RuntimeError: A worker died.
    """
    num_workers = count_workers(config)
    record_path(folder, 0).parent.mkdir(exist_ok=True)
    encoded: dict[int, EncodedShard] = {}
    running: dict[Future[EncodedShard], tuple[int, int]] = {}  # to its number and bytes of text

    def collect(*, until: int) -> None:
        while len(running) > until:
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                number, size = running.pop(future)
                encoded[number] = future.result()
                advance(size)

    # Spawned, not forked: this process may hold threads of torch, Arrow or the progress display.
    with ProcessPoolExecutor(
        num_workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=start_worker,
        initargs=(folder, tokenizer_path, config.validation_fraction),
    ) as pool:
        try:
            shards = cut_shards(read_documents(config), config.shard_bytes)
            for number, documents in enumerate(shards):
                size = sum(document.num_bytes for document in documents)
                kept = read_record(folder, number)
                if kept is not None:
                    _refuse_other_text(folder, number, kept, documents)
                    encoded[number] = kept
                    advance(size)
                else:
                    future = pool.submit(encode_in_worker, number, documents)
                    running[future] = number, size
                    collect(until=num_workers)  # one shard waits, so that no worker does
            collect(until=0)
        except BrokenProcessPool as error:
            raise RuntimeError(
                "a tokenization process died, perhaps for want of memory; finished shards are "
                "kept: run prepare again, with a smaller data.processes or data.shard_bytes"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)
    return [encoded[number] for number in sorted(encoded)]


def _refuse_other_text(
    folder: Path, number: int, kept: EncodedShard, documents: list[Document]
) -> None:
    if kept.text_sha256 != hash_documents(documents):
        raise ValueError(
            f"the text of shard {number} has changed since {folder} was begun; "
            "choose another data.folder, or delete this one to prepare it anew"
        )
