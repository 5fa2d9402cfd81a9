"""A stage of preparing over worker processes, shard by shard, going on where a killed run stopped.

The parent reads and cuts the documents into shards, workers do the rest. Which worker gets a shard
changes nothing in it. Imports little, because every worker process starts by importing this.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from hashlib import sha256
from multiprocessing import parent_process
from typing import Any, Protocol, TypeVar

from data.document import Document
from data.progress import Advance


class Finished(Protocol):
    """What a worker leaves of a shard."""

    @property
    def text_sha256(self) -> str:
        """`hash_documents` of the shard."""
        ...


R_co = TypeVar("R_co", bound=Finished, covariant=True)


class Worker(Protocol[R_co]):
    """Does a stage's work on single shards, in any process."""

    def work(self, number: int, documents: list[Document]) -> R_co:
        """The result of a shard, which is also kept on disk, so that it need not be made again."""
        ...

    def read_kept(self, number: int) -> R_co | None:
        """The result that an earlier run has kept, if it has."""
        ...


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


def hash_documents(documents: list[Document]) -> str:
    """sha256 of the documents and of where they end."""
    digest = sha256()
    for document in documents:
        for part in (document.text, document.prompt or b""):
            digest.update(len(part).to_bytes(8))
            digest.update(part)
    return digest.hexdigest()


def work_on_shards(
    shards: Iterable[list[Document]],
    make_worker: Callable[[], Worker[R_co]],
    *,
    num_workers: int,
    advance: Advance,
) -> list[R_co]:
    """The results of all shards in order, those kept from an earlier run included.

    Raises:
        ValueError: See `read_documents`; the text of a shard that is kept has changed.
        RuntimeError: A worker died.
    """
    reader = make_worker()
    results: dict[int, R_co] = {}
    running: dict[Future[R_co], tuple[int, int]] = {}  # to its number and bytes of text

    def collect(*, until: int) -> None:
        while len(running) > until:
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                number, size = running.pop(future)
                results[number] = future.result()
                advance(size)

    # Spawned, not forked: this process may hold threads of torch, Arrow or the progress display.
    with ProcessPoolExecutor(
        num_workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(make_worker,),
    ) as pool:
        try:
            for number, documents in enumerate(shards):
                size = sum(document.num_bytes for document in documents)
                kept = reader.read_kept(number)
                if kept is None:
                    running[pool.submit(_work, number, documents)] = number, size
                    collect(until=num_workers)  # one shard waits, so that no worker does
                    continue
                if kept.text_sha256 != hash_documents(documents):
                    raise ValueError(
                        f"the text of shard {number} has changed since this corpus was begun; "
                        "run prepare again, which begins anew"
                    )
                results[number] = kept
                advance(size)
            collect(until=0)
        except BrokenProcessPool as error:
            raise RuntimeError(
                "a worker process died, perhaps for want of memory; finished shards are kept: run "
                "prepare again, with a smaller data.processes or data.shard_bytes"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)
    return [results[number] for number in sorted(results)]


# A process pool hands its workers functions, not objects: each process keeps its one worker here.
_worker: Worker[Any]


def _start_worker(make_worker: Callable[[], Worker[Any]]) -> None:
    """Prepares this process, and ties its life to that of the process that started it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the parent answers it
    global _worker
    _worker = make_worker()
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _work(number: int, documents: list[Document]) -> Any:
    return _worker.work(number, documents)


def _die_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()  # returns when the parent has ended, killed or not
    os._exit(1)
